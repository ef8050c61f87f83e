"""The learning rate over the steps of a run."""

import math
from typing import Literal


def learning_rate_factor(
    step: int, warmup: int, total: int, schedule: Literal["cosine", "linear", "constant"], min_ratio: float
) -> float:
    """Share of the peak rate at optimizer step `step` (0-based).

    The warmup rises linearly and reaches the peak at its last step; the first step already moves. After it,
    cosine and linear fall to `min_ratio` where step `total` would be (Loshchilov and Hutter 2017, equation 5,
    without restarts).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "constant":
        return 1.0
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * fall
