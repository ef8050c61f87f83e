#!/usr/bin/env python
"""Predicted and measured peak memory of real trainings, side by side.

    python scripts/bench_prediction.py [--cases fsdp:1:lora:float32:100,zero3:2:full:bfloat16:100] [--json table.json]

A case is backend:ranks:lora or full:dtype:tokens of a row, with ":recompute" behind it where activations are computed
again. Each is a training of --model (the embedded one) on made-up rows: three steps of two micro-batches of two rows
for each rank, LoRA 16. Predicted is what the start of the run prints, measured the highest `memory` in metrics.jsonl.
One case runs after the other, so that they do not take each other's memory. This script loads no torch: a process's
highest resident memory counts that of the process which started it.
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
CASES = [
    f"{backend}:1:{kind}:{dtype}:100"
    for backend in ("fsdp", "zero3")
    for kind in ("lora", "full")
    for dtype in ("float32", "bfloat16")
] + [
    "fsdp:1:lora:bfloat16:300",
    "zero3:1:lora:float32:300",
    "fsdp:1:full:float32:300",
    "zero3:1:full:bfloat16:300",
    "fsdp:2:lora:float32:100",
    "zero3:2:lora:bfloat16:100",
    "zero3:2:lora:float32:300",
    "zero3:2:full:float32:100",
    "fsdp:1:lora:float32:600:recompute",
]


def write_rows(path: Path, count: int, length: int) -> None:
    """Rows of about so many tokens that share little."""
    random, words = np.random.default_rng(length), WORDS.split()
    rows = [
        {
            "prompt": " ".join(random.choice(words, length - RESPONSE - TEMPLATE)),
            "response": " ".join(random.choice(words, RESPONSE)),
        }
        for _ in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def run(case: str, model: str, folder: Path) -> dict:
    """Train, and compare."""
    backend, ranks, kind, dtype, length, *recompute = case.split(":")
    rows, out = folder / "rows.parquet", folder / case.replace(":", "_")
    batch = MICRO_BATCHES * ROWS * int(ranks)
    write_rows(rows, batch * STEPS, int(length))
    starts = {
        "fsdp": [BIN / "torchrun", "--standalone", "--nproc_per_node", ranks, "dsft/train.py"],
        "zero3": [BIN / "deepspeed", "--num_accelerators", ranks, "dsft/train.py"],
    }
    start = [sys.executable, "-m", "dsft.train"] if ranks == "1" else starts[backend]
    flags = {
        "backend": backend, "model": model, "train_files": rows, "output_dir": out, "dtype": dtype,
        "lora_rank": 16 if kind == "lora" else 0, "train_batch_size": batch, "fold": "off", "save_steps": 0,
        "max_tokens_per_micro_batch": int(int(length) * ROWS * 1.08), "total_training_steps": STEPS, "lr": 1e-5,
        "gradient_checkpointing": bool(recompute),
    }  # fmt: skip
    words = [*start, *(word for name, value in flags.items() for word in (f"--{name}", value))]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = max(line["memory"] for line in lines)
    [(predicted, parts)] = re.findall(r"^memory +([\d.]+) GiB per rank predicted \((.*?)\)", done.stdout, re.M)
    error = float(predicted) / measured - 1
    return {"case": case, "predicted_gib": float(predicted), "measured_gib": measured, "error": error, "parts": parts}


def environment() -> dict[str, str]:
    """One thread a rank where the user has not said how many: the peak is the same."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {"OMP_NUM_THREADS": "1"} | kept


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--json")
    options = parser.parse_args()
    table = []
    print("| backend:ranks:trained:dtype:tokens | predicted GiB | measured GiB | error |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases.split(","):
            row = run(case, options.model, Path(folder))
            table.append(row)
            numbers = f"{row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {row['error']:+.1%}"
            print(f"| {case} | {numbers} |", flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"largest error {max(abs(row['error']) for row in table):.1%} in {len(table)} cases")


if __name__ == "__main__":
    main()
