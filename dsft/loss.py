"""Masked cross-entropy, as with labels of -100 (ignore_index), but computing logits at the targets only.

Instead of a loss mask over all logits, a MicroBatch lists its targets: `logit_positions`, `labels`, `loss_weights`. The
output head and the cross-entropy run on those together, in chunks (fused linear cross-entropy), so the logits of a
whole micro-batch never exist. The loss is a weighted sum; the Trainer divides by the weights of the global batch.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dsft.config.train import VAL_LOSS
from dsft.dataset.micro_batches import MicroBatch, MicroBatches, Plan
from dsft.distributed import runtime

LOGITS_AT_ONCE = 2**25  # float32 elements: 128 MiB, whatever the vocabulary
SCALED_LOGITS = (
    "final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "logits_soft_cap",
    "output_logit_soft_cap", "output_multiplier", "unpadded_vocab_size",
)  # fmt: skip
"""Config settings of models that change the logits after the head (Gemma 2, Granite, Cohere, Falcon H1, …)."""


class TargetHead:
    """Makes a model's output head compute the loss, at the target positions only.

    Only 11.5 % of the tokens of the medical dataset are targets, and the head does a fifth of the small model's
    multiplications. A hook before the head selects the positions from the flattened [sequences * length]. If the logits
    are the head's output unchanged (`is_chunked`), the head's forward returns the summed loss instead, computed in
    chunks. That happens within the head's own call, where a sharding library has gathered its weight.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._batch: MicroBatch | None = None
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.register_forward_pre_hook(self._select)
        config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        settings = [getattr(config, name, None) for name in SCALED_LOGITS]
        self.is_chunked = type(head) is torch.nn.Linear and all(value in (None, 1) for value in settings)
        self._is_neutral = 1 in settings  # the model multiplies or divides by 1
        self._layers: int = config.num_hidden_layers
        self._checked = False
        self.losses = torch.empty(0)
        """Negative log-likelihood of each target of the last micro-batch, float32 [targets]."""
        self._loss: torch.Tensor | None = None
        if self.is_chunked:
            plain_forward = head.forward

            def forward(hidden: torch.Tensor) -> torch.Tensor:
                batch = self._batch
                if batch is None or not self.is_chunked:
                    return plain_forward(hidden)
                self._loss, self.losses = ChunkedLoss.apply(
                    hidden[0], head.weight, head.bias, batch.labels, batch.loss_weights
                )
                return self._loss

            head.forward = forward

    def _select(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._batch is None:
            return None
        hidden = inputs[0]
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, self._batch.logit_positions], *inputs[1:])

    @contextmanager
    def computing(self, batch: MicroBatch) -> Iterator[None]:
        """Within this, the model's "logits" are the summed loss, or [1, targets, vocabulary] unless `is_chunked`."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def check(self, batch: MicroBatch, output: torch.Tensor) -> bool:
        """After the first forward: whether the model has computed what it should.

        A model that changes its logits in a way unknown to SCALED_LOGITS has changed the loss. If it has not, `output`
        shares its memory with the head's own result, however a library has wrapped it.

        Returns:
            False if the loss must be computed again, no longer in chunks.

        Raises:
            UserError: on every rank: attention has ignored the tree.
        """
        loss, self._loss = self._loss, None
        if self._checked:
            return True
        self._checked = True
        if batch.tree is not None:
            batch.tree.check_use(self._layers)
        self.is_chunked = loss is not None and (self._is_neutral or loss.data_ptr() == output.data_ptr())
        return loss is None or self.is_chunked


def summed_loss(model: torch.nn.Module, head: TargetHead, batch: MicroBatch) -> torch.Tensor:
    """Summed negative log-likelihood of the targets, each times its weight, a float32 scalar."""
    structure = {} if batch.tree is None else {"position_ids": batch.position_ids, "tree": batch.tree}
    with head.computing(batch):
        output = model(input_ids=batch.input_ids, use_cache=False, **structure).logits
    if not head.check(batch, output):
        return summed_loss(model, head, batch)
    if head.is_chunked:
        return output
    losses = F.cross_entropy(output[0].float(), batch.labels, reduction="none")
    head.losses = losses.detach()
    return (losses * batch.loss_weights).sum()


def source_losses(head: TargetHead, batch: MicroBatch) -> torch.Tensor:
    """The summed loss of each source's targets, after `summed_loss` of the same micro-batch: float64 [sources]."""
    return head.losses.double() @ batch.source_weights.double()


class ChunkedLoss(torch.autograd.Function):
    """Output head and cross-entropy in one; forward computes the gradient too, while it has a chunk's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        loss_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss (float32 scalar) of hidden [targets, hidden size] and weight [vocabulary, hidden size].

        And, without a gradient, the loss of each target: float32 [targets].
        """
        needs = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        chunk = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            log_likelihoods = F.log_softmax(F.linear(hidden[rows], weight, bias), dim=-1, dtype=torch.float32)
            losses[rows] = -log_likelihoods.gather(1, labels[rows, None]).squeeze(1)
            if not any(needs):
                continue
            slopes = log_likelihoods.exp_()  # the probabilities, less one at the label
            slopes.scatter_add_(1, labels[rows, None], slopes.new_full((len(slopes), 1), -1.0))
            slopes.mul_(loss_weights[rows, None])
            if bias_gradient is not None:
                bias_gradient += slopes.sum(dim=0)
            slopes = slopes.to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = slopes @ weight
            if weight_gradient is not None:
                weight_gradient += slopes.T @ hidden[rows]
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The stored gradients times that of the loss."""
        gradients = [
            None if gradient is None else (gradient * outer[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None)


@torch.no_grad()
def validation_losses(
    model: Any,
    head: TargetHead,
    micro_batches: MicroBatches,
    world: runtime.World,
    device: torch.device,
    *,
    show_progress: bool = False,
) -> dict[str, float]:
    """Weighted mean negative log-likelihood of all targets, the same on all ranks, by name: val/loss, and val/loss/NAME
    of each named source that has targets.

    Values may be inf or nan. Each is a sum over the sum of weights, so independent of micro-batches and the number of
    ranks. Collective.
    """
    plan = micro_batches.plan(np.arange(micro_batches.rows))
    sums = torch.zeros(len(micro_batches.sources), dtype=torch.float64, device=device)
    for part in tqdm(plan.parts[world.rank], desc="loss", unit=" batches", disable=None if show_progress else True):
        batch = micro_batches.make(part).to(device)
        summed_loss(model, head, batch)
        sums += source_losses(head, batch)
    return mean_losses(VAL_LOSS, micro_batches.sources, runtime.sum_over_ranks(sums.tolist(), device), plan)


def mean_losses(name: str, sources: Sequence[str], sums: Sequence[float], plan: Plan) -> dict[str, float]:
    """The mean loss of a global batch as `name`, and as name/SOURCE that of each named source with targets in it."""
    means = {name: sum(sums) / plan.weight}
    for source, total, weight in zip(sources, sums, plan.source_weights.tolist(), strict=True):
        if source and weight:
            means[f"{name}/{source}"] = total / weight
    return means


def perplexity(loss: float) -> float:
    """Of a mean loss per token."""
    return math.exp(loss) if loss < 700 else math.inf
