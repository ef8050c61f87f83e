"""The contract between the Trainer and a sharding library.

After `backward` on every micro-batch of every rank, the gradient of each trainable parameter is the plain SUM of
the micro-batch gradients over all ranks. The Trainer divides the loss by the global number of targets, once; no
backend averages. A backend reads no flags and knows no dataset. A third backend is one file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch.optim.AdamW names them


@dataclass(frozen=True)
class StateSlice:
    """What one rank holds of one tensor: neighbours in the flattened tensor. The slices of all ranks are the whole."""

    kind: str
    """PARAMETER, or one of MOMENTS."""
    name: str
    """Of the parameter."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Place of the first value in the flattened tensor."""
    values: torch.Tensor
    """float32 1-D, on any device: a view of the live state, which the next step changes."""


@dataclass(frozen=True)
class BackendOptions:
    """What a backend needs to know."""

    device: torch.device
    dtype: torch.dtype
    """Compute dtype. Trained parameters and moments are float32 whatever it is."""
    trains_base: bool
    """Full fine-tuning: the base model's parameters are trained; else they are frozen, kept in `dtype`."""
    clip_grad: float
    """Largest global gradient norm; 0 clips nothing."""
    cpu_offload: bool = False
    library_config: dict[str, Any] = field(default_factory=dict)
    """Settings in the library's own words, already checked (DeepSpeed's JSON)."""


@dataclass(frozen=True)
class HeldMemory:
    """Bytes that one rank holds of a model on the device that computes, beside activations and the process itself."""

    weights: float
    """Its shards of all parameters that are computed with, and what the library keeps whole."""
    masters: float
    """float32 copies of trained parameters, where `weights` does not hold those."""
    gradients: float
    """Of its shards, from the first backward on or before."""
    moments: float
    gathered: float
    """Most that is whole at once beside `weights`: parameters, and in the backward pass their gradients."""
    step: float
    """Temporaries of the optimizer step, when activations and what was gathered are gone."""
    loading: float
    """Temporaries of building the model, when there are no gradients and moments yet."""
    moments_from_start: bool
    """Whether moments are there before the first step."""
    leftover: float = 0.0
    """What building the model leaves in the heap of a process on CPU."""

    @property
    def built(self) -> float:
        """What is there once the model is built, before the first step."""
        return self.weights + self.masters + self.leftover + (self.moments if self.moments_from_start else 0.0)

    @property
    def lasting(self) -> float:
        """What is there all the time once the first step is done."""
        return self.weights + self.masters + self.gradients + self.moments + self.leftover


@dataclass(frozen=True)
class RunSettings:
    """What flags have decided and a library's own file must not contradict. The fields have the flags' names."""

    train_batch_size: int
    clip_grad: float
    dtype: torch.dtype


class Source(Protocol):
    """A base model that can be built in two ways; see dsft.model.source.ModelSource."""

    def pretrained(self, dtype: torch.dtype) -> nn.Module:
        """The whole model."""

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The model with parameters on the meta device."""

    def fill(self, module: nn.Module) -> None:
        """Real values for the meta parameters of one module."""


class Backend(ABC):
    """One sharding library, driven by the Trainer in the order of the methods below.

    `model` is what runs forward, once `prepare` has returned. Methods marked collective run on all ranks.
    """

    model: nn.Module
    library: str
    """Name of the package that shards, for the record of versions."""

    def __init__(self, options: BackendOptions) -> None:
        self.options = options

    @classmethod
    def read_library_config(cls, path: str | None, settings: RunSettings) -> dict[str, Any]:
        """Settings in the library's own words from a user's file; most libraries have none.

        Raises:
            UserError: a file that cannot be read, or contradicts `settings`.
        """
        return {}

    @classmethod
    @abstractmethod
    def memory(cls, model: nn.Module, options: BackendOptions, ranks: int) -> HeldMemory:
        """What a rank will hold, from shapes alone. Needs no process group.

        Args:
            model: parameters on the meta device, wrapped in LoRA or not.
            options: as for a run.
            ranks: of the run.
        """

    @abstractmethod
    def setup(self) -> None:
        """Prepare the library, after the process group has started."""

    @abstractmethod
    def load_model(self, source: Source) -> nn.Module:
        """The base model in the form that `prepare` expects, no rank holding all of its weights. Collective."""

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        make_scheduler: Callable[[Optimizer], LambdaLR],
    ) -> None:
        """Shard the model (wrapped in LoRA or not) and build optimizer and schedule. Collective."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last_micro_batch: bool) -> None:
        """Add a micro-batch's gradient to the sum. Collective."""

    @abstractmethod
    def step(self) -> float:
        """Clip, update, zero the gradients, advance the schedule. Collective.

        Returns:
            The global gradient norm before clipping. Where it is not finite, no weight has changed.
        """

    @abstractmethod
    def learning_rate(self) -> float:
        """The rate that the next step uses."""

    @abstractmethod
    def state(self) -> Iterator[StateSlice]:
        """What this rank holds of all trained parameters, then of their moments, in one order on all ranks.

        Needs no other rank.
        """

    @abstractmethod
    def load_state(self, read: Callable[[str, str, int, int], torch.Tensor], step: int) -> None:
        """Go on from stored parameters and moments as if `step` steps had been taken.

        Args:
            read: (PARAMETER or one of MOMENTS, parameter name, start, stop) -> those values of the flattened tensor,
                float32 1-D on CPU. Each rank asks for what it holds.
            step: optimizer steps taken so far.
        """

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The full shape of a parameter, which a library may hide behind its shard."""
        return tuple(parameter.shape)

    def close(self) -> None:  # noqa: B027 (a library may hold nothing)
        """Free what the library holds."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model: the classes it says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_schedule(scheduler: LambdaLR, step: int) -> None:
    """Put a schedule where `step` steps would have brought it."""
    scheduler.last_epoch = step
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate
