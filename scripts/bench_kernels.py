#!/usr/bin/env python
"""The cost of a layer's pieces on CPU, one thread: attention of one block in two ways, a linear layer and its LoRA.

    python scripts/bench_kernels.py [--tokens 300,634,1400] [--json table.json]

Milliseconds, forward + backward, the best of five; the shapes are those of the embedded model.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dsft.model.flops import measure_matmul
from dsft.model.tree_attention import Block, BlockAttention

HEADS, SIZE, HIDDEN, INNER, LORA, ROWS = 9, 64, 576, 1536, 16, 2048


def milliseconds(work: Callable[[], object]) -> float:
    """Best of five, of this process's processor time."""
    best = float("inf")
    for _ in range(6):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return 1000 * best


def attention(tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """One dialogue of so many tokens: torch's fused kernel and dsft's tiles."""
    query, key, value = (torch.randn(HEADS, tokens, SIZE).to(dtype).requires_grad_() for _ in range(3))
    blocks = [Block(0, tokens, (), None)]

    def fused() -> None:
        F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True).sum().backward()

    def tiles() -> None:
        BlockAttention.apply(query[:, None] * SIZE**-0.5, key, value, blocks).sum().backward()

    return {"fused kernel": milliseconds(fused), "tiles": milliseconds(tiles)}


def linear(dtype: torch.dtype) -> dict[str, float]:
    """The up projection: its frozen weight and its LoRA, forward and the gradients that training needs."""
    weight, lora_a, lora_b = (
        torch.randn(rows, columns).to(dtype) for rows, columns in ((INNER, HIDDEN), (LORA, HIDDEN), (INNER, LORA))
    )
    source, low, slope = (torch.randn(ROWS, width).to(dtype) for width in (HIDDEN, LORA, INNER))

    def lora() -> None:
        output = source @ lora_a.t() @ lora_b.t() * 2.0
        output += slope
        low_slope = (slope * 2.0) @ lora_b
        slope.t() @ low  # B's gradient
        low_slope.t() @ source  # A's
        low_slope @ lora_a  # its share of the input's

    return {
        "frozen weight": milliseconds(lambda: (source @ weight.t(), slope @ weight)),
        "LoRA": milliseconds(lora),
        "of it B forward": milliseconds(lambda: low @ lora_b.t()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="300,634,1400", help="of the attended dialogues")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        pieces = {f"attention, {length} tokens": attention(int(length), dtype) for length in options.tokens.split(",")}
        pieces["up projection, 2048 tokens"] = linear(dtype)
        pieces["1024-square product"] = {"GFLOP/s": measure_matmul(dtype, torch.device("cpu")) / 1e9}
        table += [(name, piece, way, value) for piece, ways in pieces.items() for way, value in ways.items()]
    print("| dtype | piece | way | ms |\n| --- | --- | --- | --- |")
    for *cells, value in table:
        print(f"| {' | '.join(cells)} | {value:.1f} |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
