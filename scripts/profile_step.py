#!/usr/bin/env python
"""Where an optimizer step's time goes: the third step of a run under torch's profiler.

    torchrun --standalone --nproc_per_node 2 scripts/profile_step.py --backend fsdp --train_files … --output_dir out

Takes every flag of dsft.train. Prints processor seconds and clock of three steps of each rank (the third is profiled),
then the operators of rank 0 by their own time. Nothing is saved.
"""

import os
import sys
import time

from torch.profiler import ProfilerActivity, profile

from dsft.cli import parse
from dsft.config import TrainConfig
from dsft.distributed import runtime

STEPS = 3


def main() -> None:
    """Run, print, end without a checkpoint."""
    if "--help" in sys.argv:
        print(__doc__)
        return
    from dsft.training.trainer import Trainer

    trainer = Trainer(parse(TrainConfig, sys.argv[1:]))
    with runtime.StopSignals() as stop:
        for step in range(STEPS):
            profiler = profile(activities=[ProfilerActivity.CPU]) if step == STEPS - 1 else None
            if profiler is not None:
                profiler.start()
            processor, clock = time.process_time(), time.perf_counter()
            trainer._step(stop)
            processor, clock = time.process_time() - processor, time.perf_counter() - clock
            if profiler is not None:
                profiler.stop()
            print(f"rank {trainer.world.rank} step {step + 1}: {processor:.1f} CPU s, {clock:.1f} s", flush=True)
    if profiler is not None and trainer.world.is_main:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
