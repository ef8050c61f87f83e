"""What a run's folder tells: flags, metrics, checkpoints, the commands to do it again. Nothing is changed."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsft.checkpointing.inspection import Line, checkpoints_of
from dsft.checkpointing.layout import METRICS, is_checkpoint
from dsft.checkpointing.state import CONFIG, TrainerState, read_flags
from dsft.config import GenerateConfig, MergeConfig, TrainConfig, ValidateConfig
from dsft.config.values import as_words, build
from dsft.errors import UserError
from dsft.files import reason
from dsft.text import duration

PIPELINE = "pipeline.json"
AGAIN = "-again"
OF_ONE_START = ("config", "debug", "resume", "resume_override", "stop_after_steps", "push_to_hub", "hub_private")
"""Flags that say how a run was gone on with, or publish it; the run itself does not depend on them."""


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl.

    steps: the lines of training steps, in their order
    evaluations: those of validations
    damaged: lines that cannot be read
    """

    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    damaged: int = 0

    def curve(self, *keys: str) -> list[tuple[int, float]]:
        """(step, value) by rising steps, where there is a finite value under one of the keys; a later key goes first.

        Keys that take turns are those of several versions of dsft, with which a run has been gone on.
        """
        found: dict[int, float] = {}
        for key in keys:
            lines = self.evaluations if key.startswith("val/") else self.steps
            found |= {int(line["step"]): line[key] for line in lines if math.isfinite(line.get(key, math.nan))}
        return sorted(found.items())


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    name: no other run of the same report has it
    root: the folder that was named: the run's, or the pipeline's around it
    folder: the run's output folder
    flags: of config.yaml; empty where it cannot be read
    pipeline: the flags of each of the pipeline's steps, if it is one
    notes: what could not be read, a sentence each
    """

    name: str
    root: Path
    folder: Path
    flags: dict[str, Any]
    metrics: Metrics
    checkpoints: list[Line]
    pipeline: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_pipeline(self) -> bool:
        """The run is a step of a pipeline, whose folder `root` is."""
        return self.folder != self.root

    @property
    def state(self) -> TrainerState | None:
        """Of the newest checkpoint."""
        states = [line.state for line in self.checkpoints if line.is_whole and line.state is not None]
        return states[-1] if states else None

    @property
    def steps_done(self) -> int:
        """By metrics.jsonl, which is ahead of the newest checkpoint."""
        return max([int(line["step"]) for line in self.metrics.steps], default=self.state.step if self.state else 0)

    @property
    def status(self) -> str:
        """How far it has come, in words."""
        state = self.state
        if state is not None and state.step >= state.total_steps and not state.validation_due:
            return f"finished after {state.step} steps"
        total = state.total_steps if state is not None else self.flags.get("total_training_steps")
        done = f"step {self.steps_done} of {total}" if total else f"step {self.steps_done}"
        return f"not finished: {done}; it still goes on, or was stopped"


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Every folder as a run, under names that tell them apart.

    Raises:
        UserError: a folder that is none, holds no run, or cannot be read; a folder named twice.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        run = _guarded(path)
        resolved = run.folder.resolve()
        if resolved in runs:
            raise UserError(f"{path} is the run of {runs[resolved].root} again; name each run once")
        runs[resolved] = run
    names = _names([run.root.resolve() for run in runs.values()])
    return [replace(run, name=name) for run, name in zip(runs.values(), names, strict=True)]


def _guarded(path: str) -> Run:
    try:
        return read_run(Path(os.path.expanduser(path)), path)
    except OSError as error:
        place = error.filename or path
        raise UserError(f"{place} cannot be read: {reason(error)}; make it readable, or name another") from error


def read_run(root: Path, told: str) -> Run:
    """One run.

    Args:
        root: a run's output folder, or that of a pipeline.
        told: how the user named it.

    Raises:
        UserError: it is neither.
        OSError: it cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{told}: no such folder; name a run's output folder, or a pipeline's")
    if is_checkpoint(root):
        raise UserError(f"{told} is one checkpoint; name its run's folder, {root.resolve().parent}")
    notes: list[str] = []
    is_pipeline = (root / PIPELINE).is_file()
    folder = root / "train" if is_pipeline else root
    pipeline = _read_pipeline(root / PIPELINE, notes) if is_pipeline else {}
    if is_pipeline and not folder.is_dir():
        raise UserError(f"{told}: the pipeline has not begun to train; ask again once it has")
    checkpoints = checkpoints_of(folder, verify=False)
    if not checkpoints and not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        raise UserError(f"{told}: no run of dsft; name a run's output folder, or a pipeline's")
    flags: dict[str, Any] = {}
    try:
        flags = {str(name): value for name, value in read_flags(folder).items()}
    except UserError as error:
        notes.append(str(error).partition(";")[0])
    metrics = read_metrics(folder / METRICS)
    if metrics.damaged:
        count = f"{metrics.damaged} line is" if metrics.damaged == 1 else f"{metrics.damaged} lines are"
        notes.append(f"{folder / METRICS}: {count} damaged and left out")
    return Run(root.resolve().name, root, folder, flags, metrics, checkpoints, pipeline, notes)


def read_metrics(path: Path) -> Metrics:
    """metrics.jsonl as far as it can be read; empty where there is none.

    A last line without its end is not counted as damaged: a run that goes on may be writing it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Metrics([], [])
    *whole, unfinished = content.split(b"\n")
    metrics = Metrics([], [])
    damaged = 0
    for line in whole:
        values = _metrics_line(line)
        if values is not None:
            (metrics.evaluations if "val/loss" in values else metrics.steps).append(values)
        elif line.strip():
            damaged += 1
    last = _metrics_line(unfinished)
    if last is not None:
        (metrics.evaluations if "val/loss" in last else metrics.steps).append(last)
    return replace(metrics, damaged=damaged)


def _metrics_line(line: bytes) -> dict[str, float] | None:
    """The numbers of a line; None where it is no JSON object with a step."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or not 0 <= values["step"] < 1 << 53:
        return None
    numbers = {}
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with suppress(OverflowError):
                numbers[name] = float(value)
    return numbers


def _read_pipeline(path: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(step): dict(values["flags"]) for step, values in stored.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        notes.append(f"{path} cannot be read")
        return {}


def _names(roots: Sequence[Path]) -> list[str]:
    """Of each folder as many of its last names as tell it from the others."""
    for length in range(1, 1 + max(len(root.parts) for root in roots)):
        names = ["/".join(root.parts[-length:]) for root in roots]
        if len(set(names)) == len(names):
            break
    return names


# What can be said of it


def data_figures(run: Run) -> list[tuple[str, str]]:
    """Name and text of what the run has read: its files, rows, tokens, targets, fold ratio and time."""
    flags, lines = run.flags, run.metrics.steps
    figures = [(name, listed(flags[name])) for name in ("train_files", "val_files") if flags.get(name)]
    if run.is_pipeline:
        figures += _levels(run.root / "data" / "generate.json")
    rows = _rows(flags.get("train_files"), flags.get("max_train_rows"))
    if rows is not None:
        figures.append(("rows", f"{rows:,} in the files as they are now"))
    if lines:
        per_epoch = [line for line in lines if line.get("epoch", 0) <= 1]
        whole = any(line.get("epoch") == 1 for line in lines) and len(per_epoch) == int(per_epoch[-1]["step"])
        read, during = (per_epoch, "in the first epoch") if whole else (lines, f"in the {len(lines)} steps told of")
        for name in ("tokens", "targets"):
            total = sum(_number(line, name) for line in read)
            if total:
                figures.append((name, f"{total:,.0f} {during}"))
        folded = [line for line in lines if 0 < line.get("train/fold_ratio", 0) < math.inf]
        computed = sum(_number(line, "tokens") / line["train/fold_ratio"] for line in folded)
        if computed:
            ratio = sum(_number(line, "tokens") for line in folded) / computed
            figures.append(("fold ratio", f"{ratio:.2f} tokens of rows for each that was computed"))
        seconds = sum(_number(line, "step_seconds") for line in lines)
        if seconds:
            figures.append(("time in steps", duration(seconds)))
    if run.state is not None:
        figures.append(("fingerprint of the tokenised rows", run.state.data))
    return figures


def _number(line: dict[str, float], name: str) -> float:
    """Of a step's line; 0 where there is none, or a damaged file has something else there."""
    value = line.get(f"train/{name}", 0.0)
    return value if math.isfinite(value) else 0.0


def _levels(generated: Path) -> list[tuple[str, str]]:
    """What dsft.generate has made for a pipeline."""
    try:
        levels = json.loads(generated.read_text(encoding="utf-8"))["levels"]
        return [("levels", f"{int(levels['train']):,} to train on, {int(levels['test']):,} to validate with")]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _rows(names: Any, at_most: Any) -> int | None:
    """Rows of parquet files, by their own headers; None where one cannot be read any more."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    from dsft.dataset.readers import find_files

    try:
        total = sum(read_metadata(path).num_rows for path in find_files(names, "train_files"))
    except (UserError, OSError, ArrowException, TypeError, AttributeError):
        return None
    return min(total, at_most) if isinstance(at_most, int) else total


def listed(value: Any) -> str:
    """A flag's value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def commands(run: Run) -> list[str]:
    """The command lines that do it again, in a shell's words: one, or those of a pipeline's steps.

    They work in another folder, where they do not go on with what is there, nor refuse to overwrite it.
    """
    ranks = run.state.world_size if run.state is not None else 1
    if run.pipeline:
        known: list[tuple[str, Any]] = [("generate", GenerateConfig), ("train", TrainConfig), ("merge", MergeConfig)]
        known.append(("validate", ValidateConfig))
        before = str(Path(str(run.pipeline.get("generate", {}).get("output_dir", run.root / "data"))).parent)
        steps = [(name, kind, run.pipeline[name]) for name, kind in known if name in run.pipeline]
        made = [_command(name, kind, _moved(flags, before), ranks) for name, kind, flags in steps]
    else:
        folder = str(run.flags.get("output_dir", run.folder)).rstrip("/") + AGAIN
        made = [training_command(run.flags | {"output_dir": folder}, ranks)] if run.flags else []
    return [line for line in made if line is not None]


def _moved(value: Any, before: str) -> Any:
    """Flags of a pipeline's step, with its folder replaced in every path below it."""
    if isinstance(value, dict):
        return {name: _moved(inner, before) for name, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, before) for inner in value]
    below = isinstance(value, str) and value.startswith(f"{before}/")
    return f"{before}{AGAIN}{value[len(before) :]}" if below else value


def training_command(flags: dict[str, Any], ranks: int) -> str | None:
    """The command line of config.yaml's flags; None where this version of dsft would refuse them."""
    return _command("train", TrainConfig, flags, ranks)


def _command(name: str, config_class: Any, flags: dict[str, Any], ranks: int) -> str | None:
    known = {f.name for f in fields(config_class)}
    values = {flag: value for flag, value in flags.items() if flag in known and flag not in OF_ONE_START}
    try:
        words = as_words(build(config_class, values))
    except UserError:
        return None
    several = ["torchrun", "--standalone", "--nproc_per_node", str(ranks)]
    start = several if ranks > 1 and name == "train" else ["python"]
    return shlex.join([*start, "-m", f"dsft.{name}", *words])
