"""The token budget and the activation checkpointing that fit into memory, by a formula of the model's sizes."""

import resource
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from dsft.distributed import runtime

SHARE = 0.5  # of the free memory that activations may take, where the rest is not known by count
MOST_TOKENS = {"cpu": 4096, "cuda": 32_768}  # more does not run faster, see docs/benchmarks.md
HIDDEN_KEPT, INNER_KEPT = 10.0, 4.5  # values a layer keeps for each token, in hidden and intermediate sizes; measured


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a token takes between forward and backward."""

    layers: int
    kept: float
    """In a layer that keeps its activations."""
    kept_checkpointed: float
    """In a layer that recomputes them."""

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> "ActivationMemory":
        """From the shapes in a transformers model's config."""
        config = model.config.get_text_config()
        hidden = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        size = dtype.itemsize
        norms = 8.0 * hidden if size < 4 else 0.0  # kept in float32 whatever the dtype
        return cls(config.num_hidden_layers, size * (HIDDEN_KEPT * hidden + INNER_KEPT * inner) + norms, size * hidden)

    def per_token(self, checkpointed_layers: int) -> float:
        """Bytes, with one checkpointed layer recomputed at a time."""
        kept = (self.layers - checkpointed_layers) * self.kept + checkpointed_layers * self.kept_checkpointed
        return kept + (self.kept if checkpointed_layers else 0.0)


def free_memory(device: torch.device, world: runtime.World) -> float:
    """Bytes that this rank may still take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    runtime.return_freed_memory()
    free = psutil.virtual_memory().available / world.local_size
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # of ulimit -v; it counts what is mapped, not what is used
    if limit != resource.RLIM_INFINITY:
        free = min(free, max(0, limit - psutil.Process().memory_info().vms))
    return free


def checkpointed_layers(memory: ActivationMemory, room: float, tokens: int) -> int:
    """The fewest layers to checkpoint so that so many tokens fit; all of them where they may not fit even then."""
    for layers in range(memory.layers + 1):
        if tokens * memory.per_token(layers) <= room:
            return layers
    return memory.layers


def recompute_layers(model: Any, layers: int) -> None:
    """Let the first `layers` decoder layers recompute their activations in the backward pass."""
    if not layers:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointing = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in checkpointing[layers:]:
        module.gradient_checkpointing = False


def token_budget(memory: ActivationMemory, room: float, longest: int, layers: int, device: torch.device) -> int:
    """Tokens for a micro-batch: what memory holds, no more than pays, and at least the longest row."""
    fitting = int(room / memory.per_token(layers))
    return max(longest, min(fitting, MOST_TOKENS[device.type]))


def fit_micro_batches(
    memory: ActivationMemory,
    room: float,
    longest: int,
    device: torch.device,
    checkpointing: bool | Literal["auto"],
    budget: int | None,
) -> tuple[int, int]:
    """The layers to checkpoint, and the tokens of a micro-batch.

    Args:
        room: bytes that activations may take.
        longest: tokens of the longest row.
        checkpointing: the flag --gradient_checkpointing.
        budget: the flag --max_tokens_per_micro_batch.
    """
    layers = memory.layers if checkpointing is True else 0
    if checkpointing == "auto":
        layers = checkpointed_layers(memory, room, max(longest, budget or 0))
    return layers, budget or token_budget(memory, room, longest, layers, device)
