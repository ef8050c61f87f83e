#!/usr/bin/env python
"""Train the same few steps in several ways and compare train/loss and train/grad_norm step by step.

    python scripts/compare_backends.py --model smollm2-135m --train_files data/sample_train.parquet \
        --total_training_steps 3 --train_batch_size 8 --dtype float32

Every flag of dsft.train is passed on, except those that the arms set: backend, max_tokens_per_micro_batch, fold,
output_dir. Arms that fold and arms that do not have the same batches only where one batch holds all rows.
Prints a table, writes it as JSON, and exits with 1 where an arm differs by more than --tolerance (relative)
from the first one at any step.

    --arms         comma-separated backend:ranks:tokens or backend:ranks:tokens:fold, where tokens is
                   max_tokens_per_micro_batch or auto, and fold is batch (the default) or off
                   (default: both backends, 1 and 2 ranks, 1024 tokens and auto)
    --tolerance    largest relative difference (default 1e-5)
    --json         where the table goes as JSON (default: not written)
    --work_dir     where the runs are kept (default: a temporary folder)
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ARMS = ",".join(f"{b}:{r}:{m}" for b in ("fsdp", "zero3") for r in (1, 2) for m in ("1024", "auto"))
COMPARED = ("train/loss", "train/grad_norm")


def free_port() -> int:
    """A TCP port on which nobody listens, so that launchers started one after the other never meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(backend: str, ranks: int) -> list[str]:
    """How a user starts this many ranks of this backend."""
    scripts = Path(sys.executable).parent
    if ranks == 1:
        return [sys.executable, "-m", "dsft.train"]
    if backend == "zero3":
        port = ["--master_port", str(free_port())]
        return [str(scripts / "deepspeed"), "--num_accelerators", str(ranks), *port, "dsft/train.py"]
    return [str(scripts / "torchrun"), "--standalone", "--nproc_per_node", str(ranks), "dsft/train.py"]


def run_arm(arm: str, flags: list[str], folder: Path) -> list[dict]:
    """Train one arm and return its step lines."""
    backend, ranks, tokens, *fold = arm.split(":")
    output = folder / arm.replace(":", "-")
    own = ["--backend", backend, "--output_dir", str(output)]
    if tokens != "auto":
        own += ["--max_tokens_per_micro_batch", tokens]
    if fold:
        own += ["--fold", *fold]
    started = time.monotonic()
    done = subprocess.run(
        [*command(backend, int(ranks)), *own, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {arm} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{arm}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "train/loss" in line]


def main() -> None:
    """Run all arms, print the table, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=DEFAULT_ARMS)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--json")
    parser.add_argument("--work_dir")
    options, flags = parser.parse_known_args()
    folder = Path(options.work_dir or tempfile.mkdtemp(prefix="dsft-compare-"))
    arms = options.arms.split(",")
    runs = {arm: run_arm(arm, flags, folder) for arm in arms}
    reference = runs[arms[0]]
    print(f"{'backend:ranks:tokens':<20} {'step':>4} {'train/loss':>14} {'train/grad_norm':>16} {'relative':>10}")
    worst = 0.0
    for arm, lines in runs.items():
        if len(lines) != len(reference):
            sys.exit(f"error: {arm} has {len(lines)} steps, {arms[0]} has {len(reference)}")
        for line, expected in zip(lines, reference, strict=True):
            relative = max(abs(line[key] - expected[key]) / abs(expected[key]) for key in COMPARED)
            worst = max(worst, relative)
            loss, norm = line["train/loss"], line["train/grad_norm"]
            print(f"{arm:<20} {line['step']:>4} {loss:>14.8f} {norm:>16.8f} {relative:>10.1e}")
    verdict = "equal" if worst <= options.tolerance else "DIFFERENT"
    print(f"{verdict}: largest relative difference {worst:.1e}, tolerance {options.tolerance:g}")
    if options.json:
        table = {"tolerance": options.tolerance, "worst": worst, "flags": flags, "runs": runs}
        Path(options.json).write_text(json.dumps(table, indent=2), encoding="utf-8")
    sys.exit(worst > options.tolerance)


if __name__ == "__main__":
    main()
