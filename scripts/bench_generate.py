#!/usr/bin/env python
"""Time of `python -m dsft.generate`, whole processes from start to end, on all cores and on one.

    python scripts/bench_generate.py [--cases PATTERN] [--levels 1000,100] [--repeats 3] [--json table.json]

The repeats go round the cases, so that a noisy machine hits all alike; the table has the fastest and the slowest.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "sokoban 6x6, 1 box": "--env sokoban",
    "sokoban 10x10, 3 boxes": "--env sokoban --dim_x 10 --dim_y 10 --num_boxes 3",
    "sokoban 10x10, 4 boxes": "--env sokoban --dim_x 10 --dim_y 10 --num_boxes 4",
    "frozenlake 4x4": "--env frozenlake",
    "frozenlake 8x8": "--env frozenlake --size 8",
    "frozenlake 4x4, slippery": "--env frozenlake --is_slippery",
}


def measure(flags: str, processes: int | None, train_size: int, test_size: int) -> tuple[float, int]:
    """Seconds of a whole process, and the rows it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "dsft.generate", *flags.split(), "--output_dir", f"{folder}/data"]
        words += ["--train_size", str(train_size), "--test_size", str(test_size)]
        words += ["--num_processes", str(processes)] if processes else []
        started = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        return seconds, sum(json.loads(Path(folder, "data/generate.json").read_text())["rows"].values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="a pattern: only cases in whose names it is found")
    parser.add_argument("--levels", default="1000,100", help="how many of train and of test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    train_size, test_size = map(int, arguments.levels.split(","))
    names = [name for name in CASES if re.search(arguments.cases, name)]
    arms = [(name, processes) for name in names for processes in (None, 1)]
    seconds: dict[tuple[str, int | None], list[float]] = {arm: [] for arm in arms}
    rows: dict[str, int] = {}
    for _ in range(arguments.repeats):
        for name, processes in arms:
            took, rows[name] = measure(CASES[name], processes, train_size, test_size)
            seconds[name, processes].append(took)
    print(f"| levels ({train_size} + {test_size}) | processes | rows | fastest s | slowest s | levels/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, processes), took in seconds.items():
        count = processes or "all cores"
        rate = (train_size + test_size) / min(took)
        print(f"| {name} | {count} | {rows[name]} | {min(took):.2f} | {max(took):.2f} | {rate:.0f} |")
    if arguments.json:
        keys = ("case", "processes", "rows", "seconds")
        table = [dict(zip(keys, (*arm, rows[arm[0]], took), strict=True)) for arm, took in seconds.items()]
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
