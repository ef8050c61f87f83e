#!/usr/bin/env python
"""Profile an optimizer step: the third step of a run under torch's profiler.

    torchrun --standalone --nproc_per_node 2 scripts/profile_step.py --backend fsdp --train_files … --output_dir out

Takes every flag of dsft.train. Prints CPU and wall-clock seconds of three steps of each rank (the third is profiled),
then the operators of rank 0 by their own time. Saves no checkpoint.
"""

import os
import sys
import time
from functools import cache
from typing import Any

from torch.profiler import ProfilerActivity, profile

from dsft import backends
from dsft.train import main

STEPS = 3


backend_class = backends.backend_class


@cache
def watched(name: str) -> Any:
    """The class of a backend that measures from the end of one step to the end of the next; the first has start-up."""
    backend: Any = backend_class(name)
    take_step, rank, profiler = backend.step, os.environ.get("RANK", "0"), profile(activities=[ProfilerActivity.CPU])
    done, processor, clock = 0, time.process_time(), time.perf_counter()

    def step(self: Any) -> float:
        nonlocal done, processor, clock
        norm, done = take_step(self), done + 1
        spent = f"{time.process_time() - processor:.1f} CPU s, {time.perf_counter() - clock:.1f} s"
        print(f"rank {rank} step {done}: {spent}", flush=True)
        if done == STEPS:
            profiler.stop()
            if rank == "0":
                print(profiler.key_averages().table("self_cpu_time_total", row_limit=40, max_name_column_width=60))
            sys.stdout.flush()
            os._exit(0)
        if done == STEPS - 1:
            profiler.start()
        processor, clock = time.process_time(), time.perf_counter()
        return norm

    backend.step = step
    return backend


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    else:
        backends.backend_class = watched  # before the Trainer is imported
        main()
