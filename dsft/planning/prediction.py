"""Peak memory and time of a run before it starts: from shapes, the longest micro-batch and the machine's own rates.

What is predicted is what a run logs as `memory`: the highest resident memory of the process on CPU, the most that was
allocated on CUDA. No weight is read: the longest micro-batch runs forward and backward on the meta device, and what it
would allocate is counted. `Backend.memory` states what the sharding library holds. On CPU the result is an upper
estimate, because the heap of a process is larger than the tensors in it.
"""

import copy
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from dsft.backends import backend_class
from dsft.backends.base import BackendOptions, HeldMemory
from dsft.dataset.batches import GlobalBatches
from dsft.dataset.micro_batches import MicroBatch, MicroBatches, Plan
from dsft.distributed import runtime
from dsft.model.lora import LoraOptions, add_lora
from dsft.planning.activations import ActivationMemory
from dsft.planning.trace import trace_activations
from dsft.units import GIB

HEAP_SPREAD = 2.5  # on CPU, times the bytes of its tensors that the heap takes at most; see docs/preflight.md
FIRST_PASS = 0.25 * GIB  # on CPU, what imports, code pages and workspaces add to the process up to its first pass
TOO_HIGH = 0.6  # by this share at most a prediction exceeds the measured peak, see docs/benchmarks.md
LOOKED_AT = 8  # steps of an epoch whose micro-batches are made to find the longest
REACHED = {("cpu", torch.float32): 0.59, ("cpu", torch.bfloat16): 0.37, ("cuda", torch.bfloat16): 0.43}
"""Share of the measured matrix product's rate that a step reaches; of CUDA unmeasured. See docs/benchmarks.md."""


@dataclass(frozen=True)
class Setting:
    """What memory follows from, beside the rows."""

    backend: str
    options: BackendOptions
    lora: LoraOptions | None
    """None is full fine-tuning."""
    checkpointed_layers: int = 0
    copies_state: bool = False
    """A checkpoint is written in the background, from a copy."""


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process that has loaded libraries and rows but no model."""

    now: float
    peak: float
    """So far: to make rows into tokens takes more than to have them."""
    available: float = math.inf
    """What it may have in all; the smallest of all ranks."""

    @classmethod
    def of(cls, device: torch.device, free: float) -> "ProcessMemory":
        """This process's, none of it on a GPU, where every rank may take `free` bytes more."""
        if device.type == "cuda":
            return cls(0.0, 0.0, free)
        runtime.return_freed_memory()
        now = float(psutil.Process().memory_info().rss)
        return cls(now, max(now, runtime.peak_memory_gib(device) * GIB), now + free)


@dataclass(frozen=True)
class Prediction:
    """Bytes of one rank, the one with the longest micro-batch."""

    process: ProcessMemory
    held: HeldMemory
    activations: float
    """That a forward and backward pass takes beside what is held."""
    heap: float
    """Of the activations, what a process on CPU keeps after the pass."""
    copied: float
    """State that a checkpoint in the background is written from."""
    tokens: int
    """Of the micro-batch."""
    traced: bool
    """Whether the activations come from a pass on the meta device; else from a formula, which is rougher."""

    @property
    def before_first_step(self) -> float:
        """Peak up to the end of the first backward pass: what a dry run measures."""
        held = self.held
        running = held.gradients + held.gathered + self.activations
        return max(self.process.peak, self.process.now + held.built + max(held.loading, running))

    @property
    def peak(self) -> float:
        """Of the whole run."""
        held = self.held
        beside = max(held.gathered + self.activations, held.step + self.heap)
        return max(self.before_first_step, self.process.now + self.copied + held.lasting + beside)

    def parts(self) -> dict[str, float]:
        """Bytes by what they are for; they add up to the peak of a forward and backward pass."""
        held = self.held
        parts = {
            "process": self.process.now,
            "weights": held.weights + held.masters,
            "gradients": held.gradients,
            "moments": held.moments,
            "gathered": held.gathered,
            "activations" if self.traced else "activations by a formula": self.activations,
            "checkpoint": self.copied,
        }
        return {name: size for name, size in parts.items() if size}


def predict(bare: Any, setting: Setting, batch: MicroBatch, *, process: ProcessMemory) -> Prediction:
    """Peak memory of a rank.

    Args:
        bare: what `ModelSource.empty` returns, before a backend has loaded a model.
        batch: the longest micro-batch, on CPU; see `longest_micro_batch` and `chains`.
        process: of the rank, before it has a model.

    Raises:
        UserError: LoRA does not fit the model.
    """
    model = shapes(bare, setting)
    held = backend_class(setting.backend).memory(model, setting.options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens, traced = batch.input_ids.numel(), False
    per_token = ActivationMemory.of(model, setting.options.dtype).per_token(setting.checkpointed_layers)
    small, large = 0.0, per_token * tokens
    with suppress(NotImplementedError, RuntimeError, TypeError, AttributeError):  # code that meta tensors cannot follow
        small, large = trace_activations(model, batch, setting.options, setting.checkpointed_layers)
        traced = True
    heap = HEAP_SPREAD * small
    if setting.options.device.type == "cpu":
        process = replace(process, now=process.now + FIRST_PASS)
    copied = checkpoint_bytes(trained) / setting.options.ranks if setting.copies_state else 0.0
    return Prediction(process, held, large + heap, heap, copied, tokens, traced)


def shapes(bare: Any, setting: Setting) -> Any:
    """The model on the meta device, wrapped as it is trained."""
    model = copy.deepcopy(bare).to("meta")
    model.tie_weights()
    return model if setting.lora is None else add_lora(model, setting.lora, "")


def longest_micro_batch(
    micro_batches: MicroBatches, lengths: np.ndarray, batches: GlobalBatches
) -> tuple[Plan, int, MicroBatch]:
    """The plan of the step with the longest micro-batch of the first epoch, its place there, and itself.

    It is searched in the steps with the longest rows and those with the most tokens; `lengths` is int64 [rows].
    """
    epoch = batches.epoch(0)
    by_row = sorted(range(len(epoch)), key=lambda step: -int(lengths[epoch[step]].max()))[:LOOKED_AT]
    by_sum = sorted(range(len(epoch)), key=lambda step: -int(lengths[epoch[step]].sum()))[:LOOKED_AT]
    best: tuple[tuple[int, int], Plan, int, MicroBatch] | None = None
    for step in dict.fromkeys([*by_row, *by_sum]):
        plan = micro_batches.plan(epoch[step])
        for rank in plan.parts:
            for place, part in enumerate(rank):
                batch = micro_batches.make(part)
                size = (batch.input_ids.numel(), len(batch.logit_positions))
                if best is None or size > best[0]:
                    best = (size, plan, place, batch)
    assert best is not None
    return best[1], best[2], best[3]


def epoch_cost(micro_batches: MicroBatches, batches: GlobalBatches) -> tuple[float, float]:
    """Operations of an epoch, and how many times fewer tokens are computed than its rows have, from a few steps."""
    epoch = batches.epoch(0)
    looked_at = epoch[:: -(-len(epoch) // LOOKED_AT)]
    plans = [micro_batches.plan(rows) for rows in looked_at]
    flops = sum(plan.flops for plan in plans) / len(plans) * len(epoch)
    return flops, sum(plan.row_tokens for plan in plans) / sum(plan.tokens for plan in plans)


def seconds_of(flops: float, matmul_rate: float, dtype: torch.dtype, device: torch.device) -> float:
    """How long operations take on all ranks; `matmul_rate` is that of their matrix product together, per second."""
    return flops / (matmul_rate * REACHED.get((device.type, dtype), min(REACHED.values())))


def remedies(prediction: Prediction, setting: Setting, *, longest: int, available: float) -> list[str]:
    """Flags that lower a predicted peak. The first is the largest token budget that fits, if one does.

    `longest` are the tokens of the longest row, `available` the bytes that the rank may have.
    """
    spare = available - prediction.peak + prediction.activations
    tokens = int(prediction.tokens * spare / prediction.activations)  # attention grows faster, so fewer take less
    budget = max(longest, tokens // 64 * 64)
    flags = {
        f"--max_tokens_per_micro_batch {budget}": longest <= tokens,
        "--gradient_checkpointing True": not setting.checkpointed_layers,
        "--dtype bfloat16": setting.options.dtype != torch.bfloat16,
        "--lora_rank 16": setting.lora is None,
        "--cpu_offload True": setting.options.device.type != "cpu" and not setting.options.cpu_offload,
        "more ranks": True,
    }
    return [flag for flag, helps in flags.items() if helps]


def checkpoint_bytes(trained: int) -> int:
    """Weights and two moments of what is trained, float32."""
    return trained * 12
