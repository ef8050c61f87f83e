#!/usr/bin/env python
"""Peak memory and time of one forward and backward on CPU, with and without returning freed blocks to the system.

    python scripts/bench_memory.py [--lengths 300,1500] [--rows 4] [--repeats 2] [--model smollm2-135m]
        [--json table.json]

Each cell is a process of its own: the model in float32, LoRA 16 on all linear layers, one micro-batch of
random tokens, 80 targets a row. The columns are repeated in turn, so that a noisy machine hits both alike.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

TARGETS = 80


def measure(name: str, length: int, rows: int, returns: bool) -> dict:
    """One forward and backward in this process."""
    import numpy as np
    import torch

    from dsft.dataset.folding import fold
    from dsft.dataset.micro_batches import padded
    from dsft.distributed import runtime
    from dsft.loss import TargetHead, summed_loss
    from dsft.model.lora import LoraOptions, add_lora
    from dsft.model.source import ModelSource, resolve_model

    runtime.silence_libraries()
    if returns:
        runtime.return_freed_memory()
    model = ModelSource(resolve_model(name)).pretrained(torch.float32)
    wrapped = add_lora(model, LoraOptions(16, 32, 0, ["all-linear"], False, False), name).train()
    head = TargetHead(wrapped)
    tokens = np.random.default_rng(0).integers(0, 40_000, (rows, length), dtype=np.int32)
    batch = padded([fold([(row, np.arange(length) >= length - TARGETS)]) for row in tokens], 0)
    started = time.perf_counter()
    summed_loss(wrapped, head, batch).backward()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_gib": runtime.peak_memory_gib(torch.device("cpu"))}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="300,1500")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--json")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        length, returns = options.cell.split(":")
        print(json.dumps(measure(options.model, int(length), options.rows, returns == "1")))
        return
    table = []
    print(f"{'rows x tokens':>14} {'freed blocks':>14} {'peak GiB':>9} {'seconds':>8}")
    for length in map(int, options.lengths.split(",")):
        for repeat in range(options.repeats):
            for returns in (False, True):
                words = [sys.executable, __file__, "--model", options.model, "--rows", str(options.rows)]
                words += ["--cell", f"{length}:{int(returns)}"]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                cell = json.loads(done.stdout.splitlines()[-1])
                table.append({"rows": options.rows, "length": length, "returns": returns, "repeat": repeat, **cell})
                kind = "returned" if returns else "kept"
                size = f"{options.rows} x {length}"
                print(f"{size:>14} {kind:>14} {cell['peak_gib']:>9.2f} {cell['seconds']:>8.2f}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
