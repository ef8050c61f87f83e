#!/usr/bin/env python
"""Peak memory and processor time of forward and backward passes on CPU with three settings of glibc's malloc.

    python scripts/bench_memory.py [--lengths 300,1500] [--rows 2] [--model smollm2-135m]

The settings are glibc's own, blocks of 8 MiB returned to the system when they are freed, and that with a compact heap
(dsft.processes.restart_with_compact_heap), as training has it. Each cell is a process of its own with one thread: the
model in float32, LoRA 16 on all linear layers, one micro-batch of random tokens with 80 targets per row.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from dsft.processes import COMPACT_HEAP

TARGETS, PASSES = 80, 4
SETTINGS = ("glibc", "returned", "compact")


def measure(name: str, length: int, rows: int, setting: str) -> dict:
    """Some passes in this process."""
    import numpy as np
    import torch

    from dsft.dataset.folding import fold
    from dsft.dataset.micro_batches import padded
    from dsft.distributed import runtime
    from dsft.loss import TargetHead, summed_loss
    from dsft.model.lora import LoraOptions, add_lora
    from dsft.model.source import ModelSource, resolve_model

    runtime.silence_libraries()
    torch.set_num_threads(1)
    if setting != "glibc":
        runtime.return_freed_memory()
    model = ModelSource(resolve_model(name)).pretrained(torch.float32)
    wrapped = add_lora(model, LoraOptions(16, 32, 0, ["all-linear"], False, False), name).train()
    head = TargetHead(wrapped)
    tokens = np.random.default_rng(0).integers(0, 40_000, (rows, length), dtype=np.int32)
    batch = padded([fold([(row, np.arange(length) >= length - TARGETS)]) for row in tokens], 0)
    started = time.process_time()
    for _ in range(PASSES):
        summed_loss(wrapped, head, batch).backward()
    seconds = (time.process_time() - started) / PASSES
    return {"seconds": seconds, "peak_gib": runtime.peak_memory_gib(torch.device("cpu"))}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="300,1500")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        length, setting = options.cell.split(":")
        print(json.dumps(measure(options.model, int(length), options.rows, setting)))
        return
    print("| rows x tokens | malloc | peak GiB | s per pass |\n| --- | --- | --- | --- |")
    for length in options.lengths.split(","):
        for setting in SETTINGS:
            words = [sys.executable, __file__, "--cell", f"{length}:{setting}", *sys.argv[1:]]
            env = os.environ | {"GLIBC_TUNABLES": COMPACT_HEAP if setting == "compact" else ""}
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=env)
            cell = json.loads(done.stdout.splitlines()[-1])
            print(f"| {options.rows} x {length} | {setting} | {cell['peak_gib']:.2f} | {cell['seconds']:.2f} |")


if __name__ == "__main__":
    main()
