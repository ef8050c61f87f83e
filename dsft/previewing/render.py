"""A preview as text on a terminal or in a pipe, as a page of HTML, and as JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

import dsft
from dsft.files import guard_disk, write_text
from dsft.previewing.preview import Preview
from dsft.previewing.rows import CLOSE, OPEN, RowView, plain_text
from dsft.previewing.statistics import Batches, Bin, Folding, SetStatistics
from dsft.reporting.document import Block, fenced, heading, paragraph, table
from dsft.reporting.html import marked, page
from dsft.text import visible_text

STYLES = {"ok": "green", "warning": "yellow", "refused": "bold red"}
BAR = 40  # characters of the histogram's longest bar


def statistics_lines(preview: Preview) -> Iterator[str]:
    """The statistics, aligned; of a group only the first line is named."""
    for name, group in groupby(_named_lines(preview), key=lambda line: line[0]):
        for index, (_, text) in enumerate(group):
            yield f"{'' if index else name:<9} {text}"


def _named_lines(preview: Preview) -> Iterator[tuple[str, str]]:
    for name, of in (("train", preview.train), ("val", preview.val)):
        if of is not None:
            yield from ((name, text) for text in _set_lines(of))
    if preview.folding is not None:
        used, why = preview.folding.used.replace("off", "neither"), preview.folding.why
        yield "fold", f"{_fold_text(preview.folding)}; training uses {used}{why and f' ({why})'}"
    if preview.val_folding is not None:
        yield "fold", f"validation: {_fold_text(preview.val_folding)}"
    if preview.batches is not None:
        yield from _batch_lines(preview.batches)
    if preview.needs is not None:
        yield "memory", f"{preview.needs.memory_text()}; {preview.needs.computes}"
        yield from (("sharding", text) for text in preview.shardings)
        if math.isfinite(preview.needs.step_seconds):
            yield "time", preview.needs.time_text()
    if preview.train is not None:
        yield "lengths", "tokens per row before truncation"
        yield from (("lengths", bar) for bar in histogram_lines(preview.train.lengths))


def _set_lines(of: SetStatistics) -> Iterator[str]:
    yield f"{of.rows:,} rows, {of.tokens:,} tokens, {of.targets:,} targets ({of.target_share:.1%})"
    yield from filter(None, (of.format, of.conversations_text))
    yield from map(str, of.sources)
    yield f"{of.shortest:,} to {of.longest:,} tokens per row, mean {of.mean:,.0f}, median {of.median:,.0f}"
    if of.rows_cut or of.rows_dropped:
        dropped = f"{of.rows_dropped:,} rows with {of.tokens_dropped:,} tokens dropped"
        yield f"{of.rows_cut:,} rows cut by {of.tokens_cut:,} tokens, {dropped}"
    if of.rows_without_weight:
        yield f"{of.rows_without_weight:,} rows have nothing to learn"
    if of.duplicates:
        yield f"{of.duplicates:,} rows repeat an earlier one"
    yield f"padding would be {of.padding:.1%} in random batches, {of.padding_to_max_length:.1%} to max_length"


def _fold_text(folding: Folding) -> str:
    return f"{folding.trees:.2f}x fewer tokens with prefix trees, {folding.chains:.2f}x with chains"


def _batch_lines(batches: Batches) -> Iterator[tuple[str, str]]:
    rows, micro_batches = (f"{mean:,.1f}".removesuffix(".0") for mean in (batches.rows, batches.micro_batches))
    yield (
        "batch",
        f"{rows} rows, {batches.tokens:,.0f} tokens and {batches.targets:,.0f} targets per step; "
        f"{micro_batches} micro-batch{'' if micro_batches == '1' else 'es'} of at most {batches.token_budget:,} tokens "
        f"on {'1 rank' if batches.ranks == 1 else f'each of {batches.ranks:,} ranks'}",
    )
    if batches.ranks > 1:
        each = f"each rank computes {batches.computed_per_rank:,.0f} tokens per step"
        yield "batch", f"{each}; the slowest takes {batches.imbalance:.1%} longer than the mean"
    sample = f" (averaged over {batches.planned} of them)" if batches.planned < batches.steps_first_epoch else ""
    yield "steps", f"{batches.steps_first_epoch:,} per epoch{sample}, {batches.steps:,} in all"


def histogram_lines(bins: Sequence[Bin]) -> list[str]:
    """The histogram as text, one line per bin; every bin that is not empty has a bar."""
    most = max(b.rows for b in bins)
    ends = [f"{b.low:,}" if b.low == b.high else f"{b.low:,} to {b.high:,}" for b in bins]
    width, count_width = max(map(len, ends)), max(len(f"{b.rows:,}") for b in bins)
    return [
        f"{end:>{width}}  {b.rows:>{count_width},}  {'█' * math.ceil(BAR * b.rows / most)}".rstrip()
        for end, b in zip(ends, bins, strict=True)
    ]


# On a terminal, or in a pipe


def show(preview: Preview, stream: TextIO) -> None:
    """Print it: in colour on a terminal, with marks alone elsewhere."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)
    with console.capture() as captured:  # at a closed pipe rich would end the process by itself
        _print(preview, console)
    stream.write(captured.get())


def _print(preview: Preview, console: Console) -> None:
    for row in preview.rows:
        console.print(Text(_head(row), style="bold"))
        console.print(coloured(row) if console.is_terminal else Text(plain_text(row)))
        console.print()
    for line in statistics_lines(preview):
        console.print(Text(visible_text(line)))
    console.print()
    for finding in preview.findings:
        kind = Text(f"{finding.kind:<9} ", style=STYLES[finding.kind])
        console.print(kind.append(_one_line(f"{finding.name}: {finding.text}"), style="not bold default"))


def _one_line(text: str) -> str:
    return visible_text(" ".join(text.split()))


def _head(row: RowView) -> str:
    head = f"row {row.number} ({row.place}): {row.tokens:,} tokens, {row.targets:,} targets, from {OPEN} to {CLOSE}"
    weight = "" if row.weight == 1 else f"; weight {row.weight:g}"
    return _one_line(head + weight + (f"; {row.cut}" if row.cut else ""))


def coloured(row: RowView) -> Text:
    """Targets green between their marks; special tokens bold, and magenta where they are not targets."""
    text = Text()
    for is_target, spans in groupby(row.spans, key=lambda span: span.is_target):
        text.append(OPEN if is_target else "", style="bold green")
        for span in spans:
            colour = "green" if is_target else "magenta" if span.is_special else ""
            text.append(visible_text(span.text), style=f"bold {colour}" if span.is_special else colour)
        text.append(CLOSE if is_target else "", style="bold green")
    return text


# Files


def write_files(preview: Preview, html: str | None, json: str | None) -> None:
    """Write the page of HTML and the JSON, where they are asked for.

    Raises:
        UserError: one of them cannot be written.
    """
    for name, make in ((html, as_page), (json, as_json)):
        if name is not None:
            path = Path(name).expanduser()
            guard_disk(partial(write_text, path, make(preview)), path)


def as_json(preview: Preview) -> str:
    """Statistics and findings, without the rows' text."""
    values: dict[str, Any] = {"version": dsft.__version__, "refused": preview.problem is not None}
    for name in ("train", "val", "batches", "folding", "val_folding"):
        values[name] = asdict(value) if (value := getattr(preview, name)) is not None else None
    values["needs"] = preview.needs and {"computes": preview.needs.computes, **preview.needs.as_dict()}
    values["findings"] = [asdict(finding) for finding in preview.findings]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def as_page(preview: Preview) -> str:
    """One self-contained page of HTML."""
    blocks: list[Block] = [
        heading(2, "Findings"),
        table(("result", "check", "finding"), [(f.kind, f.name, f.text) for f in preview.findings]),
        heading(2, "Statistics"),
        fenced("\n".join(statistics_lines(preview))),
        heading(2, "Rows"),
        paragraph("Targets have a coloured background; special tokens are bold."),
    ]
    for row in preview.rows:
        spans = [(span.text, span.is_target, span.is_special) for span in row.spans]
        blocks += [heading(3, _head(row)), marked(spans)]
    return page(preview.title, blocks)
