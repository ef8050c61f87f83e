"""The masked-response loss, computed inside the model's output head, a part of the targets at a time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dsft.dataset.micro_batches import MicroBatch, MicroBatches
from dsft.distributed import runtime

LOGITS_AT_ONCE = 2**25  # float32 elements: 128 MiB, whatever the vocabulary
SCALED_LOGITS = (
    "final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "logits_soft_cap",
    "output_logit_soft_cap", "output_multiplier", "unpadded_vocab_size",
)  # fmt: skip
"""Settings of models that change the logits after the head (Gemma 2, Granite, Cohere, Falcon H1, …)."""


class TargetHead:
    """Makes a model's output head compute the loss, on the target positions only.

    Only 11.5 % of the tokens of the medical set are targets, and the head is a fifth of the small model's
    multiplications. A hook before the head picks their positions out of the flattened [sequences * length]. Where the
    logits are the head's output as it is, the head's forward is replaced for the time of a loss: it then returns the
    summed loss, and the logits of a long micro-batch never exist at once. That happens inside the head's own call,
    where a sharding library has gathered its weight.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._batch: MicroBatch | None = None
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.register_forward_pre_hook(self._pick)
        config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        settings = [getattr(config, name, None) for name in SCALED_LOGITS]
        self.in_parts = type(head) is torch.nn.Linear and all(value in (None, 1) for value in settings)
        self._is_neutral = 1 in settings  # the model multiplies or divides by 1
        self._layers: int = config.num_hidden_layers
        self._checked = False
        self._loss: torch.Tensor | None = None
        if self.in_parts:
            plain_forward = head.forward

            def forward(hidden: torch.Tensor) -> torch.Tensor:
                if self._batch is None or not self.in_parts:
                    return plain_forward(hidden)
                batch = self._batch
                self._loss = LossInParts.apply(hidden[0], head.weight, head.bias, batch.labels, batch.loss_weights)
                return self._loss

            head.forward = forward

    def _pick(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._batch is None:
            return None
        hidden = inputs[0]
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, self._batch.logit_positions], *inputs[1:])

    @contextmanager
    def computing(self, batch: MicroBatch) -> Iterator[None]:
        """Within this, the model's "logits" are the summed loss, or where not `in_parts` [1, targets, vocabulary]."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def check(self, batch: MicroBatch, output: torch.Tensor) -> bool:
        """After the first forward: whether the model has computed what was asked of it.

        A model that changes its logits in a way that SCALED_LOGITS does not name has changed the loss. One that
        has changed nothing, `output` lies where the head's own result lies, whatever a library has wrapped around it.

        Returns:
            False where the loss must be computed again, no longer `in_parts`.

        Raises:
            UserError: on every rank: attention has not followed the tree.
        """
        loss, self._loss = self._loss, None
        if self._checked:
            return True
        self._checked = True
        if batch.tree is not None:
            batch.tree.check_use(self._layers)
        self.in_parts = loss is not None and (self._is_neutral or loss.data_ptr() == output.data_ptr())
        return loss is None or self.in_parts


def summed_loss(model: torch.nn.Module, head: TargetHead, batch: MicroBatch) -> torch.Tensor:
    """Summed negative log-likelihood of the targets, each times its weight, a float32 scalar."""
    structure = {} if batch.tree is None else {"position_ids": batch.position_ids, "tree": batch.tree}
    with head.computing(batch):
        output = model(input_ids=batch.input_ids, use_cache=False, **structure).logits
    if not head.check(batch, output):
        return summed_loss(model, head, batch)
    if head.in_parts:
        return output
    losses = F.cross_entropy(output[0].float(), batch.labels, reduction="none")
    return (losses * batch.loss_weights).sum()


class LossInParts(torch.autograd.Function):
    """Head and cross-entropy together; the gradient is computed beside the loss, while a part's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The summed loss (float32 scalar).

        Args:
            ctx: autograd's.
            hidden: [targets, hidden size], before the head.
            weight: [vocabulary, hidden size].
            bias: [vocabulary] or None.
            labels: int64 [targets].
            weights: float32 [targets].
        """
        needs = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        at_once = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, max(1, len(hidden)), at_once):
            rows = slice(start, start + at_once)
            log_likelihoods = F.log_softmax(F.linear(hidden[rows], weight, bias), dim=-1, dtype=torch.float32)
            total -= (log_likelihoods.gather(1, labels[rows, None]).squeeze(1) * weights[rows]).sum()
            if not any(needs):
                continue
            slopes = log_likelihoods.exp_()  # the probabilities, less one at the label
            slopes.scatter_add_(1, labels[rows, None], slopes.new_full((len(slopes), 1), -1.0))
            slopes.mul_(weights[rows, None])
            if bias_gradient is not None:
                bias_gradient += slopes.sum(dim=0)
            slopes = slopes.to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = slopes @ weight
            if weight_gradient is not None:
                weight_gradient += slopes.T @ hidden[rows]
        gradients = (hidden_gradient, weight_gradient, bias_gradient)
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        ctx.present = [gradient is not None for gradient in gradients]
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The stored gradients times that of the loss."""
        saved = iter(ctx.saved_tensors)
        gradients = [
            (next(saved) * outer[0]).to(dtype) if present else None
            for present, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None)


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
