#!/usr/bin/env python
"""Draws what folding does to the rows of one dialogue: docs/folding-light.svg and docs/folding-dark.svg.

python scripts/draw_folding.py [rows.parquet]
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np

from dsft.config import TrainConfig
from dsft.dataset.folding import shared_prefixes
from dsft.dataset.tokens import TokenDataset, load_dataset
from dsft.model.embedded import embedded_model
from dsft.model.source import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
COLORS = {  # text, read only, learned, shared
    "light": ("#1f2328", "#9aa4af", "#1a7f37", "#e6e9ec"),
    "dark": ("#e6edf3", "#6e7681", "#3fb950", "#21262d"),
}


def longest_dialogue(data: TokenDataset) -> np.ndarray:
    """The rows of the dialogue with most of them, sorted so that neighbours share beginnings."""
    numbers, counts = np.unique(data.dialogue, return_counts=True)
    rows = np.flatnonzero(data.dialogue == numbers[np.argmax(counts)])
    return rows[np.argsort(data.sorted_place[rows])]


def draw(rows: list[tuple[np.ndarray, np.ndarray]], theme: str, path: Path) -> None:
    """Two panels: every row by itself, and every token computed once."""
    from matplotlib import pyplot

    text, read, learned, shared = COLORS[theme]
    starts = shared_prefixes([tokens for tokens, _ in rows]).tolist()
    pyplot.rcParams.update({"svg.hashsalt": "dsft", "svg.fonttype": "none", "text.color": text, "font.size": 11})
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 2.9), sharex=True, sharey=True, layout="constrained")
    whole = sum(len(tokens) for tokens, _ in rows)
    computed = whole - sum(starts)
    titles = (f"Row by row: {whole:,} tokens", f"Folded: {computed:,} tokens, same loss and gradient")
    for panel, title, firsts in zip(panels, titles, ([0] * len(rows), starts), strict=True):
        for y, ((_, is_target), first) in enumerate(zip(rows, firsts, strict=True)):
            edges = [first, *(np.flatnonzero(np.diff(is_target[first:].astype(int))) + first + 1), len(is_target)]
            panel.broken_barh([(0, first)], (y - 0.35, 0.7), color=shared)
            for left, right in pairwise(edges):
                panel.broken_barh([(left, right - left)], (y - 0.35, 0.7), color=learned if is_target[left] else read)
        panel.set_title(title, loc="left", fontsize=11)
        panel.axis("off")
    panels[0].invert_yaxis()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Both figures."""
    matplotlib.use("svg")
    file = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "data" / "sample_train.parquet")
    tokenizer = load_tokenizer(str(embedded_model()), trust_remote_code=False)
    flags = TrainConfig(model="smollm2-135m", train_files=[file], output_dir="out")
    data = load_dataset([file], "train_files", tokenizer, flags)
    rows = [data[row] for row in longest_dialogue(data)]
    for theme in COLORS:
        draw(rows, theme, ROOT / "docs" / f"folding-{theme}.svg")


if __name__ == "__main__":
    main()
