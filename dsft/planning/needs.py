"""What a run would need of this machine, before any process of it is started: its layout, memory, time and disk."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsft.backends import backend_class
from dsft.config import PreviewConfig
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions
from dsft.dataset.tokens import TokenDataset
from dsft.distributed import runtime
from dsft.model.flops import count_flops, measure_matmul
from dsft.model.source import ModelSource
from dsft.model.tree_attention import tree_unsupported_reason
from dsft.planning import prediction as preflight
from dsft.planning.activations import ActivationMemory, fit_micro_batches, free_memory
from dsft.planning.options import backend_options, lora_options
from dsft.planning.prediction import gib
from dsft.planning.report import disk_warning, fits
from dsft.previewing.row_checks import Finding
from dsft.previewing.statistics import Batches, Layouts, order_of_batches


@dataclass(frozen=True)
class PlannedRun:
    """A run as it would be laid out here.

    bare: the model on the meta device, without LoRA
    setting: what its memory follows from
    layouts: of its micro-batches
    process: of a rank without a model
    room: bytes that a rank may have
    trained: values
    """

    bare: Any
    setting: preflight.Setting
    layouts: Layouts
    process: preflight.ProcessMemory
    room: float
    trained: int


@dataclass(frozen=True)
class Needs:
    """Of the rank with the longest micro-batch; predicted.

    memory_bytes, room_bytes: peak, and what a rank may have
    parts_bytes: what the peak consists of
    remedies: flags with which the run would fit, where it does not
    seconds_per_step, seconds_per_epoch, seconds: mean of a step, an epoch, the run
    """

    backend: str
    ranks: int
    device: str
    dtype: str
    memory_bytes: float
    parts_bytes: dict[str, float]
    room_bytes: float
    remedies: list[str]
    seconds_per_step: float
    seconds_per_epoch: float
    seconds: float


def plan_run(path: str, config: PreviewConfig, longest: int) -> PlannedRun:
    """How training would lay out its micro-batches with --ranks ranks; without a GPU all of them are on this machine.

    Args:
        path: of the model's folder.
        config: the flags.
        longest: tokens of the longest row.

    Raises:
        UserError: the model's configuration, LoRA's targets or the file of --ds_config cannot be used.
    """
    device = runtime.pick_device(runtime.World(0, 1, 0, 1))
    options = backend_options(config, device, runtime.pick_dtype(config.dtype, device))
    source = ModelSource(
        path, attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code
    )
    bare = source.empty(options.dtype)
    setting = preflight.Setting(
        config.backend, options, config.ranks, lora_options(config), copies_state=config.async_save
    )
    model = preflight.shapes(bare, setting)
    process = preflight.ProcessMemory.of(device)
    # The processes of the other ranks come out of the same memory as this one.
    room = process.now / config.ranks + free_memory(device, runtime.World(0, config.ranks, 0, config.ranks))
    built = backend_class(config.backend).memory(model, options, config.ranks).built
    layers, budget = fit_micro_batches(
        ActivationMemory.of(model, options.dtype),
        max(0.0, room - process.now - built),
        longest,
        device,
        config.gradient_checkpointing,
        config.max_tokens_per_micro_batch,
    )
    trees = tree_unsupported_reason(bare, config.attn_implementation)
    cost = count_flops(model, lambda parameter: tuple(parameter.shape))
    return PlannedRun(
        bare,
        replace(setting, checkpointed_layers=layers),
        Layouts(config.ranks, budget, cost, config.fold != "off", trees),
        process,
        room,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    )


def needs(run: PlannedRun, data: TokenDataset, config: PreviewConfig) -> Needs:
    """Memory and time of a run.

    Args:
        run: as laid out.
        data: the training rows.
        config: the flags.

    Raises:
        UserError: a row is longer than the token budget.
    """
    layouts, device, dtype = run.layouts, run.setting.options.device, run.setting.options.dtype
    layout = MicroBatchOptions(
        layouts.ranks, layouts.token_budget, fold=layouts.fold, trees=layouts.tree_unsupported_reason is None
    )
    micro_batches = MicroBatches(data, layout, layouts.cost, None)
    batches = order_of_batches(data, layouts, config.train_batch_size, config.seed)
    predicted, remedies = preflight.predict_run(
        run.bare, run.setting, micro_batches, data.lengths, batches, process=run.process, room=run.room
    )
    rate = measure_matmul(dtype, device) * (1 if device.type == "cpu" else layouts.ranks)
    epoch = preflight.seconds_of(preflight.epoch_flops(micro_batches, batches), rate, dtype, device)
    step = epoch / batches.first_step(1)
    return Needs(
        backend=config.backend,
        ranks=layouts.ranks,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        memory_bytes=predicted.peak,
        parts_bytes=predicted.parts(),
        room_bytes=run.room,
        remedies=remedies,
        seconds_per_step=step,
        seconds_per_epoch=epoch,
        seconds=step * (config.total_training_steps or batches.first_step(config.total_epochs)),
    )


def needs_findings(needs: Needs, trained: int, batches: Batches, config: PreviewConfig) -> list[Finding]:
    """What will not fit: memory, or checkpoints of so many trained values on the disk of the output folder."""
    found = []
    if needs.memory_bytes > needs.room_bytes:
        text = f"a rank would need {gib(needs.memory_bytes)} by prediction, and has {gib(needs.room_bytes)}"
        found.append(Finding("warning", "memory", f"{text}; {fits(needs.remedies)}"))
    if config.output_dir:
        folder = Path(config.output_dir).expanduser().absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        told = disk_warning(config, trained, batches.steps, batches.steps_first_epoch, there)
        found += [Finding("warning", "disk", told)] if told else []
    return found
