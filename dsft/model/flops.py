"""Floating-point operations of a model's forward and backward pass.

By convention a multiply-add counts as two. A frozen weight costs 4 per token (2 forward, 2 for the gradient of its
input), a trained one 6 (2 more for its own gradient). Linear layers and the matrix products of attention are counted;
embeddings, norms, activations and recomputation are not, nor are the experts of a mixture-of-experts model, which are
not nn.Linear.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a forward and backward pass."""

    token: float  # per computed token
    pair: float  # per pair of tokens of which one attends to the other
    target: float  # per target, in the output head

    def of(self, tokens: np.ndarray | float, pairs: np.ndarray | float, targets: np.ndarray | float) -> np.ndarray:
        return np.asarray(self.token * tokens + self.pair * pairs + self.target * targets)


def count_flops(model: nn.Module, shape: Callable[[nn.Parameter], tuple[int, ...]]) -> Cost:
    """Cost of a model, wrapped in LoRA or not, sharded or not; `shape` gives the full shape of a parameter."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    per_token = per_target = 0.0
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight: Any = module.weight
            flops = prod(shape(weight), start=6.0 if weight.requires_grad else 4.0)
            if module is head:
                per_target += flops
            else:
                per_token += flops
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    heads = getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    per_pair = 12.0 * heads * size * config.num_hidden_layers  # two products, forward once and backward twice
    return Cost(per_token, per_pair, per_target)


def measure_matmul(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a matrix product on this device with the threads of this rank, the best of a few runs."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
