#!/usr/bin/env python
"""Train the same few steps in several ways and compare train/loss and train/grad_norm step by step.

    python scripts/compare_backends.py --model smollm2-135m --train_files data/sample_train.parquet \
        --total_training_steps 3 --train_batch_size 8 --dtype float32

Passes every flag of dsft.train on, except those that the arms set: backend, max_tokens_per_micro_batch, fold,
output_dir. Arms that fold and arms that do not have the same batches only where one batch holds all rows.
Prints a table, writes it as JSON, and exits with 1 where an arm differs by more than --tolerance (relative)
from the first one at any step.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ARMS = ",".join(f"{b}:{r}:{m}" for b in ("fsdp", "zero3") for r in (1, 2) for m in ("1024", "auto"))
COMPARED = ("train/loss", "train/grad_norm")


def free_port() -> int:
    """A free TCP port, so that launchers started one after the other never meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(backend: str, ranks: int, tree: Path = ROOT) -> list[str]:
    """How a user starts this many ranks of this backend; `tree` must also be in PYTHONPATH."""
    scripts, train = Path(sys.executable).parent, str(tree / "dsft" / "train.py")
    if ranks == 1:
        return [sys.executable, train]
    if backend == "zero3":
        return [str(scripts / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), train]
    return [str(scripts / "torchrun"), "--standalone", "--nproc_per_node", str(ranks), train]


def run_arm(arm: str, flags: list[str], output: Path, tree: Path) -> list[dict[str, Any]]:
    """Train one arm and return its steps."""
    backend, ranks, tokens, *fold = arm.split(":")
    own = ["--backend", backend, "--output_dir", str(output)]
    if tokens != "auto":
        own += ["--max_tokens_per_micro_batch", tokens]
    if fold:
        own += ["--fold", *fold]
    started, words = time.monotonic(), [*command(backend, int(ranks), tree), *own, *flags]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {arm} of {tree} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{output.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "train/loss" in line]


def differences(ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[float]:
    """The largest relative difference of each step."""
    if len(ours) != len(reference):
        sys.exit(f"error: an arm has {len(ours)} steps instead of {len(reference)}")
    pairs = zip(ours, reference, strict=True)
    return [max(abs(line[key] - other[key]) / abs(other[key]) for key in COMPARED) for line, other in pairs]


def main() -> None:
    """Run all arms, print the table, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_text = (
        "comma-separated backend:ranks:tokens[:fold], where tokens is max_tokens_per_micro_batch or auto, and fold "
    )
    help_text += "is batch (the default) or off (default: both backends, 1 and 2 ranks, 1024 tokens and auto)"
    parser.add_argument("--arms", default=DEFAULT_ARMS, help=help_text)
    help_text = "another checkout of dsft: trains every arm with it as well, and compares the two"
    parser.add_argument("--other_tree", type=Path, help=help_text)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (%(default)s)")
    parser.add_argument("--json", help="write the table as JSON to this file")
    parser.add_argument("--work_dir", help="keeps the runs (default: a temporary folder)")
    options, flags = parser.parse_known_args()
    folder = Path(options.work_dir or tempfile.mkdtemp(prefix="dsft-compare-"))
    runs, others = {}, {}
    for arm in options.arms.split(","):
        name = arm.replace(":", "-")
        runs[arm] = run_arm(arm, flags, folder / name, ROOT)
        if options.other_tree is not None:
            others[arm] = run_arm(arm, flags, folder / f"{name}-other", options.other_tree.resolve())
    reference, worst = next(iter(runs.values())), 0.0
    print(f"{'backend:ranks:tokens':<20} {'step':>4} {'train/loss':>14} {'train/grad_norm':>16} {'relative':>10}")
    for arm, lines in runs.items():
        for line, relative in zip(lines, differences(lines, reference), strict=True):
            worst = max(worst, relative)
            loss, norm = line["train/loss"], line["train/grad_norm"]
            print(f"{arm:<20} {line['step']:>4} {loss:>14.8f} {norm:>16.8f} {relative:>10.1e}")
    for arm, lines in others.items():
        largest = max(differences(runs[arm], lines))
        worst = max(worst, largest)
        print(f"{arm:<20} beside {options.other_tree}: {f'{largest:.1e}' if largest else 'bit for bit equal'}")
    verdict = "equal" if worst <= options.tolerance else "DIFFERENT"
    print(f"{verdict}: largest relative difference {worst:.1e}, tolerance {options.tolerance:g}")
    if options.json:
        table = {"tolerance": options.tolerance, "worst": worst, "flags": flags, "runs": runs, "other_tree": others}
        Path(options.json).write_text(json.dumps(table, indent=2), encoding="utf-8")
    sys.exit(worst > options.tolerance)


if __name__ == "__main__":
    main()
