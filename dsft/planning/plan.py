"""How a run is laid out and what it needs, from flags, shapes, rows, ranks and device, before a weight is read."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from dsft.backends import backend_class
from dsft.backends.base import BackendOptions, Sharding
from dsft.config import TrainConfig
from dsft.dataset.batches import GlobalBatches, Repeats
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions
from dsft.dataset.tokens import TokenDataset
from dsft.errors import UserError
from dsft.model.flops import Cost, count_flops
from dsft.model.lora import LoraOptions
from dsft.model.tree_attention import tree_unsupported_reason
from dsft.planning import prediction
from dsft.planning.activations import SHARE, ActivationMemory, fit_micro_batches
from dsft.planning.prediction import Prediction, ProcessMemory, Setting
from dsft.units import GIB, duration, gib

MARGIN = 0.9  # of the available memory that a run may take by prediction, where it could take less
ENOUGH_TOKENS = 4096  # in a micro-batch: not worth full sharding to have more


def backend_options(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, *, ranks: int = 1, ranks_per_node: int = 1
) -> BackendOptions:
    """What the flags mean to the backend, which reads none. --sharding auto is full until `choose_sharding`."""
    sharding = "full" if config.sharding == "auto" else config.sharding
    if sharding == "hybrid" and ranks_per_node == ranks:
        sharding = "full"  # one node; hpZ would hold a second partition
    if sharding == "hybrid" and ranks_per_node == 1:
        sharding = "trainable"  # the frozen base is whole on each rank
    if sharding == "trainable" and config.lora_rank == 0:
        sharding = "full"
    return BackendOptions(
        device=device,
        dtype=dtype,
        trains_base=config.lora_rank == 0,
        clip_grad=config.clip_grad,
        train_batch_size=config.train_batch_size,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        sharding=sharding,
        cpu_offload=config.cpu_offload,
        config_file=config.ds_config,
    )


def lora_options(config: TrainConfig) -> LoraOptions | None:
    """None for full fine-tuning."""
    if not config.lora_rank:
        return None
    return LoraOptions(
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.target_modules,
        config.use_rslora,
        config.use_dora,
    )


@dataclass(frozen=True)
class RunPlan:
    """How rows become micro-batches, and how much of the model recomputes its activations.

    micro_batches: size and kind of micro-batches
    cost: floating-point operations of the model
    checkpointed_layers: decoder layers that recompute their activations
    parameters, trained: how many values
    tree_unsupported_reason: why the model's attention takes no prefix trees, where that was looked at; else None
    sharding: of the backend
    sharding_reason: why --sharding auto has chosen it; else empty
    """

    micro_batches: MicroBatchOptions
    cost: Cost
    checkpointed_layers: int
    parameters: int
    trained: int
    tree_unsupported_reason: str | None = None
    sharding: Sharding = "full"
    sharding_reason: str = ""

    @classmethod
    def of_model(
        cls,
        model: Any,
        dtype: torch.dtype,
        device: torch.device,
        *,
        ranks: int,
        room: float,
        longest: int,
        fold: bool = True,
        trees: bool = True,
        gradient_checkpointing: bool | Literal["auto"] = False,
        token_budget: int | None = None,
    ) -> "RunPlan":
        """From a model's shapes.

        Args:
            model: on the meta device or loaded, wrapped in LoRA or not.
            dtype, device: of the computation.
            ranks: number of ranks.
            room: bytes that the activations of a rank may take; the smallest of all ranks.
            longest: tokens of the longest row.
            fold: compute shared prefixes once.
            trees: whether the model's attention takes prefix trees.
            gradient_checkpointing, token_budget: the flags; the latter is --max_tokens_per_micro_batch.
        """
        memory = ActivationMemory.of(model, dtype)
        layers, budget = fit_micro_batches(memory, room, longest, device, gradient_checkpointing, token_budget)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return cls(
            micro_batches=MicroBatchOptions(ranks, budget, fold=fold, trees=trees),
            cost=count_flops(model, lambda parameter: tuple(parameter.shape)),
            checkpointed_layers=layers,
            parameters=sum(size for size, _ in sizes),
            trained=sum(size for size, is_trained in sizes if is_trained),
        )


def plan_run(
    config: TrainConfig, shapes: Any, options: BackendOptions, memory: ProcessMemory, longest: int, model: Any = None
) -> RunPlan:
    """The plan of a training run with the sharding of `options`.

    Args:
        shapes: the model on the meta device, without LoRA.
        longest: tokens of the longest row, of training and validation.
        model: the same with LoRA, where it has been made already.

    Raises:
        UserError: LoRA's targets do not fit the model, or the file of --ds_config cannot be used.
    """
    model = model or prediction.shapes(shapes, Setting(config.backend, options, lora_options(config)))
    reason = tree_unsupported_reason(shapes, config.attn_implementation, options.device)
    held = backend_class(config.backend).memory(model, options)
    room = SHARE * (memory.available - memory.now - held.built)
    if options.device.type == "cuda":  # it has no heap that grows larger than its tensors
        room = MARGIN * memory.available - memory.now - held.lasting - held.gathered
    plan = RunPlan.of_model(
        model,
        options.dtype,
        options.device,
        ranks=options.ranks,
        room=max(0.0, room),
        longest=longest,
        fold=config.fold != "off",
        trees=reason is None,
        gradient_checkpointing=config.gradient_checkpointing,
        token_budget=config.max_tokens_per_micro_batch,
    )
    return replace(plan, tree_unsupported_reason=reason, sharding=options.sharding)


def order_rows(data: TokenDataset, config: TrainConfig) -> GlobalBatches:
    """Which rows meet in which optimizer step.

    Raises:
        UserError: a source has no row in an epoch.
    """
    rows = np.bincount(data.source, minlength=len(data.sources))
    for name, count, weight in zip(data.sources, rows.tolist(), data.source_weights.tolist(), strict=True):
        if round(count * weight) == 0:
            raise UserError(
                f"train_files: source {name} has {count:,} rows, and with weight {weight:g} none in an epoch; "
                "raise its weight, or leave the source out"
            )
    dialogue = np.arange(len(data)) if config.fold == "off" else data.dialogue
    times = None
    if (data.source_weights != 1).any():
        times = Repeats(data.source, data.source_weights, dialogue, data.sorted_place, config.seed)
    return GlobalBatches(dialogue, data.sorted_place, config.train_batch_size, config.seed, times)


@dataclass(frozen=True)
class Needs:
    """What a run takes, by prediction: memory of the rank with the longest micro-batch, and time.

    computes: backend, dtype and device
    memory: peak of that rank and what it consists of
    available: bytes that a rank may have
    remedies: flags that lower the peak, where it is too high
    fold_ratio: how many times fewer tokens are computed than the rows have
    step_flops: floating-point operations of a step on all ranks, mean of an epoch
    step_seconds: mean of an epoch; nan where the device's rate is not known
    steps_per_epoch: of the first epoch
    total_steps: of the run
    """

    computes: str
    memory: Prediction
    available: float
    remedies: list[str]
    fold_ratio: float
    step_flops: float
    step_seconds: float
    steps_per_epoch: int
    total_steps: int

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is available."""
        return self.memory.peak <= self.available

    def as_dict(self) -> dict[str, Any]:
        """For reports in JSON."""
        step = self.step_seconds if math.isfinite(self.step_seconds) else None
        return {
            "memory_bytes": self.memory.peak,
            "parts_bytes": self.memory.parts(),
            "available_bytes": self.available,
            "remedies": self.remedies,
            "seconds_per_step": step,
            "seconds_per_epoch": step and step * self.steps_per_epoch,
            "seconds": step and step * self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
        }

    def memory_text(self) -> str:
        """In one line."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.parts().items() if size > GIB / 200)
        return f"{gib(self.memory.peak)} per rank predicted ({parts}), {gib(self.available)} available"

    def time_text(self, left: int | None = None, by: str = "predicted") -> str:
        """In one line, for the steps that are left; all of them by default."""
        left = self.total_steps if left is None else left
        step, epoch, run = (duration(self.step_seconds * count) for count in (1, self.steps_per_epoch, left))
        return f"{step} per step {by}, {epoch} per epoch, {run} for {left:,} step{'' if left == 1 else 's'}"


def predict_needs(
    config: TrainConfig,
    shapes: Any,
    options: BackendOptions,
    memory: ProcessMemory,
    plan: RunPlan,
    data: TokenDataset,
    batches: GlobalBatches,
    matmul_rate: float,
) -> Needs:
    """Memory and time of a run on the training rows `data`.

    Args:
        shapes: the model on the meta device, without LoRA.
        matmul_rate: operations per second of the matrix product, of all ranks together; nan if it is not known.

    Raises:
        UserError: a row is longer than the token budget.
    """
    micro_batches = MicroBatches(data, plan.micro_batches, plan.cost, None)
    setting = Setting(
        config.backend, options, lora_options(config), plan.checkpointed_layers, copies_state=config.async_save
    )
    _, _, longest = prediction.longest_micro_batch(micro_batches, data.lengths, batches)
    predicted = prediction.predict(shapes, setting, longest, process=memory)
    remedies: list[str] = []
    if predicted.peak > memory.available:
        remedies = prediction.remedies(predicted, setting, longest=int(data.lengths.max()), available=memory.available)
    flops, fold_ratio = prediction.epoch_cost(micro_batches, batches)
    steps = batches.first_step(1)
    seconds = prediction.seconds_of(flops, matmul_rate, options.dtype, options.device)
    return Needs(
        computes=f"{config.backend} in {str(options.dtype).removeprefix('torch.')} on {options.device.type}",
        memory=predicted,
        available=memory.available,
        remedies=remedies,
        fold_ratio=fold_ratio,
        step_flops=flops / steps,
        step_seconds=seconds / steps,
        steps_per_epoch=steps,
        total_steps=config.total_training_steps or batches.first_step(config.total_epochs),
    )


def choose_sharding(
    config: TrainConfig,
    shapes: Any,
    options: BackendOptions,
    memory: ProcessMemory,
    data: TokenDataset,
    batches: GlobalBatches,
    longest: int,
    matmul_rate: float,
) -> tuple[RunPlan, Needs]:
    """The plan of a run and what it needs. --sharding auto is the first of trainable, hybrid and full that fits.

    The first two take more memory than full sharding. They fit if they need no more recomputation, and micro-batches
    are as large as with full sharding or large enough. For arguments and errors see `plan_run` and `predict_needs`.
    """
    model = prediction.shapes(shapes, Setting(config.backend, options, lora_options(config)))
    full = plan_run(config, shapes, options, memory, longest, model)
    candidates: list[tuple[Sharding, bool, str]] = [
        ("trainable", not options.trains_base, "the frozen base fits on each rank"),
        ("hybrid", 1 < options.ranks_per_node < options.ranks, "the model fits on the ranks of a node"),
    ]
    reasons = []
    for sharding, is_possible, reason in candidates:
        if config.sharding != "auto" or options.cpu_offload or not is_possible:
            continue
        chosen = replace(options, sharding=sharding)
        plan = replace(plan_run(config, shapes, chosen, memory, longest, model), sharding_reason=reason)
        enough = min(full.micro_batches.token_budget, ENOUGH_TOKENS)
        if plan.checkpointed_layers > full.checkpointed_layers or plan.micro_batches.token_budget < enough:
            reasons.append(f"{sharding} would leave too little memory for activations")
            continue
        needs = predict_needs(config, shapes, chosen, memory, plan, data, batches, matmul_rate)
        if needs.memory.peak <= MARGIN * needs.available:
            return plan, needs
        reasons.append(f"{sharding} would take {gib(needs.memory.peak)} per rank")
    full = replace(full, sharding_reason="; ".join(reasons))
    return full, predict_needs(config, shapes, options, memory, full, data, batches, matmul_rate)
