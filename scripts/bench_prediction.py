#!/usr/bin/env python
"""Predicted and measured peak memory of real trainings, side by side.

    python scripts/bench_prediction.py [--cases fsdp:1:lora:float32:100,zero3:2:full:bfloat16:100] [--json table.json]

A case is backend:ranks:lora or full:dtype:tokens of a row, and perhaps more behind it: "recompute" for activation
checkpointing, "1.4b" for a model of 1.4 B random weights, a number for that many rows. Each is a training of --model on
made-up rows: three steps of two micro-batches of two rows per rank, LoRA 16. Predicted is what the run prints at its
start, measured the highest `memory` in metrics.jsonl. The cases run one after the other, so that they do not compete
for memory. This script loads no torch: the highest resident memory of a process counts that of its parent.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STEPS, MICRO_BATCHES, ROWS = 3, 2, 2
RESPONSE = 30  # words, a token each
TEMPLATE = 32  # tokens that the chat template adds to a row, its system prompt included
WORDS = (
    "house tree river stone light water green black white time year people way day man life child world school state"
)
CASES = """
    fsdp:1:lora:float32:100 fsdp:1:lora:bfloat16:100 fsdp:1:full:float32:100 fsdp:1:full:bfloat16:100
    zero3:1:lora:float32:100 zero3:1:lora:bfloat16:100 zero3:1:full:float32:100 zero3:1:full:bfloat16:100
    fsdp:1:lora:bfloat16:300 zero3:1:lora:float32:300 fsdp:1:full:float32:300 zero3:1:full:bfloat16:300
    fsdp:2:lora:float32:100 zero3:2:lora:bfloat16:100 zero3:2:lora:float32:300 zero3:2:full:float32:100
    fsdp:1:lora:float32:600:recompute fsdp:1:lora:bfloat16:70:561718 zero3:2:lora:bfloat16:100:1.4b
"""
RESOLVE = "import sys; from dsft.checkpointing.models import resolve_model; print(resolve_model(sys.argv[1]))"
MAKE_MODEL = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 26}
heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
config = AutoConfig.from_pretrained(sys.argv[1], **sizes, **heads)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


def write_rows(path: Path, count: int, length: int) -> None:
    """Rows of about so many tokens that share little."""
    random, words = np.random.default_rng(length), WORDS.split()
    sizes = {"prompt": length - RESPONSE - TEMPLATE, "response": RESPONSE}
    columns = {name: [" ".join(random.choice(words, size)) for _ in range(count)] for name, size in sizes.items()}
    pq.write_table(pa.table(columns), path)


def run(case: str, model: str, folder: Path) -> dict:
    """Train, and compare."""
    backend, ranks, kind, dtype, length, *more = case.split(":")
    rows, out = folder / "rows.parquet", folder / "run"
    if "1.4b" in more:
        python("-c", MAKE_MODEL, model, folder / "model")
        model = str(folder / "model")
    batch = MICRO_BATCHES * ROWS * int(ranks)
    write_rows(rows, next((int(word) for word in more if word.isdecimal()), batch * STEPS), int(length))
    launcher = [BIN / "torchrun", "--standalone", "--nproc_per_node", ranks]
    start = [sys.executable, "-m", "dsft.train"] if ranks == "1" else [*launcher, "dsft/train.py"]
    flags = {
        "backend": backend, "model": model, "train_files": rows, "output_dir": out, "dtype": dtype,
        "lora_rank": 16 if kind == "lora" else 0, "train_batch_size": batch, "fold": "off", "save_steps": 0,
        "max_tokens_per_micro_batch": int(int(length) * ROWS * 1.08), "total_training_steps": STEPS, "lr": 1e-5,
        "gradient_checkpointing": "recompute" in more,
    }  # fmt: skip
    words = [*start, *(word for name, value in flags.items() for word in (f"--{name}", value))]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, env=environment(folder))
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = max(line["memory"] for line in lines)
    [(predicted, parts)] = re.findall(r"^memory +([\d.]+) GiB per rank predicted \((.*?)\)", done.stdout, re.M)
    error = float(predicted) / measured - 1
    return {"case": case, "predicted_gib": float(predicted), "measured_gib": measured, "error": error, "parts": parts}


def python(*words: object) -> str:
    """What a Python of its own prints."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def environment(folder: Path) -> dict[str, str]:
    """An empty cache, so that rows are tokenized, and one thread per rank unless the user has set some."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {"OMP_NUM_THREADS": "1"} | kept | {"DSFT_CACHE": str(folder / "cache")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES.split()))
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--json")
    options = parser.parse_args()
    table = []
    print("| backend:ranks:trained:dtype:tokens | predicted GiB | measured GiB | error |\n| --- | --- | --- | --- |")
    model = python("-c", RESOLVE, options.model).splitlines()[-1]
    for case in options.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            row = run(case, model, Path(folder))
        table.append(row)
        numbers = f"{row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {row['error']:+.1%}"
        print(f"| {case} | {numbers} |", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    errors = [row["error"] for row in table]
    print(f"from {min(errors):+.1%} to {max(errors):+.1%} in {len(table)} cases")


if __name__ == "__main__":
    main()
