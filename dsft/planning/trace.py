"""The memory of a forward and backward pass, by running it on the meta device."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsft.backends.base import BackendOptions
from dsft.dataset.folding import fold
from dsft.dataset.micro_batches import MicroBatch, packed
from dsft.distributed import runtime
from dsft.loss import TargetHead, summed_loss
from dsft.model import tree_attention
from dsft.planning.activations import recompute_layers


class AllocationTrace(TorchDispatchMode):
    """Follows the memory that operations on the meta device would take and give back.

    It does not see temporaries within one operation. `existing` tensors, such as weights, are not counted; storages of
    `threshold` bytes and more count as large.
    """

    def __init__(self, existing: Sequence[torch.Tensor], threshold: int = 0) -> None:
        super().__init__()
        self.peaks = [0, 0]
        """Most bytes at once, in small storages and in large ones."""
        self._threshold = threshold
        self._live = [0, 0]
        self._known = {_key(tensor) for tensor in existing}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        """Run an operation, and count each new storage that it returns."""
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and _key(tensor) not in self._known:
                storage = tensor.untyped_storage()
                size, kind = storage.nbytes(), int(storage.nbytes() >= self._threshold)
                self._known.add(_key(tensor))
                self._live[kind] += size
                self.peaks[kind] = max(self.peaks[kind], self._live[kind])
                weakref.finalize(storage, self._free, _key(tensor), kind, size)
        return result

    def _free(self, key: int, kind: int, size: int) -> None:
        self._known.discard(key)
        self._live[kind] -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trace_activations(
    model: Any, batch: MicroBatch, options: BackendOptions, checkpointed_layers: int
) -> tuple[float, float]:
    """Run forward and backward on the meta device. It changes the model, which must not be used afterwards.

    Returns:
        Most bytes in the heap, and in larger blocks; everything is a larger block on a GPU.
    """
    dtype = options.dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        if parameter.requires_grad:  # whole gradients are the backend's to count
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    model.config.use_cache = False
    if getattr(model, "_supports_attention_backend", False):
        # Also in place of torch's fused kernels, which keep as much; on the meta device those would not be chosen.
        model.set_attn_implementation(tree_attention.NAME)
        batch = batch if batch.tree is not None else _unpadded(batch)
    head = TargetHead(model)
    recompute_layers(model, checkpointed_layers)
    model.train()
    if batch.tree is not None:
        batch.tree.to(torch.device("cpu"))
    on_meta = replace(batch, tree=None).to(torch.device("meta"))
    on_meta.tree = batch.tree
    threshold = runtime.RETURNED_BLOCK if options.device.type == "cpu" else 0
    trace = AllocationTrace([*model.parameters(), *model.buffers()], threshold)
    with trace:
        summed_loss(model, head, on_meta).backward()
    small, large = trace.peaks
    return small, large


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def chains(lengths: Sequence[int], targets: int) -> MicroBatch:
    """A micro-batch of made-up rows that share nothing, each with so many targets at its end."""
    rows = [(np.full(size, index, np.int32), np.arange(size) >= size - targets) for index, size in enumerate(lengths)]
    return packed([fold([row]) for row in rows])


def _unpadded(batch: MicroBatch) -> MicroBatch:
    """Padded rows as a packed row of the same size."""
    count, length = batch.input_ids.shape
    made = chains([length] * count, 1)
    made.logit_positions, made.labels, made.loss_weights = batch.logit_positions, batch.labels, batch.loss_weights
    return made
