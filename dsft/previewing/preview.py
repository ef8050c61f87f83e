"""Everything that dsft.preview shows: rows, figures, and what is wrong with them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from dsft.checkpointing.models import resolve_model
from dsft.config import PreviewConfig
from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.tokens import DataFormat
from dsft.distributed import runtime
from dsft.errors import UserError
from dsft.model.flops import measure_matmul
from dsft.model.source import ModelSource, load_tokenizer
from dsft.planning.activations import free_memory
from dsft.planning.disk import disk_warning
from dsft.planning.out_of_memory import fitting_text
from dsft.planning.plan import Memory, Needs, backend_options, order_rows, plan_run, predict_needs
from dsft.planning.prediction import gib
from dsft.previewing.loading import Loaded, load
from dsft.previewing.row_checks import Finding, rows_of
from dsft.previewing.rows import RowView, choose_rows, view_row
from dsft.previewing.sides import Sides, part
from dsft.previewing.statistics import (
    Batches,
    Figures,
    Folding,
    Truncation,
    batches_and_folding,
    figures,
    fold_ratios,
    truncation,
)
from dsft.previewing.template_checks import Probe, probe_template, start_finding, template_findings
from dsft.training.resuming import find_initial_weights


@dataclass
class Sets:
    """What the checks look at."""

    config: PreviewConfig
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat
    probe: Probe
    stops: list[int] | None
    train: Loaded
    val: Loaded | None
    sides: Sides


@dataclass
class Preview:
    """All that is shown.

    rows: training rows as the model will see them
    findings: of all checks
    train, val: figures; None where there are no rows to take them of
    """

    title: str
    rows: list[RowView] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    train: Figures | None = None
    val: Figures | None = None
    batches: Batches | None = None
    folding: Folding | None = None
    val_folding: Folding | None = None
    needs: Needs | None = None

    @property
    def problem(self) -> str | None:
        """What training would refuse, in one line."""
        refused = [finding for finding in self.findings if finding.kind == "refused"]
        if not refused:
            return None
        more = f" (and {len(refused) - 1} more, see above)" if len(refused) > 1 else ""
        return f"training would refuse this: {refused[0].text}{more}"


# Making it


def make_preview(config: PreviewConfig) -> Preview:
    """Look at model, template and rows; nothing is trained, and no weights are read.

    Raises:
        UserError: there is nothing to look at: no model, no files, or a row to show that does not exist.
    """
    if not config.debug:
        runtime.silence_libraries()
    path = _model_path(config)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    chat_format = ChatFormat(tokenizer, with_thinking=config.with_thinking)
    probe = probe_template(chat_format)
    train = load(config, "train_files", config.train_files, config.max_train_rows, chat_format, probe)
    val = None
    if config.val_files:
        val = load(config, "val_files", config.val_files, config.max_val_rows, chat_format, probe)
    sides = part(train, val, config, chat_format)
    sets = Sets(config, tokenizer, chat_format, probe, _stops(path), train, val, sides)
    preview = Preview(title=f"{', '.join(config.train_files)} as {config.model} will see them")
    _add_figures(preview, sets, path)
    preview.rows = _rows(sets)
    preview.findings += check(sets)
    return preview


def check(sets: Sets) -> list[Finding]:
    """All checks, one after the other; another one is another line here."""
    findings = [
        *template_findings(sets.probe, sets.train.scan, sets.chat_format.end_of_turn, sets.tokenizer, sets.stops),
        *_start_findings(sets),
    ]
    for loaded in (sets.train, sets.val):
        if loaded is not None:
            findings += _data_findings(loaded, sets.config)
    return findings + sets.sides.findings


def _model_path(config: PreviewConfig) -> str:
    """What the tokenizer and the model's shapes come from, as for training."""
    path = resolve_model(config.model, check=False)
    initial = find_initial_weights(config, path, None, check=False)
    return str(initial.folder) if initial is not None and not initial.is_adapter else path


def _stops(path: str) -> list[int] | None:
    """The tokens at which the model's own configuration ends generation."""
    for read in (GenerationConfig.from_pretrained, AutoConfig.from_pretrained):
        try:
            stops = getattr(read(path), "eos_token_id", None)
        except (OSError, ValueError, KeyError):
            continue
        if stops is not None:
            return [stops] if isinstance(stops, int) else list(stops)
    return None


def _add_figures(preview: Preview, sets: Sets, path: str) -> None:
    config, sides = sets.config, sets.sides
    train, val = sides.train, sides.val
    if train is not None and sides.train_lengths is not None:
        preview.train = figures(train, sides.train_lengths, config.train_batch_size, config.max_length, config.seed)
    if val is not None and sides.val_lengths is not None:
        preview.val = figures(val, sides.val_lengths, config.train_batch_size, config.max_length, config.seed)
    longest = max((int(data.lengths.max()) for data in (train, val) if data is not None), default=1)
    try:
        device, ranks = runtime.pick_device(runtime.World(0, 1, 0, 1)), config.ranks
        options = backend_options(config, device, runtime.pick_dtype(config.dtype, device))
        source = ModelSource(
            path, attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code
        )
        shapes = source.empty(options.dtype)
        # Without a GPU all ranks share this machine's memory, and this process stands for one of them.
        memory = Memory.of(device, free_memory(device, runtime.World(0, ranks, 0, ranks)))
        plan = plan_run(config, shapes, options, memory, ranks=ranks, longest=longest)
        if train is not None:
            order = order_rows(train, config)
            rate = measure_matmul(options.dtype, device) * (1 if device.type == "cpu" else ranks)
            preview.needs = predict_needs(config, shapes, options, memory, plan, train, order, rate)
            preview.batches, preview.folding = batches_and_folding(train, order, plan, preview.needs.total_steps)
            preview.findings += needs_findings(preview.needs, plan.trained, config)
        if val is not None:
            preview.val_folding, _ = fold_ratios(val, [np.arange(len(val))], plan)
    except UserError as error:
        preview.findings.append(Finding("refused", "run", str(error)))


def needs_findings(needs: Needs, trained: int, config: PreviewConfig) -> list[Finding]:
    """What will not fit: memory, or checkpoints of so many trained values on the disk of the output folder."""
    found = []
    if not needs.fits:
        text = f"a rank needs {gib(needs.memory.peak)} by prediction, and {gib(needs.available)} are available"
        found.append(Finding("warning", "memory", f"{text}; {fitting_text(needs.remedies)}"))
    if config.output_dir:
        folder = Path(config.output_dir).expanduser().absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        message = disk_warning(config, trained, needs.total_steps, needs.steps_per_epoch, existing)
        found += [Finding("warning", "disk", message)] if message else []
    return found


def _rows(sets: Sets) -> list[RowView]:
    """The rows to show."""
    whole = sets.train.whole
    if whole is None:
        return []
    data_format = DataFormat.from_flags(sets.config)
    numbers = choose_rows(whole.lengths, sets.config.rows, sets.config.row_numbers)
    views = [view_row(n, sets.train.cell(n), whole[n], sets.tokenizer, data_format) for n in numbers]
    why = "validates, by --val_fraction" if sets.config.val_fraction else "left out by --on_leak drop_train"
    moved = sets.sides.has_moved(whole)
    return [
        replace(view, cut="; ".join(filter(None, (why, view.cut)))) if moved[view.number] else view for view in views
    ]


# Checks


def _start_findings(sets: Sets) -> list[Finding]:
    loaded = sets.train
    if loaded.whole is None:
        return []
    rows = [(str(loaded.cell(n)), segments, *loaded.whole[n]) for n, segments in sorted(loaded.kept.items())]
    return [start_finding(sets.probe, sets.chat_format, rows)]


def _data_findings(loaded: Loaded, config: PreviewConfig) -> list[Finding]:
    findings = list(loaded.scan.findings())
    if loaded.whole is not None:
        findings += _truncation_findings(loaded, config)
    if not any(finding.kind == "refused" for finding in findings):  # which has said it with its count
        findings += [Finding("refused", f"{loaded.label}load", error) for error in loaded.errors[:1]]
    return findings or [Finding("ok", f"{loaded.label}rows", f"no fault found in {loaded.scan.rows:,} rows")]


def _truncation_findings(loaded: Loaded, config: PreviewConfig) -> list[Finding]:
    whole = loaded.whole
    assert whole is not None
    prompts = np.array([int(np.argmax(whole[row][1])) for row in range(len(whole))], np.int64)
    cut = truncation(whole.lengths, prompts, config.max_length, config.truncation)
    text = _truncation_text(cut, loaded, config)
    return [Finding("refused" if loaded.data is None else "warning", f"{loaded.label}truncation", text)] if text else []


def _truncation_text(cut: Truncation, loaded: Loaded, config: PreviewConfig) -> str:
    """What truncation costs, in one line; empty where it costs no more than the front of prompts."""
    if cut.example is None:
        return ""
    total = loaded.scan.rows
    example = f"e.g. {loaded.cell(cut.example)}"
    limit = f"--max_length {config.max_length} (the longest row has {cut.longest:,} tokens)"
    if config.truncation == "error":
        return (
            f"{rows_of(cut.too_long, total)} have more tokens than {limit}, {example}; raise it, or choose "
            "--truncation left, right or drop"
        )
    if config.truncation == "right" and cut.answers_cut + cut.lost:
        return (
            f"the end of the answer is cut in {rows_of(cut.answers_cut + cut.lost, total)}, {cut.lost:,} are left out "
            f"because none of it is left, {example}; raise {limit}, or choose --truncation left"
        )
    if cut.dropped:
        return (
            f"{rows_of(cut.dropped, total)} are left out by --truncation {config.truncation}, {example}; raise {limit}"
        )
    return ""
