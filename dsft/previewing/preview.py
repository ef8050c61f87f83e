"""All that dsft.preview shows: rows, statistics, needs, and findings."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from dsft.backends import backend_class
from dsft.backends.base import Sharding
from dsft.checkpointing.models import resolve_model
from dsft.checkpointing.resuming import find_initial_weights
from dsft.config import PreviewConfig
from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.micro_batches import MicroBatches
from dsft.distributed import runtime
from dsft.errors import UserError
from dsft.model.flops import measure_matmul
from dsft.model.source import ModelSource, load_tokenizer
from dsft.planning.activations import free_memory
from dsft.planning.disk import disk_warning
from dsft.planning.plan import Needs, backend_options, choose_sharding, lora_options, order_rows, plan_run
from dsft.planning.prediction import ProcessMemory, Setting
from dsft.planning.prediction import shapes as model_shapes
from dsft.previewing.loading import LoadedSet, SeparatedSets, load_set, separate_sets
from dsft.previewing.row_checks import Finding, duplicates_finding, ignored_finding, truncation_finding
from dsft.previewing.rows import RowView, choose_rows, view_row
from dsft.previewing.statistics import Batches, Folding, SetStatistics, batches_and_folding, fold_ratios, set_statistics
from dsft.previewing.template_checks import inspect_template, start_finding, template_findings
from dsft.units import GIB, gib, size_text

FEW_TOKENS = 1024  # on a GPU; with fewer, reading the weights may take longer than computing. Not measured.


@dataclass
class Preview:
    """All that is shown.

    rows: training rows as the model will see them
    findings: of all checks
    shardings: with --device_memory what each sharding would take
    train, val: statistics; None where there are no such rows
    """

    title: str
    rows: list[RowView] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    train: SetStatistics | None = None
    val: SetStatistics | None = None
    batches: Batches | None = None
    folding: Folding | None = None
    val_folding: Folding | None = None
    needs: Needs | None = None
    shardings: list[str] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        """What training would refuse, in one line."""
        refused = [finding for finding in self.findings if finding.kind == "refused"]
        if not refused:
            return None
        more = f" (and {len(refused) - 1} more, see above)" if len(refused) > 1 else ""
        return f"training would refuse this: {refused[0].text}{more}"


def make_preview(config: PreviewConfig) -> Preview:
    """Look at model, template and rows; nothing is trained, and no weights are read.

    Raises:
        UserError: there is no model, there are no files, or a row to show does not exist.
    """
    if not config.debug:
        runtime.silence_libraries()
    path = resolve_model(config.model, check=False)
    initial = find_initial_weights(config, path, None, check=False)
    if initial is not None and not initial.is_adapter:
        path = str(initial.folder)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code, chat_template=config.chat_template)
    chat_format = ChatFormat.of(tokenizer, config)
    template = inspect_template(chat_format)
    train = load_set(config, "train_files", chat_format, template)
    val = load_set(config, "val_files", chat_format, template) if config.val_files else None
    sets = separate_sets(train, val, config, chat_format)

    preview = Preview(title=f"{', '.join(config.train_files)} as {config.model} will see them")
    preview.train, preview.val = (side and set_statistics(*side, config) for side in (sets.train, sets.val))
    try:
        _add_plan(preview, sets, config, path)
    except UserError as error:
        preview.findings.append(Finding("refused", "run", str(error)))
    preview.rows = list(_rows(train, sets, config, tokenizer))
    preview.findings += template_findings(template, train.scan, chat_format, _stops(path))
    preview.findings.append(start_finding(template))
    for loaded in (train, val):
        if loaded is not None:
            preview.findings += _data_findings(loaded, config)
    preview.findings += sets.findings
    return preview


def _stops(path: str) -> list[int] | None:
    """The tokens at which the model's own configuration ends generation."""
    for read in (GenerationConfig.from_pretrained, AutoConfig.from_pretrained):
        with suppress(OSError, ValueError, KeyError):
            stops = getattr(read(path), "eos_token_id", None)
            if stops is not None:
                return [stops] if isinstance(stops, int) else list(stops)
    return None


def _add_plan(preview: Preview, sets: SeparatedSets, config: PreviewConfig, path: str) -> None:
    """How the run would be laid out, and what it needs.

    Raises:
        UserError: flags, model and rows do not go together.
    """
    train, val = (side and side.data for side in (sets.train, sets.val))
    ranks, longest = config.ranks, max((int(data.lengths.max()) for data in (train, val) if data), default=1)
    on_this_machine = config.device_memory is None
    device = runtime.pick_device(runtime.World(0, 1, 0, 1)) if on_this_machine else torch.device("cuda")
    dtype = runtime.pick_dtype("bfloat16" if not on_this_machine and config.dtype == "auto" else config.dtype, device)
    layout = {"ranks": ranks, "ranks_per_node": ranks // config.nodes}
    options = backend_options(config, device, dtype, **layout)
    source = ModelSource(
        path, attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code
    )
    shapes = source.empty(options.dtype)
    if config.device_memory is None:
        # Without a GPU all ranks share this machine's memory, and this process stands for one of them.
        memory = ProcessMemory.of(device, free_memory(device, runtime.World(0, ranks, 0, ranks // config.nodes)))
    else:
        memory = ProcessMemory(0.0, 0.0, config.device_memory * GIB)
    if train is None:
        plan = plan_run(config, shapes, options, memory, longest)
    else:
        order = order_rows(train, config)
        rate = math.nan
        if on_this_machine:
            rate = measure_matmul(options.dtype, device) * (1 if device.type == "cpu" else ranks)
        rows = train, order, longest, rate
        plan, preview.needs = choose_sharding(config, shapes, options, memory, *rows)
        for sharding in () if on_this_machine else get_args(Sharding):
            given = replace(config, sharding=sharding)
            options = backend_options(given, device, dtype, **layout)
            if options.sharding != sharding:  # these ranks and flags do not allow it
                continue
            own, needs, mark = plan, preview.needs, " (chosen)"
            if sharding != plan.sharding:
                (own, needs), mark = choose_sharding(given, shapes, options, memory, *rows), ""
            text = f"{sharding}{mark}: {gib(needs.memory.peak)} per rank"
            if config.nodes > 1:
                [first_step, *_] = order.epoch(0)
                parts = MicroBatches(train, own.micro_batches, own.cost, None).plan(first_step).parts
                trained = model_shapes(shapes, Setting(config.backend, options, lora_options(config)))
                received = backend_class(config.backend).traffic(trained, options, len(parts[0]))
                text += f", {size_text(int(received))} to each node per step"
            preview.shardings.append(text)
        preview.batches, preview.folding = batches_and_folding(train, order, plan, preview.needs.total_steps)
        preview.findings += needs_findings(preview.needs, plan.trained, config)
        preview.findings += few_tokens_finding(preview.batches, device)
    if val is not None:
        preview.val_folding, _ = fold_ratios(val, [np.arange(len(val))], plan)


def few_tokens_finding(batches: Batches, device: torch.device) -> list[Finding]:
    """Whether a GPU has too little to do in a step."""
    tokens = batches.computed_per_rank
    if device.type != "cuda" or tokens >= FEW_TOKENS:
        return []
    wanted = math.ceil(batches.rows * FEW_TOKENS / tokens)
    text = f"each GPU computes {tokens:,.0f} tokens per step, too few to be busy"
    remedy = f"--train_batch_size {wanted} would give it {FEW_TOKENS:,}; or use fewer GPUs"
    return [Finding("warning", "batch", f"{text}; {remedy}")]


def needs_findings(needs: Needs, trained: int, config: PreviewConfig) -> list[Finding]:
    """What does not fit: memory, or checkpoints of so many trained values on the disk of the output folder."""
    found = []
    if not needs.fits:
        text = f"a rank needs {gib(needs.memory.peak)} by prediction, and {gib(needs.available)} are available"
        found.append(Finding("warning", "memory", f"{text}; try {', '.join(needs.remedies)}"))
    if config.output_dir:
        folder = Path(config.output_dir).expanduser().absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        message = disk_warning(config, trained, needs, existing)
        found += [Finding("warning", "disk", message)] if message else []
    return found


def _rows(
    train: LoadedSet, sets: SeparatedSets, config: PreviewConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[RowView]:
    """The rows to show."""
    whole = train.whole
    if whole is None:
        return
    reason = "validates, by --val_fraction" if config.val_fraction else "dropped by --on_leak drop_train"
    for number in choose_rows(whole.lengths, config.rows, config.row_numbers):
        view = view_row(number, whole.cell(number), whole[number], tokenizer, config)
        if sets.left_out is not None and sets.left_out[number]:
            view = replace(view, cut="; ".join(filter(None, (reason, view.cut))))
        yield replace(view, weight=float(whole.weight[number]))


def _data_findings(loaded: LoadedSet, config: PreviewConfig) -> list[Finding]:
    findings = list(loaded.scan.findings())
    if loaded.whole is not None:
        found = (
            duplicates_finding(loaded.whole),
            truncation_finding(loaded.whole, config),
            ignored_finding(loaded.whole),
        )
        findings += filter(None, found)
    if loaded.error and not any(finding.kind == "refused" for finding in findings):  # it has the same with its count
        findings.append(Finding("refused", "load", loaded.error))
    findings = findings or [Finding("ok", "rows", f"no fault found in {loaded.scan.rows:,} rows")]
    return [replace(finding, name=loaded.label + finding.name) for finding in findings]
