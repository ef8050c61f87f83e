"""The validation loss: of the Trainer between its steps, and of dsft.validate."""

import math
from typing import Any

import torch
from tqdm import tqdm

from dsft import runtime
from dsft.dataset.batches import spread
from dsft.dataset.tokens import TokenDataset
from dsft.loss import TargetHead, count_targets, make_micro_batch, summed_loss


@torch.no_grad()
def mean_loss(
    model: Any,
    head: TargetHead,
    data: TokenDataset,
    *,
    micro_batch_size: int,
    pad_token: int | None,
    world: runtime.World,
    device: torch.device,
    show_progress: bool = False,
) -> float:
    """Sum over sum, over every row, whatever the micro-batch and the number of ranks. Called on every rank.

    Returns:
        Mean negative log-likelihood of a target, the same on all ranks; it may be infinite or no number.
    """
    plan = spread(data.lengths, world.size, micro_batch_size)[world.rank]
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for members in tqdm(plan, desc="loss", unit=" batches", disable=None if show_progress else True):
        batch = make_micro_batch([data[row] for row in members], pad_token).to(device)
        loss_sum += summed_loss(model, head, batch)
    (total,) = runtime.sum_over_ranks([loss_sum.item()], device)
    return total / sum(count_targets(data[row][1]) for row in range(len(data)))


def loss_metrics(loss: float) -> dict[str, float]:
    """The loss and its perplexity, under the names that metrics and reports have."""
    return {"val/loss": loss, "val/perplexity": math.exp(loss) if loss < 700 else math.inf}
