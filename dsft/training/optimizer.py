"""AdamW and its learning rate over the steps of a run."""

import math
from typing import Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from dsft.config import TrainConfig


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, whose state per value is named in `dsft.backends.base.MOMENTS`."""
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """The learning rate of each step, as --schedule and --warmup_ratio say."""
    warmup = int(config.warmup_ratio * total_steps)
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, warmup, total_steps, config.schedule, config.min_lr_ratio),
    )


def learning_rate_factor(
    step: int, warmup: int, total: int, schedule: Literal["cosine", "linear", "constant"], min_ratio: float
) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based).

    The warmup rises linearly and reaches the peak at its last step; the first step is above 0. After it,
    cosine and linear decay to `min_ratio` at step `total` (Loshchilov and Hutter 2017, equation 5,
    without restarts).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "constant":
        return 1.0
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * decay
