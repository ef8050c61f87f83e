"""The contract between the Trainer and a sharding library.

After `backward` on every micro-batch of every rank, the gradient of each trainable parameter is the plain SUM of
the micro-batch gradients over all ranks. The Trainer divides the loss by the global number of targets, once; no
backend averages. A backend reads no flags and knows no dataset. A new backend is one file: docs/adding_backend.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW names them

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LambdaLR]
Read = Callable[[str, str, int, int], torch.Tensor]
Sharding = Literal["full", "hybrid", "trainable"]
"""full: every parameter over all ranks. hybrid: over the ranks of a node, replicated between nodes. trainable: what is
trained over all ranks, and the frozen base whole on each."""


@dataclass(frozen=True)
class StateSlice:
    """One rank's contiguous part of a flattened tensor. The slices of all ranks make up the tensor, without overlap.

    Where a part is on several ranks, one of them has it in its slice, and the slices of the others are empty.
    """

    kind: str
    """PARAMETER, or one of MOMENTS."""
    name: str
    """Name of the parameter in the unsharded model."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Index of the first value in the flattened tensor."""
    values: torch.Tensor
    """float32 [values], on any device, possibly empty. A view of the live state: the next step changes it."""


@dataclass(frozen=True)
class BackendOptions:
    """What a backend needs to know about the run."""

    device: torch.device
    dtype: torch.dtype
    """Compute dtype. Trained parameters and their moments are always float32."""
    trains_base: bool
    """True for full fine-tuning; under LoRA the base model is frozen and kept in `dtype`."""
    clip_grad: float
    """Maximum global gradient norm; 0 disables clipping."""
    train_batch_size: int
    """Rows per optimizer step over all ranks."""
    ranks: int = 1
    ranks_per_node: int = 1
    """The same on all nodes; consecutive ranks share a node."""
    sharding: Sharding = "full"
    """trainable only with a frozen base."""
    cpu_offload: bool = False
    """Keep parameters and optimizer state in CPU memory between uses."""
    config_file: str | None = None
    """The library's own settings file (DeepSpeed's JSON)."""

    @property
    def other_nodes(self) -> float:
        """The share of all nodes that are not this one."""
        return 1 - self.ranks_per_node / self.ranks


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

    @property
    def built(self) -> float:
        """Once the model is built, before the first backward."""
        return self.weights + self.masters

    @property
    def lasting(self) -> float:
        """From the first optimizer step on."""
        return self.built + self.gradients + self.moments


class Source(Protocol):
    """A base model that can be built whole or module by module; see dsft.model.source.ModelSource."""

    def pretrained(self, dtype: torch.dtype) -> nn.Module:
        """The model with its weights, by `from_pretrained`."""

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The model with its parameters on the meta device."""

    def fill(self, module: nn.Module) -> None:
        """Load the weights of one module, replacing its parameters on the meta device."""


class Backend(ABC):
    """A sharding library, driven by the Trainer, which calls the methods in the order below.

    Every rank calls the methods marked collective, in the same order.
    """

    library: str
    """Distribution name of the sharding library; its version is recorded in checkpoints."""
    model: nn.Module
    """The module to call for a forward pass. Set by `prepare`."""

    def __init__(self, options: BackendOptions) -> None:
        """Check the options. Called before `setup`, possibly without a process group.

        Raises:
            UserError: the options or `config_file` cannot be used.
        """
        self.options = options

    @classmethod
    @abstractmethod
    def memory(cls, model: nn.Module, options: BackendOptions) -> HeldMemory:
        """Memory held by each rank, computed from shapes alone. Needs no process group.

        Args:
            model: as it will be trained (with LoRA applied), parameters on the meta device.
            options: of the run.
        """

    @classmethod
    @abstractmethod
    def traffic(cls, model: nn.Module, options: BackendOptions, micro_batches: int) -> float:
        """Bytes that a node receives from the others in a step, computed from shapes alone. Needs no process group.

        That of ring collectives: of n nodes, each receives (n - 1) / n of what is gathered or reduced and scattered,
        and twice that of what is reduced to all.

        Args:
            model, options: see `memory`.
            micro_batches: of a step, on each rank.
        """

    @abstractmethod
    def setup(self) -> None:
        """Initialize the library. The process group exists."""

    @abstractmethod
    def load_model(self, source: Source) -> nn.Module:
        """Build the base model; ideally no rank ever holds all of its weights. Collective."""

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        """Shard the model, build optimizer and schedule, and set `self.model`. Collective.

        Args:
            model: what `load_model` returned, with LoRA applied if the run uses it.
            make_optimizer: parameters -> torch.optim.AdamW.
            make_scheduler: optimizer -> learning rate schedule, stepped once per optimizer step.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last_micro_batch: bool) -> None:
        """Accumulate a micro-batch's gradient; after the last one of a step, it is summed over all ranks. Collective.

        Args:
            loss: already divided by the global number of targets.
            last_micro_batch: whether `step` comes next.
        """

    @abstractmethod
    def step(self) -> float:
        """Clip, update the parameters, zero the gradients, advance the schedule. Collective.

        Returns:
            The global gradient norm before clipping. If it is not finite, nothing was updated.
        """

    @abstractmethod
    def learning_rate(self) -> float:
        """The learning rate of the next step."""

    @abstractmethod
    def state(self) -> Iterator[StateSlice]:
        """This rank's slices of all trained parameters, then of their moments, in the same order on every rank.

        Not collective.
        """

    @abstractmethod
    def load_state(self, read: Read, step: int) -> None:
        """Restore trained parameters, moments and schedule to their state after `step` optimizer steps. Collective.

        Args:
            read: (PARAMETER or one of MOMENTS, parameter name, start, stop) -> values [start, stop) of the flattened
                tensor, float32 on CPU. Each rank reads only what it holds.
            step: optimizer steps taken so far.
        """

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of the whole parameter, if the library replaces it by a shard."""
        return tuple(parameter.shape)

    def close(self) -> None:  # noqa: B027 (optional)
        """Release the library's resources."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, from its `_no_split_modules` (read in transformers 5.23)."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name; tied parameters once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_schedule(scheduler: LambdaLR, step: int) -> None:
    """Set a schedule to its state after `step` steps."""
    scheduler.last_epoch = step
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate
