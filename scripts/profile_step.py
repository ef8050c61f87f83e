#!/usr/bin/env python
"""Profile an optimizer step: the third step of a run under torch's profiler.

    torchrun --standalone --nproc_per_node 2 scripts/profile_step.py --backend fsdp --train_files … --output_dir out

Takes every flag of dsft.train. Prints CPU and wall-clock seconds of three steps of each rank (the third is profiled),
then the operators of rank 0 by their own time. Saves no checkpoint.
"""

import os
import sys
import time

from torch.profiler import ProfilerActivity, profile

from dsft.cli import parse
from dsft.config import TrainConfig

STEPS = 3


def main() -> None:
    """Train three steps, each measured from the end of the one before, and exit."""
    if "--help" in sys.argv:
        print(__doc__)
        return
    from dsft.training.trainer import Trainer

    trainer = Trainer(parse(TrainConfig, sys.argv[1:]))
    take_step, rank, profiler = trainer.backend.step, trainer.world.rank, profile(activities=[ProfilerActivity.CPU])
    done, processor, clock = 0, time.process_time(), time.perf_counter()

    def step() -> float:
        nonlocal done, processor, clock
        norm, done = take_step(), done + 1
        spent = f"{time.process_time() - processor:.1f} CPU s, {time.perf_counter() - clock:.1f} s"
        print(f"rank {rank} step {done}: {spent}", flush=True)
        if done == STEPS:
            profiler.stop()
            if rank == 0:
                print(profiler.key_averages().table("self_cpu_time_total", row_limit=40, max_name_column_width=60))
            sys.stdout.flush()
            os._exit(0)
        if done == STEPS - 1:
            profiler.start()
        processor, clock = time.process_time(), time.perf_counter()
        return norm

    trainer.backend.step = step
    trainer.train()


if __name__ == "__main__":
    main()
