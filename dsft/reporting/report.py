"""The report on one or more runs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pandas as pd

from dsft.checkpointing.inspection import CheckpointSummary
from dsft.config import ReportConfig, TrainConfig
from dsft.config.report import HTML
from dsft.config.train import VAL_LOSS
from dsft.config.values import default_text, value_text
from dsft.files import guard_disk, write_text
from dsft.reporting.curves import Curve, draw
from dsft.reporting.document import Block, Mono, as_markdown, fenced, heading, paragraph, table
from dsft.reporting.eval_reports import EvalReport, find_eval_reports, result_tables, samples, sources
from dsft.reporting.html import figures, folded, page
from dsft.reporting.runs import Run, data_figures, read_runs
from dsft.text import printable

# key, title, unit, whether it is noisy
CHARTS = (
    ("train/loss", "Training loss", "per target token", True),
    ("val/loss", "Validation loss", "per target token", True),
    ("train/lr", "Learning rate", "of AdamW", False),
    ("train/grad_norm", "Gradient norm", "before clipping", True),
    ("train/effective_tokens_per_second", "Throughput", "tokens/s", True),
)
NOT_CONFIGURATION = ("config", "debug")
UNKNOWN = "unknown"


def write_report(config: ReportConfig) -> tuple[Path, Path]:
    """Write the report as HTML and as Markdown, and return the two paths.

    Raises:
        UserError: a folder that is not a run, a file that is not a report of dsft.validate, or a disk that refuses.
    """
    runs = read_runs(config.runs)
    title, blocks = build_report(runs, find_eval_reports(runs, config.eval_reports or []), config.samples)
    target = Path(os.path.expanduser(config.output)) if config.output else runs[0].root / f"report{HTML}"
    markdown = target.with_suffix(".md")
    guard_disk(lambda: target.parent.mkdir(parents=True, exist_ok=True), target.parent)
    guard_disk(lambda: write_text(target, page(title, blocks)), target)
    guard_disk(lambda: write_text(markdown, as_markdown([heading(1, title), *blocks])), markdown)
    return target, markdown


def build_report(runs: Sequence[Run], eval_reports: Sequence[EvalReport], count: int) -> tuple[str, list[Block]]:
    """Title and blocks of the report, with `count` samples of each task."""
    several = len(runs) > 1
    names = ", ".join(run.name for run in runs)
    blocks: list[Block] = [_overview(runs)]
    blocks += [paragraph(f"Note: {note}.") for run in runs for note in run.notes]
    blocks += result_tables(eval_reports, several=several)
    blocks += [heading(2, "Curves"), *_charts(runs)]
    blocks += [heading(2, "Configuration"), *_configuration(runs)]
    blocks += [heading(2, "Data"), _by_run(runs, [data_figures(run) for run in runs])]
    blocks += [heading(2, "Checkpoints"), *_each(runs, [_checkpoints(run) for run in runs])]
    shown = [samples(run, eval_reports, count) for run in runs]
    blocks += [heading(2, "Answers before and after"), *_each(runs, shown)] if any(shown) else []
    blocks += [heading(2, "Versions"), _by_run(runs, [run.state.versions if run.state else {} for run in runs], "")]
    blocks += [folded("Reports of dsft.validate", [sources(eval_reports, several=several)])] if eval_reports else []
    commands = [[fenced(run.command, "bash")] if run.command else [] for run in runs]
    if any(commands):
        note = paragraph("Name another output folder: in the same one, the run resumes.")
        blocks += [heading(2, "Reproduce"), note, *_each(runs, commands)]
    return f"{'Runs' if several else 'Run'} {printable(names)}", blocks


def _each(runs: Sequence[Run], blocks: Sequence[Sequence[Block]]) -> list[Block]:
    """What there is of each run, under its name if there are several."""
    several = len(runs) > 1
    named = [[heading(3, run.name), *own] if several else own for run, own in zip(runs, blocks, strict=True) if own]
    return [block for own in named for block in own]


def _by_run(runs: Sequence[Run], facts: Sequence[dict[str, str]], missing: str = UNKNOWN) -> str:
    """A row for each fact, a column for each run."""
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    if not names:
        return paragraph("Unknown.")
    head = ["", *(run.name if len(runs) > 1 else "" for run in runs)]
    return table(head, [[name, *(str(of_run.get(name, missing)) for of_run in facts)] for name in names])


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        train, val = run.curve("train/loss"), run.curve("val/loss")
        ranks = f", ranks: {run.state.world_size}" if run.state is not None else ""
        rows.append(
            (
                Mono(run.name),
                Mono(run.flags.get("model", UNKNOWN)),
                f"{run.flags.get('backend', UNKNOWN)}{ranks}",
                run.status,
                f"{train.iloc[-1]:.6f}" if len(train) else "none",
                f"{val.min():.6f} at step {val.idxmin()}" if len(val) else "none",
                f"{val.iloc[-1]:.6f}" if len(val) else "none",
            )
        )
    head = ("run", "model", "backend", "status", "train/loss, last", "val/loss, best", "val/loss, last")
    return table(head, rows, right=(4, 5, 6))


def _charts(runs: Sequence[Run]) -> list[Block]:
    drawings, missing = [], []
    for key, title, unit, noisy in _with_sources(runs):
        curves = [_curve(run, key, color) for color, run in enumerate(runs)]
        drawn = [curve for curve in curves if len(curve.points)]
        absent = [run.name for run, curve in zip(runs, curves, strict=True) if not len(curve.points)]
        if drawn:
            words = "; ".join(f"{curve.name}: {_ends(curve.points)}" for curve in drawn)
            drawings.append((draw(title, unit, drawn, noisy=noisy), printable(f"{title} ({unit}): {words}")))
        if absent:
            missing.append(f"{title.lower()} (none from {', '.join(absent)})" if len(runs) > 1 else title.lower())
    blocks: list[Block] = [figures(drawings)] if drawings else []
    return blocks + ([paragraph(f"No values: {'; '.join(missing)}.")] if missing else [])


def _with_sources(runs: Sequence[Run]) -> Iterator[tuple[str, str, str, bool]]:
    """CHARTS, and after each loss those of the sources of a mixture."""
    names = dict.fromkeys(str(name) for run in runs for name in run.metrics.columns)
    for key, title, unit, noisy in CHARTS:
        yield key, title, unit, noisy
        own = [name for name in names if name.startswith(f"{key}/")]
        yield from ((name, f"{title} of {name.removeprefix(f'{key}/')}", unit, noisy) for name in own)


def _curve(run: Run, key: str, color: int) -> Curve:
    points = run.curve(key)
    best = [line.state.step for line in run.checkpoints if "best" in line.links and line.state is not None]
    marked = [step for step in best if key == run.flags.get("best_by", VAL_LOSS) and step in points.index]
    return Curve(printable(run.name), color, points, (marked[0], points[marked[0]]) if marked else None)


def _ends(points: "pd.Series[float]") -> str:
    first, last = points.index[0], points.index[-1]
    start = f"{points[first]:.6g} at step {first}, " if first != last else ""
    return f"{start}{points[last]:.6g} at step {last}"


def _configuration(runs: Sequence[Run]) -> list[Block]:
    """What differs between runs, or from the defaults; everything else folded."""
    names = dict.fromkeys(name for run in runs for name in run.flags if name not in NOT_CONFIGURATION)
    if not names:
        return [paragraph("config.yaml is missing.")]
    defaults = {f.name: default_text(f) for f in fields(TrainConfig)}
    several = len(runs) > 1
    differing: list[list[str]] = []
    same: list[list[str]] = []
    for name in names:
        values = [value_text(run.flags[name]) if name in run.flags else UNKNOWN for run in runs]
        default = defaults.get(name, UNKNOWN)
        # A flag that an older run did not have yet was at its default.
        in_effect = {default if several and value == UNKNOWN else value for value in values}
        is_same = len(in_effect) == 1 if several else values == [default]
        cells = [value for value in values if value != UNKNOWN][:1] if is_same else values
        (same if is_same else differing).append([Mono(f"--{name}"), *map(Mono, cells)])
    head = ["flag", *(run.name if several else "value" for run in runs)]
    blocks: list[Block] = [table(head, differing) if differing else paragraph("All flags are the same.")]
    summary = "Flags that are the same" if several else "Flags at their defaults"
    return blocks + ([folded(summary, [table(["flag", "value"], same)])] if same else [])


def _checkpoints(run: Run) -> list[Block]:
    remarks = {"not compared": ""}  # checksums are not compared here
    rows = [[Mono(line.name), *line.cells()[1:], remarks.get(line.verdict, line.verdict)] for line in run.checkpoints]
    head = [*CheckpointSummary.HEAD[:-1], "links", ""]
    return [table(head, rows, right=(1, 2, 3, 4)) if rows else paragraph("None yet.")]
