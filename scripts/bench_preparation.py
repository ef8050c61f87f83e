#!/usr/bin/env python
"""Seconds and peak resident memory of preparing rows, by this checkout and perhaps others, and of finding them again.

    python scripts/bench_preparation.py --train_files FILE [--max_rows N] [--trees ../dsft-old] [--json FILE]

Each tree prepares the rows twice, in processes of its own and with an empty cache folder at first: the second time they
are in the cache. The embedded model's tokenizer is used, and rows may have 8,192 tokens. Imports are not counted.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKER = """
import json, resource, sys, time
from dsft.config.flags import RowFlags
from dsft.dataset.tokens import load_dataset
from dsft.model.embedded import embedded_model
from dsft.model.source import load_tokenizer

def main():
    tokenizer = load_tokenizer(sys.argv[3], trust_remote_code=False)
    started = time.perf_counter()
    rows = int(sys.argv[2]) or None
    data = load_dataset([sys.argv[1]], "train_files", tokenizer, RowFlags(max_length=8192), max_rows=rows)
    seconds = time.perf_counter() - started
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"rows": len(data), "tokens": data.counts.tokens, "seconds": seconds, "peak_mb": max(peaks)}))

if __name__ == "__main__":
    main()
"""


def prepare(tree: Path, file: str, rows: int, model: str, folder: Path) -> dict[str, Any]:
    """Once, with a cache in `folder`."""
    worker = folder / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tree), "DSFT_CACHE": str(folder / "cache")}
    command = [sys.executable, worker, file, rows, model]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {tree}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--train_files", required=True)
    parser.add_argument("--max_rows", type=int, default=0, help="the first N (default: all)")
    parser.add_argument("--trees", default="", help="other checkouts, comma-separated")
    parser.add_argument("--json", help="write the table as JSON to this file")
    words = parser.parse_args()
    # Not imported: a process begins with the peak memory of the one that starts it.
    asked = subprocess.run([sys.executable, "-m", "dsft.model.embedded"], cwd=ROOT, capture_output=True, text=True)
    file, model, table = str(Path(words.train_files).resolve()), asked.stdout.strip(), []
    for tree in [ROOT, *(Path(name).resolve() for name in words.trees.split(",") if name)]:
        with tempfile.TemporaryDirectory() as folder:
            for what in ("prepared", "from the cache"):
                row = {"tree": tree.name, "what": what, **prepare(tree, file, words.max_rows, model, Path(folder))}
                table.append(row)
                print(f"{row['tree']}, {what}: {row['rows']:,} rows, {row['tokens']:,} tokens in "
                      f"{row['seconds']:.1f} s, {row['peak_mb']:.0f} MB", flush=True)  # fmt: skip
    first, *others = [row["seconds"] for row in table if row["what"] == "prepared"]
    for row, seconds in zip(words.trees.split(","), others, strict=False):
        print(f"{seconds / first:.2f} times as fast as {row}")
    if words.json:
        Path(words.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
