#!/usr/bin/env python
"""Seconds and peak resident memory of a rank while a model is loaded and sharded, by size, backend and sharding.

    python scripts/bench_loading.py [--sizes 0.1,1.4,3] [--arms fsdp:full,zero3:full] [--ranks 2] [--json FILE]

The models are Qwen2-shaped with random bfloat16 weights, LoRA 8 on top. Each arm is a process group of --ranks ranks.
Printed are the largest rank's figures in GiB: resident before the model is built, its shard and one decoder layer by
count, the highest resident memory until the first step could begin, and what of it these do not explain.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "0.1": (576, 1536, 20, 9, 3, 49152),
    "1.4": (2048, 5632, 26, 16, 16, 49152),
    "3": (2048, 11008, 36, 16, 2, 151936),
}
GIB = 2**30


def make_model(size: str, folder: Path) -> None:
    """Random weights, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    from dsft.model.embedded import embedded_model

    hidden, inner, layers, heads, key_values, vocabulary = SIZES[size]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_values, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)


def worker(words: list[str], report: Path) -> None:
    """One rank: build the Trainer, and note resident memory meanwhile."""
    import psutil

    from dsft.cli import parse
    from dsft.config import TrainConfig
    from dsft.distributed import runtime
    from dsft.training import trainer as module

    process, samples, loading = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while True:
            if loading.is_set():
                samples.append(process.memory_info().rss)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    build, found = module.build_model, {}

    def build_and_time(config: Any, base: Any, plan: Any, backend: Any, *more: Any) -> Any:
        runtime.return_freed_memory()
        layers = [layer for layer in base.shapes.modules() if type(layer).__name__ in base.shapes._no_split_modules]
        found["before"], found["weights"] = process.memory_info().rss, 2 * plan.parameters
        found["layer"] = 2 * max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        loading.set()
        started = time.perf_counter()
        built = build(config, base, plan, backend, *more)
        found["seconds"] = time.perf_counter() - started
        loading.clear()
        return built

    module.build_model = build_and_time

    def work() -> None:
        module.Trainer(parse(TrainConfig, words))
        report.with_suffix(f".{runtime.World.from_environment().rank}").write_text(
            json.dumps(found | {"peak": max(samples), "after": process.memory_info().rss})
        )

    runtime.run_to_exit(work, debug=True)


def measure(arm: str, size: str, model: Path, ranks: int, folder: Path) -> dict[str, Any]:
    """Start the ranks."""
    backend, sharding = arm.split(":")
    report = folder / "report"
    words = ["--backend", backend, "--sharding", sharding, "--model", model, "--dtype", "bfloat16", "--lora_rank", 8]
    words += [
        "--train_files",
        ROOT / "data" / "sample_train.parquet",
        "--output_dir",
        folder / "run",
        "--resume",
        "never",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = [*launcher, __file__, "--worker", report, *words]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {arm}, {size} B failed:\n{done.stderr[-3000:]}")
    found = [json.loads(report.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]
    row = {name: max(one[name] for one in found) for name in found[0]}
    shard = row["weights"] / (1 if sharding == "trainable" else ranks)
    more = row["peak"] - row["before"] - shard - row["layer"]
    return {"size": size, "arm": arm, "shard": shard, "unexplained": more} | row


def main() -> None:
    """Print and write a table."""
    if sys.argv[1:2] == ["--worker"]:
        sys.path.insert(0, str(ROOT))
        worker(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="billions of parameters (default: %(default)s)")
    parser.add_argument("--arms", default="fsdp:full,fsdp:trainable,zero3:full,zero3:trainable")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", help="write the table as JSON to this file")
    options = parser.parse_args()
    print("| B | backend:sharding | s | before | shard | layer | peak | more | after |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    table = []
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as model:
            made = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'scripts')!r}]; import bench_loading; "
            made += f"from pathlib import Path; bench_loading.make_model({size!r}, Path({model!r}))"
            subprocess.run([sys.executable, "-c", made], check=True, capture_output=True)
            for arm in options.arms.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(arm, size, Path(model), options.ranks, Path(folder))
                table.append(row)
                names = ("before", "shard", "layer", "peak", "unexplained", "after")
                cells = [size, arm, f"{row['seconds']:.1f}", *(f"{row[name] / GIB:.2f}" for name in names)]
                print("|", " | ".join(cells), "|", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
