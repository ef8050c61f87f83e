"""The validation loss: of the Trainer between its steps, and of dsft.validate."""

import math
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dsft import runtime
from dsft.dataset.micro_batches import MicroBatches
from dsft.loss import TargetHead, summed_loss


@torch.no_grad()
def mean_loss(
    model: Any,
    head: TargetHead,
    micro_batches: MicroBatches,
    world: runtime.World,
    device: torch.device,
    *,
    show_progress: bool = False,
) -> float:
    """Sum over sum, over every row, whatever the micro-batches and the number of ranks. Called on every rank.

    Returns:
        Mean negative log-likelihood of a target, the same on all ranks; it may be infinite or no number.
    """
    plan = micro_batches.plan(np.arange(micro_batches.rows))
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for part in tqdm(plan.parts[world.rank], desc="loss", unit=" batches", disable=None if show_progress else True):
        loss_sum += summed_loss(model, head, micro_batches.make(part).to(device))
    (total,) = runtime.sum_over_ranks([loss_sum.item()], device)
    return total / plan.targets


def loss_metrics(loss: float) -> dict[str, float]:
    """The loss and its perplexity, under the names that metrics and reports have."""
    return {"val/loss": loss, "val/perplexity": math.exp(loss) if loss < 700 else math.inf}
