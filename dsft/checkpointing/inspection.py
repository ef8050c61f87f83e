"""What a checkpoint or a run's folder holds, for a person to read. It loads no torch and changes nothing."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open

from dsft.checkpointing.integrity import COMPLETE, DamagedError, damages, listed_files
from dsft.checkpointing.layout import METRICS, NAME
from dsft.checkpointing.state import CONFIG, STATE, TrainerState, read_flags, read_state
from dsft.errors import UserError, did_you_mean_path
from dsft.files import reason
from dsft.units import size_text

SET_ASIDE = re.compile(r"checkpoint-(\d{6,})\.(damaged|superseded)(\.\d+)?")
UNFINISHED = re.compile(r"\.checkpoint-(\d{6,})\.tmp")
UNKNOWN = "-"
LINKS = ("best", "latest")


@dataclass(frozen=True)
class Report:
    """What `inspect` has found."""

    lines: list[str]
    problem: str | None
    """What is wrong, in one line; nothing where all is sound, or was not read."""


def inspect(path: str, *, verify: bool) -> Report:
    """Describe one checkpoint, or all of a run.

    Args:
        path: of a checkpoint, or of a run's output folder.
        verify: read all files, and compare their checksums.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    folder = Path(path).expanduser()
    try:
        if not folder.is_dir():
            meant = did_you_mean_path(path)
            raise UserError(f"{path}: no such folder{meant}; name a checkpoint, or a run's output folder")
        resolved = folder.resolve()
        if _place(resolved) is not None or (folder / STATE).exists() or (folder / COMPLETE).exists():
            return _checkpoint(resolved, verify=verify)
        return _run(folder, verify=verify)
    except OSError as error:
        place = error.filename or path
        raise UserError(f"{place} cannot be read: {reason(error)}; make it readable, or name another") from error


def _place(path: Path) -> int | None:
    """The step in the name of a checkpoint, whole or not; None for another file's name."""
    match = NAME.fullmatch(path.name) or SET_ASIDE.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)
    return int(match[1]) if match else None


def _by_step(path: Path) -> tuple[int, str]:
    return _place(path) or 0, path.name


# One checkpoint


def _checkpoint(folder: Path, *, verify: bool) -> Report:
    problems: list[str] = []
    facts = [("checkpoint", str(folder))]
    facts += _facts(lambda: _state_facts(folder, read_state(folder)), STATE, problems)
    facts += _facts(lambda: _flag_facts(read_flags(folder)), CONFIG, problems)
    unfinished = _is_unfinished(folder)
    wrong = {} if unfinished else {damage.path.name: damage for damage in damages(folder, compare=verify)}
    present = {path.name for path in folder.iterdir()}
    more = set() if unfinished or COMPLETE in wrong else present - listed_files(folder).keys() - {COMPLETE}
    rows, sizes = [], []
    for name in sorted(present | set(wrong)):
        row, size, damage = _file(folder / name, wrong.get(name), "not in COMPLETE" if name in more else "")
        rows.append(row)
        sizes.append(size)
        if damage is not None:
            wrong[name] = damage
    table = _table(["file", "size", "tensors", "values", ""], rows, right=(1, 2, 3))
    verdict = "sound: every file is as it was written" if verify else "not compared (--verify False)"
    if unfinished:
        problems = [f"{folder} has no {COMPLETE} file: its writing was interrupted, or goes on; name another"]
        verdict = "unfinished"
    elif wrong or problems:
        problems = [str(damage) for damage in wrong.values()] or problems
        verdict = f"not sound: {len(wrong) or len(problems)} of {len(rows)} files"
    facts.append(("size", f"{size_text(sum(sizes))} in {len(rows)} files"))
    return Report([*_columns(facts), "", *table, "", *_columns([("checksums", verdict)])], _counted(problems))


def _facts(read: Callable[[], list[tuple[str, str]]], file: str, problems: list[str]) -> list[tuple[str, str]]:
    """What a file says, or that it is damaged."""
    try:
        return read()
    except UserError as error:
        problems.append(str(error))
        return [(file, "cannot be read")]


def _state_facts(folder: Path, state: TrainerState) -> list[tuple[str, str]]:
    epochs, batches = state.position
    val_loss = "none" if state.val_loss is None else f"{state.val_loss:.6f}"
    if state.validation_due:
        val_loss = "due: the run was stopped before it"
    best = "none"
    if state.best_step is not None:
        best = f"step {state.best_step}, val/loss {state.best_val_loss:.6f}"
        best += ", this one" if state.best_step == state.step else ""
    return [
        ("step", f"{state.step} of {state.total_steps}"),
        ("epoch", f"{state.epoch:.4g}; whole epochs: {epochs}, batches of the next one: {batches}"),
        ("backend", f"{state.backend}, ranks: {state.world_size}"),
        ("train/loss", _train_loss(folder / METRICS)),
        ("val/loss", val_loss),
        ("best", best),
        ("versions", ", ".join(f"{name} {number}" for name, number in state.versions.items())),
    ]


def _train_loss(metrics: Path) -> str:
    """Of the checkpoint's own step."""
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
        kinds = "".join(
            f", {name}" for flag, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if flags.get(flag)
        )
        lora = f"rank {text('lora_rank')}, alpha {text('lora_alpha')}, {text('target_modules')}{kinds}"
    return [
        ("model", text("model")),
        ("LoRA", lora),
        ("data", text("train_files")),
        ("batch", f"{text('train_batch_size')} rows"),
        ("lr", f"{text('lr')}, {text('schedule')}, warmup {text('warmup_ratio')}"),
        ("seed", text("seed")),
    ]


def _file(path: Path, wrong: DamagedError | None, remark: str) -> tuple[list[str], int, DamagedError | None]:
    """A row of the table, the file's bytes, and what is wrong with it."""
    if not path.is_file():
        return [path.name, UNKNOWN, "", "", wrong.what if wrong else remark], 0, wrong
    tensors, values = "", ""
    if path.suffix == ".safetensors":
        try:
            shapes = _shapes(path)
            tensors, values = f"{len(shapes):,}", f"{sum(map(math.prod, shapes)):,}"
        except (OSError, SafetensorError) as error:
            wrong = wrong or DamagedError(path, f"is damaged ({error})")
    size = path.stat().st_size
    return [path.name, size_text(size), tensors, values, wrong.what if wrong else remark], size, wrong


def _shapes(path: Path) -> list[list[int]]:
    with safe_open(path, framework="np") as handle:
        return [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118 (no dict)


# A run


@dataclass(frozen=True)
class Line:
    """One of a run's checkpoints, as a table shows it."""

    name: str
    state: TrainerState | None
    """Nothing where it cannot be read."""
    size: int
    """Bytes."""
    links: list[str]
    """Which of best and latest show to it."""
    verdict: str
    problem: str | None
    is_whole: bool
    HEAD: ClassVar = ("checkpoint", "step", "epoch", "val/loss", "size", "")

    def cells(self) -> list[str]:
        """What stands under HEAD."""
        return [self.name, *_progress(self.state), size_text(self.size), ", ".join(self.links)]


def checkpoints_of(root: Path, *, verify: bool) -> list[Line]:
    """A run's checkpoints by their steps, also those that are unfinished or set aside.

    Raises:
        OSError: the folder cannot be read.
    """
    links = {name: (root / name).resolve() for name in LINKS if (root / name).is_symlink()}
    lines = []
    for path in sorted((p for p in root.iterdir() if _place(p) is not None and p.is_dir()), key=_by_step):
        verdict, problem, state = _judge(path, verify=verify)
        if not path.exists():
            continue  # the run goes on, and has renamed or deleted it meanwhile
        pointing = [name for name, target in links.items() if target == path.resolve()]
        is_whole = NAME.fullmatch(path.name) is not None and not _is_unfinished(path)
        lines.append(Line(path.name, state, _bytes(path), pointing, verdict, problem, is_whole))
    return lines


def _run(root: Path, *, verify: bool) -> Report:
    lines = checkpoints_of(root, verify=verify)
    if not lines and not (root / CONFIG).is_file():
        raise UserError(f"{root}: no checkpoint, and no run of dsft; name a checkpoint, or a run's output folder")
    facts = [("run", str(root.resolve()))]
    whole = [line.state for line in lines if line.is_whole and line.state is not None]
    facts += [("step", f"{whole[-1].step} of {whole[-1].total_steps}")] if whole else []
    targets = {name: (root / name).resolve() for name in LINKS if (root / name).is_symlink()}
    facts += [
        (n, f"shows to {target.name}, which is not there") for n, target in targets.items() if not target.exists()
    ]
    table = _table([*Line.HEAD, ""], [[*line.cells(), line.verdict] for line in lines], right=(1, 2, 3, 4))
    problems = [line.problem for line in lines if line.problem]
    return Report([*_columns(facts), "", *(table if lines else ["no checkpoints"])], _counted(problems))


def _is_unfinished(checkpoint: Path) -> bool:
    return not (checkpoint / COMPLETE).exists()


def _judge(checkpoint: Path, *, verify: bool) -> tuple[str, str | None, TrainerState | None]:
    """What is told of a run's checkpoint, the problem that it is, and its state where that can be read."""
    try:
        state = read_state(checkpoint)
    except UserError:
        state = None
    aside = SET_ASIDE.fullmatch(checkpoint.name)
    if aside:
        return f"set aside: {aside[2]}", None, state
    if _is_unfinished(checkpoint) or UNFINISHED.fullmatch(checkpoint.name):
        return "unfinished", None, state
    for damage in damages(checkpoint, compare=verify):
        return f"not sound: {damage.path.name} {damage.what}", str(damage), state
    return "sound" if verify else "not compared", None, state


def _progress(state: TrainerState | None) -> list[str]:
    if state is None:
        return [UNKNOWN] * 3
    return [str(state.step), f"{state.epoch:.4g}", UNKNOWN if state.val_loss is None else f"{state.val_loss:.6f}"]


def _bytes(folder: Path) -> int:
    try:
        return sum(p.lstat().st_size for p in folder.iterdir())
    except FileNotFoundError:  # files come and go while the run goes on
        return 0


# Text


def _counted(problems: Sequence[str]) -> str | None:
    """The first one, and how many more there are: one line."""
    if not problems:
        return None
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _columns(facts: Sequence[tuple[str, str]]) -> list[str]:
    return [_plain(f"{name:<11} {text}") for name, text in facts]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Aligned columns; those in `right` hold numbers."""
    lines = [[_plain(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        .rstrip()
        for line in lines
    ]  # fmt: skip


def _plain(text: str) -> str:
    """Without what would move a terminal's cursor; the text may come from a damaged file."""
    return "".join(c if c.isprintable() else "?" for c in text)
