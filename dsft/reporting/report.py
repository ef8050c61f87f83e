"""The report of one run or of several: what was asked, what was read, how it went, what came of it."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from dsft.checkpointing.inspection import CheckpointSummary
from dsft.config import ReportConfig, TrainConfig
from dsft.config.report import HTML
from dsft.config.values import default_text
from dsft.files import guard_disk, write_text
from dsft.reporting.curves import Curve, draw
from dsft.reporting.document import Block, Document, Figure, Folded, Heading, Lines, Mono, Table, Text
from dsft.reporting.eval_reports import Judgement, find_judgements, samples, sources, tables
from dsft.reporting.html import as_html
from dsft.reporting.markdown import as_markdown
from dsft.reporting.runs import Run, commands, data_figures, listed, read_runs
from dsft.text import printable

# key, title, unit, whether it is noisy
CHARTS = (
    ("train/loss", "Training loss", "per target token", True),
    ("val/loss", "Validation loss", "per target token", True),
    ("train/lr", "Learning rate", "of AdamW", False),
    ("train/grad_norm", "Gradient norm", "before clipping", True),
    ("train/effective_tokens_per_second", "Throughput", "tokens of rows a second", True),
)
HIDDEN = ("config", "debug")
UNKNOWN = "unknown"
OLDER = {"train/effective_tokens_per_second": "train/tokens_per_second"}  # what runs before it wrote


def write_report(config: ReportConfig) -> tuple[Path, Path]:
    """Write the report as HTML and as Markdown.

    Returns:
        Where they stand.

    Raises:
        UserError: no run where one was named, a file that is no report of dsft.validate, or a disk that refuses.
    """
    runs = read_runs(config.runs)
    document = tell(runs, find_judgements(runs, config.judgements or []), config.samples)
    target = Path(os.path.expanduser(config.output)) if config.output else runs[0].root / f"report{HTML}"
    guard_disk(lambda: target.parent.mkdir(parents=True, exist_ok=True), target.parent)
    beside = target.with_suffix(".md")
    guard_disk(lambda: write_text(target, as_html(document)), target)
    guard_disk(lambda: write_text(beside, as_markdown(document)), beside)
    return target, beside


def tell(runs: Sequence[Run], judgements: Sequence[Judgement], count: int) -> Document:
    """The report, with as many samples of each task."""
    several = len(runs) > 1
    blocks: list[Block] = [_overview(runs)]
    blocks += [Text(f"Note: {note}.") for run in runs for note in run.notes]
    blocks += tables(judgements, several=several)
    blocks += [Heading(2, "Curves"), *_charts(runs)]
    blocks += [Heading(2, "Configuration"), *_configuration(runs)]
    blocks += [Heading(2, "Data"), _side_by_side(runs, [dict(data_figures(run)) for run in runs])]
    blocks += [Heading(2, "Checkpoints"), *[block for run in runs for block in _checkpoints(run, several)]]
    told = [(run, samples(run, judgements, count)) for run in runs]
    if any(found for _, found in told):
        blocks.append(Heading(2, "Answers before and after"))
        for run, found in told:
            blocks += [Text(f"Run {run.name}:"), *found] if several and found else found
    blocks += [Heading(2, "Versions"), _side_by_side(runs, [_versions(run) for run in runs])]
    blocks += [Folded("Reports of dsft.validate", [sources(judgements, several=several)])] if judgements else []
    blocks += [Heading(2, "To do it again"), *[block for run in runs for block in _reproduce(run, several)]]
    names = ", ".join(run.name for run in runs)
    return Document(f"{'Runs' if several else 'Run'} {printable(names)}", blocks)


def _overview(runs: Sequence[Run]) -> Table:
    head = ("run", "model", "backend", "status", "train/loss, last", "val/loss, best", "val/loss, last")
    rows = []
    for run in runs:
        train, val = run.metrics.curve("train/loss"), run.metrics.curve("val/loss")
        best = min(val, key=lambda point: point[1], default=None)
        ranks = f", ranks: {run.state.world_size}" if run.state is not None else ""
        rows.append(
            (
                Mono(run.name),
                Mono(run.flags.get("model", UNKNOWN)),
                f"{run.flags.get('backend', 'unknown')}{ranks}",
                run.status,
                f"{train[-1][1]:.6f}" if train else "none",
                f"{best[1]:.6f} at step {best[0]}" if best else "none",
                f"{val[-1][1]:.6f}" if val else "none",
            )
        )
    return Table(head, rows, right=(4, 5, 6))


def _charts(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    missing = []
    for key, title, unit, noisy in CHARTS:
        curves = [curve for color, run in enumerate(runs) if (curve := _curve(run, key, color)) is not None]
        if curves:
            words = "; ".join(f"{c.name}: {_ends(c.points)}" for c in curves)
            svg = draw(title, unit, curves, noisy=noisy)
            blocks.append(Figure(svg, printable(f"{title} ({unit}): {words}")))
        drawn = {curve.color for curve in curves}
        absent = [run.name for color, run in enumerate(runs) if color not in drawn]
        if absent:
            missing.append(f"{title.lower()} (none from {', '.join(absent)})" if len(runs) > 1 else title.lower())
    if missing:
        blocks.append(Text(f"No values: {'; '.join(missing)}."))
    return blocks


def _curve(run: Run, key: str, color: int) -> Curve | None:
    points = run.metrics.curve(OLDER.get(key, key), key)
    if not points:
        return None
    best = None
    if key == "val/loss" and any("best" in line.links for line in run.checkpoints):
        steps = {line.state.step for line in run.checkpoints if "best" in line.links and line.state is not None}
        best = next((point for point in points if point[0] in steps), None)
    return Curve(printable(run.name), color, points, best)


def _ends(points: Sequence[tuple[int, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{end:.6g} at step {last}" if first == last else f"{start:.6g} at step {first}, {end:.6g} at step {last}"


def _configuration(runs: Sequence[Run]) -> list[Block]:
    """What differs between runs, or from the defaults; everything else folded."""
    names = list(dict.fromkeys(name for run in runs for name in run.flags if name not in HIDDEN))
    if not names:
        return [Text("config.yaml is missing.")]
    values = {name: [listed(run.flags[name]) if name in run.flags else UNKNOWN for run in runs] for name in names}
    defaults = {f.name: default_text(f) for f in fields(TrainConfig)}
    if len(runs) > 1:
        told = {name: {value for value in values[name] if value != UNKNOWN} for name in names}
        # A flag that an older run did not have yet was at its default.
        absent = {name for name in names if UNKNOWN in values[name] and told[name] != {defaults.get(name)}}
        differing = absent | {name for name in names if len(told[name]) > 1}
        summary = "Flags that are the same"
    else:
        differing = {name for name in names if values[name][0] != defaults.get(name)}
        summary = "Flags at their defaults"
    head = ["flag", *(run.name for run in runs)] if len(runs) > 1 else ["flag", "value"]
    shown: list[list[str]] = []
    same: list[list[str]] = []
    for name in names:
        is_shown = name in differing
        cells = values[name] if is_shown else [next(value for value in values[name] if value != UNKNOWN)]
        (shown if is_shown else same).append([Mono(f"--{name}"), *map(Mono, cells)])
    blocks: list[Block] = [Table(head, shown)] if shown else [Text("All flags are the same.")]
    return blocks + ([Folded(summary, [Table(["flag", "value"], same)])] if same else [])


def _side_by_side(runs: Sequence[Run], facts: Sequence[dict[str, str]]) -> Block:
    """A row a fact, a column a run."""
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    if not names:
        return Text("Unknown.")
    head = ["", *(run.name if len(runs) > 1 else "" for run in runs)]
    return Table(head, [[name, *(of_run.get(name, UNKNOWN) for of_run in facts)] for name in names])


def _versions(run: Run) -> dict[str, str]:
    return {str(name): str(number) for name, number in run.state.versions.items()} if run.state is not None else {}


def _checkpoints(run: Run, several: bool) -> list[Block]:
    title: list[Block] = [Heading(3, run.name)] if several else []
    if not run.checkpoints:
        return [*title, Text("There is none yet.")]
    rows = [[Mono(cells[0]), *cells[1:], _remark(line)] for line in run.checkpoints for cells in [line.cells()]]
    return [*title, Table([*CheckpointSummary.HEAD[:-1], "links", ""], rows, right=(1, 2, 3, 4))]


def _remark(line: CheckpointSummary) -> str:
    """Files are not compared with their checksums here, so of a whole checkpoint nothing is said."""
    return "" if line.verdict == "not verified" else line.verdict


def _reproduce(run: Run, several: bool) -> list[Block]:
    title: list[Block] = [Heading(3, run.name)] if several else []
    lines = commands(run)
    if not lines:
        return [*title, Text("This version of dsft cannot read the run's flags.")]
    return [*title, Lines("\n".join(lines), "bash")]
