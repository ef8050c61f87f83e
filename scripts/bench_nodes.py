#!/usr/bin/env python
"""Bytes between two hosts and seconds per step, by backend and sharding, at full speed and over a slower link.

    python scripts/bench_nodes.py [--arms fsdp:trainable,zero3:full] [--rates none,1gbit] [--ranks 1] [--json FILE]
    python scripts/bench_nodes.py --arms fsdp:hybrid,zero3:hybrid --rates none --ranks 2 --lora_rank 0

The hosts are network namespaces of this machine, started by torchrun with --ranks ranks each; needs root. Trains
--model on --train_files in float32, with LoRA or, with --lora_rank 0, all of it. Bytes are what one host has received
per step, from the first step to the last but one, also in multiples of the float32 gradient of what is trained; seconds
are the median of those steps.
Difference is the largest relative one, over all steps, of loss and gradient norm from those of one process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hosts import ROOT, Cluster, unavailable_reason

ARMS = ",".join(f"{backend}:{kind}" for backend in ("fsdp", "zero3") for kind in ("full", "hybrid", "trainable"))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "train/loss" in line]


def flags(options: argparse.Namespace, out: Path, backend: str, sharding: str) -> list[str]:
    """Of dsft.train."""
    values = {
        "backend": backend, "sharding": sharding, "output_dir": out, "dtype": "float32", "save_steps": 0,
        "total_training_steps": options.steps, "lora_rank": options.lora_rank, "model": options.model,
        "train_files": options.train_files, "train_batch_size": options.train_batch_size,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def train_alone(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The steps of one process."""
    words = [sys.executable, "-m", "dsft.train", *flags(options, folder / "one", "fsdp", "full")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: the run of one process failed:\n{done.stderr[-3000:]}")
    return steps_of(folder / "one")


def measure(
    arm: str, rate: str, options: argparse.Namespace, folder: Path, expected: list[dict[str, Any]]
) -> dict[str, Any]:
    """Train, and count."""
    backend, sharding, *tokens = arm.split(":")
    out = folder / f"{arm.replace(':', '-')}-{rate}"
    words = flags(options, out, backend, sharding)
    words += ["--max_tokens_per_micro_batch", tokens[0]] if tokens else []
    with Cluster(2) as cluster:
        hosts = cluster.hosts
        for index, host in enumerate(hosts):
            if rate != "none":
                host.slow(rate)
            launcher = ["torchrun", "--nnodes", 2, "--node_rank", index, "--nproc_per_node", options.ranks]
            launcher += ["--master_addr", hosts[0].address, "dsft/train.py"]
            host.start([*launcher, *words], folder / f"log-{index}")
        counted = []
        while any(host.processes[0].poll() is None for host in hosts):
            if len(steps := steps_of(out)) > len(counted):
                counted += [hosts[1].received()] * (len(steps) - len(counted))
            time.sleep(0.02)
        if any(host.processes[0].poll() for host in hosts):
            sys.exit(f"error: {arm} failed:\n{(folder / 'log-0').read_text()[-3000:]}")
    steps = steps_of(out)
    [trained] = [line for line in (folder / "log-0").read_text().splitlines()[-40:] if " M trained" in line][-1:]
    gradient = 4e6 * float(trained.split(" M parameters, ")[1].split(" M trained")[0].replace(",", ""))
    received = (counted[-2] - counted[0]) / (len(counted) - 2)
    return {
        "arm": arm,
        "rate": rate,
        "received_mb": received / 1e6,
        "gradients": received / gradient,
        "seconds": statistics.median(step["train/step_seconds"] for step in steps[1:-1]),
        "difference": max(
            abs(ours[key] / theirs[key] - 1)
            for ours, theirs in zip(steps, expected, strict=True)
            for key in ("train/loss", "train/grad_norm")
        ),
        "memory_gib": max(step["memory"] for step in steps),
    }


def main() -> None:
    """Print and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=ARMS, help="backend:sharding[:tokens per micro-batch] (default: %(default)s)")
    parser.add_argument("--rates", default="none,1gbit", help="of the link, in the words of tc (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="per host (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--train_files", default="data/sample_train.parquet", help="as for dsft.train")
    parser.add_argument("--json", help="write the table as JSON to this file")
    options = parser.parse_args()
    if reason := unavailable_reason():
        sys.exit(f"error: {reason}")
    print("| backend:sharding | link | received MB per step | x float32 gradient | s per step | difference | GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        expected = train_alone(options, Path(folder))
        for arm in options.arms.split(","):
            for rate in options.rates.split(","):
                row = measure(arm, rate, options, Path(folder), expected)
                table.append(row)
                cells = [arm, rate, f"{row['received_mb']:.1f}", f"{row['gradients']:.2f}", f"{row['seconds']:.2f}"]
                print(
                    "|", " | ".join([*cells, f"{row['difference']:.1e}", f"{row['memory_gib']:.2f}"]), "|", flush=True
                )
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
