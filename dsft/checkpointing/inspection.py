"""What dsft.checkpoint prints about a checkpoint or a run. It does not load torch and changes nothing."""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open

from dsft.checkpointing.folder import METRICS, NAME
from dsft.checkpointing.integrity import COMPLETE, damages, listed_files
from dsft.checkpointing.state import CONFIG, STATE, TrainerState, read_flags, read_state
from dsft.config.train import VAL_LOSS
from dsft.errors import UserError, did_you_mean_path
from dsft.files import reason
from dsft.units import size_text

SET_ASIDE = re.compile(r"checkpoint-(\d{6,})\.(damaged|superseded)(\.\d+)?")
UNFINISHED = re.compile(r"\.checkpoint-(\d{6,})\.tmp")
UNKNOWN = "-"
LINKS = ("best", "latest")


@dataclass(frozen=True)
class Report:
    """The result of `inspect`."""

    lines: list[str]
    problem: str | None
    """What is wrong, in one line; None if everything is intact or was not verified."""


def inspect(path: str, *, verify: bool) -> Report:
    """Describe a checkpoint, or all checkpoints of a run.

    Args:
        path: of a checkpoint, or a run's output folder.
        verify: read all files and compare their checksums.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    folder = Path(path).expanduser()
    try:
        if not folder.is_dir():
            meant = did_you_mean_path(path)
            raise UserError(f"{path}: no such folder{meant}; give a checkpoint, or a run's output folder")
        resolved = folder.resolve()
        if _step_of(resolved) is not None or (folder / STATE).exists() or (folder / COMPLETE).exists():
            return _checkpoint(resolved, verify=verify)
        return _run(folder, verify=verify)
    except OSError as error:
        place = error.filename or path
        raise UserError(f"{place} cannot be read: {reason(error)}; make it readable, or choose another") from error


def _step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint, complete or not; None for other names."""
    match = NAME.fullmatch(path.name) or SET_ASIDE.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)
    return int(match[1]) if match else None


# One checkpoint


def _checkpoint(folder: Path, *, verify: bool) -> Report:
    problems: list[str] = []
    facts = [("checkpoint", str(folder))]
    facts += _facts(lambda: _state_facts(folder, read_state(folder)), STATE, problems)
    facts += _facts(lambda: _flag_facts(read_flags(folder)), CONFIG, problems)
    unfinished = not (folder / COMPLETE).exists()
    wrong = {} if unfinished else {damage.path.name: damage.what for damage in damages(folder, compare=verify)}
    present = {path.name for path in folder.iterdir()}
    more = set() if unfinished or COMPLETE in wrong else present - listed_files(folder).keys() - {COMPLETE}
    rows, total = [], 0
    for name in sorted(present | set(wrong)):
        path = folder / name
        cells = [UNKNOWN, "", ""]
        if path.is_file():
            total += path.stat().st_size
            cells = [size_text(path.stat().st_size), "", ""]
            try:
                if path.suffix == ".safetensors":
                    cells[1:] = _counts(path)
            except (OSError, SafetensorError) as error:
                wrong.setdefault(name, f"is damaged ({error})")
        rows.append([name, *cells, wrong.get(name, f"not in {COMPLETE}" if name in more else "")])
    verdict = "all files are intact" if verify else "not verified (--verify False)"
    if unfinished:
        problems = [f"{folder} has no {COMPLETE} file: saving it was interrupted, or is in progress; choose another"]
        verdict = "incomplete"
    elif wrong or problems:
        problems = [f"{folder / name} {what}" for name, what in wrong.items()] or problems
        verdict = f"{len(problems)} of {len(rows)} files are damaged"
    facts.append(("size", f"{size_text(total)} in {len(rows)} files"))
    table = _table(["file", "size", "tensors", "values", ""], rows, right=(1, 2, 3))
    return Report([*_columns(facts), "", *table, "", *_columns([("checksums", verdict)])], _summary(problems))


def _facts(read: Callable[[], list[tuple[str, str]]], file: str, problems: list[str]) -> list[tuple[str, str]]:
    """The content of a file, or that it is damaged."""
    try:
        return read()
    except UserError as error:
        problems.append(str(error))
        return [(file, "cannot be read")]


def _state_facts(folder: Path, state: TrainerState) -> list[tuple[str, str]]:
    epochs, batches = state.position
    val_loss = "none" if state.val_loss is None else f"{state.val_loss:.6f}"
    by_source = [(name, f"{loss:.6f}") for name, loss in state.val_losses.items() if name != VAL_LOSS]
    if state.validation_due:
        val_loss = "pending: the run was stopped before it"
    best = "none"
    if state.best_step is not None:
        best = f"step {state.best_step}, {state.best_by} {state.best_loss:.6f}"
        best += ", this checkpoint" if state.best_step == state.step else ""
    return [
        ("step", f"{state.step} of {state.total_steps}"),
        ("epoch", f"{state.epoch:.4g}: {epochs} completed, {batches} batches of the next one"),
        ("backend", f"{state.backend}, ranks: {state.world_size}"),
        ("train/loss", _train_loss(folder / METRICS)),
        (VAL_LOSS, val_loss),
        *by_source,
        ("best", best),
        ("versions", ", ".join(f"{name} {number}" for name, number in state.versions.items())),
    ]


def _train_loss(metrics: Path) -> str:
    """At the checkpoint's own step."""
    try:
        for line in reversed(metrics.read_text(encoding="utf-8").splitlines()):
            values = json.loads(line)
            if "train/loss" in values:
                return f"{values['train/loss']:.6f}"
    except (OSError, ValueError, TypeError):
        pass
    return "unknown"


def _flag_facts(flags: dict[str, Any]) -> list[tuple[str, str]]:
    def text(name: str) -> str:
        value = flags.get(name, "unknown")
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    lora = "none: full fine-tuning"
    if flags.get("lora_rank"):
        kinds = [name for flag, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if flags.get(flag)]
        lora = ", ".join([f"rank {text('lora_rank')}, alpha {text('lora_alpha')}, {text('target_modules')}", *kinds])
    return [
        ("model", text("model")),
        ("LoRA", lora),
        ("data", text("train_files")),
        ("batch", f"{text('train_batch_size')} rows"),
        ("lr", f"{text('lr')}, {text('schedule')}, warmup {text('warmup_ratio')}"),
        ("seed", text("seed")),
    ]


def _counts(path: Path) -> list[str]:
    """The number of tensors, and of their elements."""
    with safe_open(path, framework="np") as handle:
        shapes = [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118 (not a dict)
    return [f"{len(shapes):,}", f"{sum(map(math.prod, shapes)):,}"]


# A run


@dataclass(frozen=True)
class CheckpointSummary:
    """A row in the table of a run's checkpoints."""

    name: str
    state: TrainerState | None
    """None if it cannot be read."""
    size: int
    """Bytes."""
    links: list[str]
    """Which of best and latest point to it."""
    verdict: str
    problem: str | None
    HEAD: ClassVar = ("checkpoint", "step", "epoch", "val/loss", "size", "")

    @property
    def is_complete(self) -> bool:
        """Neither being written nor set aside."""
        return NAME.fullmatch(self.name) is not None and self.verdict != "incomplete"

    def cells(self) -> list[str]:
        """The values of the columns in HEAD."""
        progress, state = [UNKNOWN] * 3, self.state
        if state is not None:
            val_loss = UNKNOWN if state.val_loss is None else f"{state.val_loss:.6f}"
            progress = [str(state.step), f"{state.epoch:.4g}", val_loss]
        return [self.name, *progress, size_text(self.size), ", ".join(self.links)]


def checkpoints_of(root: Path, *, verify: bool) -> list[CheckpointSummary]:
    """A run's checkpoints in the order of their steps, including those that are incomplete or set aside.

    Raises:
        OSError: the folder cannot be read.
    """
    links = {name: (root / name).resolve() for name in LINKS if (root / name).is_symlink()}
    found = [path for path in root.iterdir() if _step_of(path) is not None and path.is_dir()]
    summaries = []
    for path in sorted(found, key=lambda path: (_step_of(path), path.name)):
        verdict, problem, state = _examine(path, verify=verify)
        with suppress(FileNotFoundError):  # the run is going on, and may rename or delete it
            size = sum(p.lstat().st_size for p in path.iterdir())
            pointing = [name for name, target in links.items() if target == path.resolve()]
            summaries.append(CheckpointSummary(path.name, state, size, pointing, verdict, problem))
    return summaries


def _examine(checkpoint: Path, *, verify: bool) -> tuple[str, str | None, TrainerState | None]:
    """Its verdict, its problem, and its state if that can be read."""
    try:
        state = read_state(checkpoint)
    except UserError:
        state = None
    aside = SET_ASIDE.fullmatch(checkpoint.name)
    if aside:
        return f"set aside: {aside[2]}", None, state
    if not NAME.fullmatch(checkpoint.name) or not (checkpoint / COMPLETE).exists():
        return "incomplete", None, state
    for damage in damages(checkpoint, compare=verify):
        return f"{damage.path.name} {damage.what}", str(damage), state
    return "intact" if verify else "not verified", None, state


def _run(root: Path, *, verify: bool) -> Report:
    summaries = checkpoints_of(root, verify=verify)
    if not summaries and not (root / CONFIG).is_file():
        raise UserError(f"{root} is neither a checkpoint nor a run of dsft; choose another folder")
    facts = [("run", str(root.resolve()))]
    complete = [summary.state for summary in summaries if summary.is_complete and summary.state is not None]
    facts += [("step", f"{complete[-1].step} of {complete[-1].total_steps}")] if complete else []
    targets = {name: (root / name).resolve() for name in LINKS if (root / name).is_symlink()}
    facts += [(name, f"dangling link to {path.name}") for name, path in targets.items() if not path.exists()]
    rows = [[*summary.cells(), summary.verdict] for summary in summaries]
    table = _table([*CheckpointSummary.HEAD, ""], rows, right=(1, 2, 3, 4)) if rows else ["no checkpoints"]
    return Report([*_columns(facts), "", *table], _summary([s.problem for s in summaries if s.problem]))


# Text


def _summary(problems: Sequence[str]) -> str | None:
    """The first problem and the number of others, in one line."""
    if not problems:
        return None
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _columns(facts: Sequence[tuple[str, str]]) -> list[str]:
    return [_plain(f"{name:<11} {text}") for name, text in facts]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Aligned columns; those in `right` to the right. rich would wrap them to the terminal's width, also in a pipe."""
    lines = [[_plain(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        .rstrip()
        for line in lines
    ]  # fmt: skip


def _plain(text: str) -> str:
    """Without control characters; the text may come from a damaged file."""
    return "".join(c if c.isprintable() else "?" for c in text)
