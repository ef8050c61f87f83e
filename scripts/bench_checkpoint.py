#!/usr/bin/env python
"""What saving a LoRA checkpoint costs, and what travels between the ranks for it.

    python scripts/bench_checkpoint.py [--rows 91] [--steps 9] [--backends fsdp,zero3] [--saves waiting,background]
        [--model smollm2-135m] [--json table.json]

Two ranks train a model with the default LoRA on one batch again and again, and save after every second step: once
waiting, once in the background. The cost of a save is what it keeps the training waiting, and how much longer the next
step takes than the others of the same run. The bytes are what the system counts on the loopback interface from before a
waiting save to its end, beside the sizes of what is trained and of what is frozen; run nothing else meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNTED = "loopback bytes of a save: "
LEFT_OUT = 2  # steps at the start


def train(words: list[str]) -> None:
    """A rank: dsft.train, with the interface's counter read around each save that waits."""
    import psutil
    import torch.distributed as dist

    from dsft.checkpointing.saving import Checkpointer
    from dsft.cli import parse
    from dsft.config import TrainConfig
    from dsft.training.trainer import Trainer

    save = Checkpointer.save

    def counted(self: Checkpointer, snapshot: Any) -> None:
        dist.barrier()
        before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        save(self, snapshot)
        sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
        if dist.get_rank() == 0:
            sys.stderr.write(f"{COUNTED}{sent}\n")

    config = parse(TrainConfig, words)
    if not config.async_save:
        Checkpointer.save = counted  # type: ignore[method-assign]
    trainer = Trainer(config)
    if trainer.world.is_main:
        sizes = {True: 0, False: 0}
        for parameter in trainer.model.parameters():
            count = 1
            for length in trainer.backend.shape(parameter):
                count *= length
            sizes[parameter.requires_grad] += count
        print(json.dumps({"trained": sizes[True], "frozen": sizes[False]}), file=sys.stderr, flush=True)
    trainer.train()
    sys.stderr.flush()
    os._exit(0)


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
    lines = done.stderr.splitlines()
    sizes = next(json.loads(line) for line in lines if line.startswith('{"trained"'))
    travelled = [int(line[len(COUNTED) :]) for line in lines if line.startswith(COUNTED)]
    kept = [step for step in steps if step["step"] > LEFT_OUT]
    after = [step for step in kept if step["step"] % 2]  # saved just before
    plain = statistics.median(step["train/step_seconds"] for step in kept if step["step"] % 2 == 0)
    waits = statistics.median(step["train/save_seconds"] for step in after)
    slower = statistics.median(step["train/step_seconds"] for step in after) - plain
    return {
        "backend": backend,
        "in_background": in_background,
        "step_seconds": plain,
        "waits_seconds": waits,
        "next_step_longer_seconds": slower,
        "cost_of_a_step": (waits + slower) / plain,
        "written_bytes": written,
        "travelled_bytes": statistics.median(travelled) if travelled else None,
        "trained_bytes": 4 * sizes["trained"],
        "frozen_parameters": sizes["frozen"],
    }


def main() -> None:
    """Print the table."""
    if "--worker" in sys.argv:
        train(sys.argv[sys.argv.index("--worker") + 1 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=91)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--backends", default="fsdp,zero3")
    parser.add_argument("--saves", default="waiting,background")
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--train_files", default="data/sample_train.parquet")
    parser.add_argument("--json")
    options = parser.parse_args()
    print(
        f"{'backend':>8} {'saves':>12} {'step s':>7} {'waits s':>8} {'next step s':>12} {'cost of a step':>15} "
        f"{'written MB':>11} {'travelled MB':>13} {'trained MB':>11} {'frozen MB':>10}"
    )
    table = []
    for backend in options.backends.split(","):
        for saves in options.saves.split(","):
            row = measure(backend, saves == "background", options)
            table.append(row)
            travelled = row["travelled_bytes"]
            print(
                f"{backend:>8} {saves:>12} {row['step_seconds']:>7.2f} "
                f"{row['waits_seconds']:>8.3f} {row['next_step_longer_seconds']:>+12.3f} "
                f"{row['cost_of_a_step']:>15.1%} {row['written_bytes'] / 1e6:>11.1f} "
                f"{'-' if travelled is None else f'{travelled / 1e6:.1f}':>13} {row['trained_bytes'] / 1e6:>11.1f} "
                f"{2 * row['frozen_parameters'] / 1e6:>10.1f}",
                flush=True,
            )
    print("frozen MB: in bfloat16. trained MB: the weights alone, in float32; the moments are twice as much.")
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
