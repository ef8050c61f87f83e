#!/usr/bin/env python
"""What saving a LoRA checkpoint costs, and what travels between the ranks for it.

    python scripts/bench_checkpoint.py [--rows 91] [--steps 9] [--backends fsdp,zero3] [--saves waiting,background]
        [--model smollm2-135m] [--json table.json]

Two ranks train a model with the default LoRA on one batch again and again, and save after every second step: once
waiting, once in the background. The cost of a save is what it keeps the training waiting, and how much longer the next
step takes than the others of the same run. The bytes are what the system counts on the loopback interface from before a
waiting save to its end; run nothing else meanwhile.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNTED = "loopback bytes of a save: "
LEFT_OUT = 2  # steps at the start


def train() -> None:
    """A rank: dsft.train, with the interface's counter read around each save that waits."""
    import psutil
    import torch.distributed as dist

    from dsft.checkpointing.saving import Checkpointer
    from dsft.train import main

    save = Checkpointer.save

    def counted(self: Checkpointer, snapshot: Any) -> None:
        dist.barrier()
        before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        save(self, snapshot)
        sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
        if dist.get_rank() == 0:
            print(f"{COUNTED}{sent}", file=sys.stderr, flush=True)

    if sys.argv[-1] != "True":  # --async_save
        Checkpointer.save = counted  # type: ignore[method-assign]
    sys.argv.remove("--worker")
    main()


def measure(backend: str, in_background: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One run of two ranks."""
    with tempfile.TemporaryDirectory(prefix="dsft-bench-") as folder:
        words = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2", __file__]
        words += ["--worker", "--backend", backend, "--model", options.model, "--output_dir", f"{folder}/out"]
        words += ["--train_files", options.train_files, "--max_train_rows", str(options.rows), "--fold", "batch"]
        words += ["--train_batch_size", str(options.rows), "--total_training_steps", str(options.steps)]
        words += ["--save_steps", "2", "--max_checkpoints", "1", "--async_save", str(in_background)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: a run failed: {done.stderr[-2000:]}")
        lines = (Path(folder) / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        latest = Path(folder) / "out" / "latest"
        written = sum((latest / f"{stem}.safetensors").stat().st_size for stem in ("adapter_model", "optimizer"))
    travelled = [int(line[len(COUNTED) :]) for line in done.stderr.splitlines() if line.startswith(COUNTED)]
    kept = [step for step in steps if step["step"] > LEFT_OUT]
    after = [step for step in kept if step["step"] % 2]  # saved just before
    plain = statistics.median(step["train/step_seconds"] for step in kept if step["step"] % 2 == 0)
    waits = statistics.median(step["train/save_seconds"] for step in after)
    slower = statistics.median(step["train/step_seconds"] for step in after) - plain
    return {
        "backend": backend, "in_background": in_background, "step_seconds": plain, "waits_seconds": waits,
        "next_step_longer_seconds": slower, "cost_of_a_step": (waits + slower) / plain, "written_bytes": written,
        "travelled_bytes": statistics.median(travelled) if travelled else None,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    if "--worker" in sys.argv:
        train()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=91)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--backends", default="fsdp,zero3")
    parser.add_argument("--saves", default="waiting,background")
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--train_files", default="data/sample_train.parquet")
    parser.add_argument("--json")
    options = parser.parse_args()
    print(" backend        saves  step s  waits s  next step s  cost of a step  written MB  travelled MB")
    table = []
    for backend in options.backends.split(","):
        for saves in options.saves.split(","):
            row = measure(backend, saves == "background", options)
            table.append(row)
            travelled = "-" if row["travelled_bytes"] is None else f"{row['travelled_bytes'] / 1e6:.1f}"
            waits = (
                f"{row['waits_seconds']:>8.3f} {row['next_step_longer_seconds']:>+12.3f} {row['cost_of_a_step']:>15.1%}"
            )
            bytes_text = f"{row['written_bytes'] / 1e6:>11.1f} {travelled:>13}"
            print(f"{backend:>8} {saves:>12} {row['step_seconds']:>7.2f} {waits} {bytes_text}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
