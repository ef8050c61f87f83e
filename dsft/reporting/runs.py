"""Reads a run's folder: flags, the command that started it, metrics, checkpoints. Nothing is changed."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from dsft.checkpointing.folder import METRICS, is_checkpoint
from dsft.checkpointing.inspection import CheckpointSummary, checkpoints_of
from dsft.checkpointing.state import CONFIG, TrainerState, read_command, read_flags
from dsft.config.sources import read_sources
from dsft.config.values import value_text
from dsft.errors import UserError
from dsft.files import reason
from dsft.units import duration

PIPELINE = "pipeline.json"
OLDER = {"train/effective_tokens_per_second": "train/tokens_per_second"}  # the key in runs of earlier versions
LARGEST = 1e308  # NaN, infinity, and integers that no float can hold are not below it


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it.

    name: unique in the report
    root: the folder that was named: the run's, or the pipeline's around it
    folder: the run's output folder
    flags: of config.yaml; empty if it cannot be read
    command: that started the run or its pipeline, if config.yaml has it
    metrics: metrics.jsonl by step, a column for each key; NaN where a step has no finite value
    notes: what could not be read, a sentence each
    """

    name: str
    root: Path
    folder: Path
    flags: dict[str, Any]
    command: str | None
    metrics: pd.DataFrame
    checkpoints: list[CheckpointSummary]
    notes: list[str] = field(default_factory=list)

    @property
    def is_pipeline(self) -> bool:
        """Whether the run is a step of a pipeline, whose folder is `root`."""
        return self.folder != self.root

    @property
    def state(self) -> TrainerState | None:
        """Of the newest checkpoint."""
        states = [line.state for line in self.checkpoints if line.is_complete and line.state is not None]
        return states[-1] if states else None

    @property
    def status(self) -> str:
        """How far the run has come, in words."""
        state = self.state
        if state is not None and state.step >= state.total_steps and not state.validation_due:
            return f"finished after {state.step} steps"
        done = max(self.metrics.index, default=state.step if state else 0)  # ahead of the newest checkpoint
        total = state.total_steps if state is not None else self.flags.get("total_training_steps")
        return f"step {done}{f' of {total}' if total else ''}: still running, or stopped"

    def curve(self, key: str) -> "pd.Series[float]":
        """The values of a metric by step."""
        names = [name for name in (key, OLDER.get(key)) if name in self.metrics]
        return self.metrics[names].bfill(axis=1).iloc[:, 0].dropna() if names else pd.Series(dtype=float)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Every folder as a run, under names that tell them apart.

    Raises:
        UserError: a folder does not exist, holds no run, cannot be read, or is named twice.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        try:
            run = read_run(Path(os.path.expanduser(path)), path)
        except OSError as error:
            place = error.filename or path
            raise UserError(f"{place} cannot be read: {reason(error)}; make it readable, or choose another") from error
        resolved = run.folder.resolve()
        if resolved in runs:
            raise UserError(f"{path} and {runs[resolved].root} are the same run; name each run once")
        runs[resolved] = run
    names = _names([run.root.resolve() for run in runs.values()])
    return [replace(run, name=name) for run, name in zip(runs.values(), names, strict=True)]


def read_run(root: Path, typed: str) -> Run:
    """The run, or the pipeline's run, in the folder `root`, which the user has typed as `typed`.

    Raises:
        UserError: it is neither.
        OSError: it cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{typed}: no such folder; name the output folder of a run or a pipeline")
    if is_checkpoint(root):
        raise UserError(f"{typed} is a checkpoint; name its run's folder, {root.resolve().parent}")
    folder = root / "train" if (root / PIPELINE).is_file() else root
    if not folder.is_dir():
        raise UserError(f"{typed}: the pipeline has not started training yet; try again once it has")
    checkpoints = checkpoints_of(folder, verify=False)
    if not checkpoints and not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        raise UserError(f"{typed} is not a dsft run; name the output folder of a run or a pipeline")
    notes: list[str] = []
    flags: dict[str, Any] = {}
    try:
        flags = {str(name): value for name, value in read_flags(folder).items()}
    except UserError as error:
        notes.append(str(error).partition(";")[0])
    metrics, damaged = read_metrics(folder / METRICS)
    if damaged:
        count = f"{damaged} line is" if damaged == 1 else f"{damaged} lines are"
        notes.append(f"{folder / METRICS}: {count} damaged and left out")
    return Run(root.resolve().name, root, folder, flags, read_command(folder), metrics, checkpoints, notes)


def read_metrics(path: Path) -> tuple[pd.DataFrame, int]:
    """metrics.jsonl by step as far as it can be read, and the number of damaged lines.

    An incomplete last line is not counted as damaged: a running run may be writing it.
    """
    content = path.read_bytes() if path.exists() else b""
    *complete, last = content.split(b"\n")
    lines = [_metrics_line(line) for line in complete]
    damaged = sum(values is None and bool(line.strip()) for values, line in zip(lines, complete, strict=True))
    found = [values for values in (*lines, _metrics_line(last)) if values is not None]
    by_step = pd.DataFrame(found, columns=None if found else ["step"]).groupby("step").last()
    return by_step, damaged


def _metrics_line(line: bytes) -> dict[str, float] | None:
    """The finite numbers of a line; None where it is not a JSON object with a step."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or not 0 <= values["step"] < 1 << 53:
        return None
    finite = {k: float(v) for k, v in values.items() if type(v) in (int, float) and abs(v) < LARGEST}
    return finite | {"step": values["step"]}


def _names(roots: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    ends = (["/".join(root.parts[-length:]) for root in roots] for length in count(1))
    return next(names for names in ends if len(set(names)) == len(names))


# What a report says of it


def data_figures(run: Run) -> dict[str, str]:
    """What the run has read: files, rows, tokens, targets, fold ratio and time."""
    figures = {name: value_text(run.flags[name]) for name in ("train_files", "val_files") if run.flags.get(name)}
    if run.is_pipeline:
        figures |= _levels(run.root / "data" / "generate.json")
    rows = _rows(run.flags.get("train_files"), run.flags.get("max_train_rows"))
    if rows is not None:
        figures["rows"] = f"{rows:,} in the files as they are now"
    columns = {f"train/{name}": name for name in ("tokens", "targets", "fold_ratio", "step_seconds")}
    steps = run.metrics[run.metrics.filter(like="train/").notna().any(axis=1)]
    steps = steps.rename(columns=columns).reindex(columns=[*columns.values(), "epoch"])
    if len(steps):
        first = steps[steps["epoch"].fillna(0) <= 1]
        is_complete = (first["epoch"] == 1).any() and len(first) == first.index[-1]
        read, when = (first, "in the first epoch") if is_complete else (steps, f"in {len(steps)} logged steps")
        totals = read[["tokens", "targets"]].sum()
        figures |= {str(name): f"{total:,.0f} {when}" for name, total in totals.items() if total}
        folded = steps[steps["fold_ratio"] > 0]
        computed = (folded["tokens"] / folded["fold_ratio"]).sum()
        if computed:
            figures["fold ratio"] = f"{folded['tokens'].sum() / computed:.2f} row tokens per computed token"
        if seconds := steps["step_seconds"].sum():
            figures["time in steps"] = duration(seconds)
    if run.state is not None:
        figures["fingerprint of the tokenised rows"] = run.state.data
    return figures


def _levels(generated: Path) -> dict[str, str]:
    """What dsft.generate has made for a pipeline."""
    try:
        levels = json.loads(generated.read_text(encoding="utf-8"))["levels"]
        return {"levels": f"{int(levels['train']):,} for training, {int(levels['test']):,} for validation"}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _rows(names: Any, at_most: Any) -> int | None:
    """Rows of parquet files by their own headers; None if one cannot be read any more."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    from dsft.dataset.readers import find_files

    try:
        rows = [
            sum(read_metadata(path).num_rows for path in find_files(source.paths, "train_files"))
            for source in read_sources(names, "train_files")
        ]
    except (UserError, OSError, ArrowException, TypeError, AttributeError):
        return None
    return sum(min(count, at_most) if isinstance(at_most, int) else count for count in rows)
