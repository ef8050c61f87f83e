"""How a preview looks: on a terminal, as plain text, as a page of HTML, as JSON."""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

import dsft
from dsft.files import guard_disk, write_text
from dsft.previewing.preview import Preview
from dsft.previewing.rows import CLOSE, OPEN, RowView, Span, plain_text
from dsft.previewing.statistics import Batches, Bin, Folding, histogram_lines
from dsft.text import visible_text

STYLES = {"ok": "green", "warning": "yellow", "refused": "bold red"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: 1rem; border-radius: 6px; }}
td {{ padding: .1rem 1rem .1rem 0; vertical-align: top; }}
mark {{ background: #c9ecc4; border-left: 3px solid #2a7d1f; }}
b {{ color: #7a3aa8; font-weight: 600; }}
i {{ background: #6f9bc8; display: inline-block; height: .8rem; }}
.ok {{ color: #2a7d1f; }} .warning {{ color: #a15c00; }} .refused {{ color: #b00020; font-weight: 600; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def facts(preview: Preview) -> list[tuple[str, str]]:
    """Name and text of the figures, in the order in which they are shown; those that belong together share a name."""
    found = []
    for name, of in (("train", preview.train), ("val", preview.val)):
        if of is None:
            continue
        share = f"{100 * of.target_share:.1f} %"
        span = f"{of.shortest:,} to {of.longest:,} tokens a row, mean {of.mean:,.0f}, median {of.median:,.0f}"
        found += [
            (name, f"{of.rows:,} rows, {of.tokens:,} tokens, {of.targets:,} targets ({share})"),
            (name, span),
        ]
        if of.rows_cut or of.rows_dropped:
            cut = f"{of.rows_cut:,} rows cut by {of.tokens_cut:,} tokens"
            found.append((name, f"{cut}, {of.rows_dropped:,} rows with {of.tokens_dropped:,} tokens left out"))
        if of.duplicates:
            found.append((name, f"{of.duplicates:,} rows repeat an earlier one"))
        batch, longest = (f"{100 * share:.1f} %" for share in (of.padding, of.padding_to_max_length))
        padding = (
            f"padding would be {batch} if random batches were padded to their longest row, {longest} to max_length"
        )
        found.append((name, padding))
    if preview.folding is not None:
        found.append(("fold", f"{_folding_text(preview.folding)}; {_choice_text(preview.folding)}"))
    if preview.val_folding is not None:
        found.append(("fold", f"validation: {_folding_text(preview.val_folding)}"))
    if preview.batches is not None:
        found += _batch_facts(preview.batches)
        if preview.needs is not None:
            needs = preview.needs
            found += [("memory", f"{needs.memory_text()}; {needs.computes}"), ("time", needs.time_text())]
    return found


def _folding_text(folding: Folding) -> str:
    return f"{folding.trees:.2f} times fewer tokens by trees, {folding.chains:.2f} by chains"


def _choice_text(folding: Folding) -> str:
    if folding.used == "off":
        return f"training uses neither: {folding.why}"
    return f"training uses {folding.used}" + (f", because {folding.why}" if folding.why else "")


def _batch_facts(batches: Batches) -> list[tuple[str, str]]:
    rows = f"{batches.rows:,.1f} rows, {batches.tokens:,.0f} tokens and {batches.targets:,.0f} targets a step"
    ranks = f"{batches.ranks} rank{'s' if batches.ranks > 1 else ''}"
    parts = f"{ranks} x {batches.micro_batches:.1f} micro-batches of at most {batches.token_budget:,} tokens"
    sample = f" ({batches.planned} of them laid out here)" if batches.planned < batches.steps_first_epoch else ""
    steps = f"{batches.steps_first_epoch:,} in the first epoch{sample}, {batches.steps:,} in all"
    return [("batch", f"{rows}, as {parts}"), ("steps", steps)]


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
    for name, group in groupby(facts(preview), key=lambda fact: fact[0]):
        for index, (_, text) in enumerate(group):
            console.print(Text(visible_text(f"{'' if index else name:<9} {text}")))
    if preview.train is not None:
        console.print(Text(f"{'lengths':<9} rows by their number of tokens, before truncation"))
        for bar in histogram_lines(preview.train.lengths):
            console.print(Text(f"{'':<9} {bar}"))
    console.print()
    for finding in preview.findings:
        line = Text(f"{finding.kind:<9} ", style=STYLES[finding.kind])
        console.print(line.append(_one_line(f"{finding.name}: {finding.text}"), style="not bold default"))


def _one_line(text: str) -> str:
    return visible_text(" ".join(text.split()))


def _head(row: RowView) -> str:
    head = f"row {row.number} ({row.where}): {row.tokens:,} tokens, {row.targets:,} targets, from {OPEN} to {CLOSE}"
    return _one_line(head + (f"; {row.cut}" if row.cut else ""))


def coloured(row: RowView) -> Text:
    """Targets green between their marks; special tokens bold, and magenta where they are read only."""
    text = Text()
    for learned, spans in groupby(row.spans, key=lambda span: span.is_target):
        if learned:
            text.append(OPEN, style="bold green")
        for span in spans:
            colour = "green" if learned else "magenta" if span.is_special else ""
            style = f"bold {colour}" if span.is_special else colour
            text.append(visible_text(span.text), style=style)
        if learned:
            text.append(CLOSE, style="bold green")
    return text


# Files


def write_files(preview: Preview, page: str | None, figures: str | None) -> None:
    """Write the page of HTML and the JSON, where they are asked for.

    Raises:
        UserError: one of them cannot be written.
    """
    for name, make in ((page, as_page), (figures, as_json)):
        if name is not None:
            _write(Path(name).expanduser(), make(preview))


def _write(path: Path, text: str) -> None:
    guard_disk(lambda: write_text(path, text), path)


def as_json(preview: Preview) -> str:
    """Figures and findings, without the rows' text."""
    values: dict[str, Any] = {"version": dsft.__version__, "refused": preview.problem is not None}
    for name in ("train", "val", "batches", "folding", "val_folding"):
        value = getattr(preview, name)
        values[name] = None if value is None else asdict(value)
    values["needs"] = None if preview.needs is None else preview.needs.as_dict()
    values["findings"] = [asdict(finding) for finding in preview.findings]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def as_page(preview: Preview) -> str:
    """One page of HTML that needs no other file and runs no script."""
    findings = [
        (f'<span class="{f.kind}">{f.kind}</span>', _escaped(f.name), _escaped(f.text)) for f in preview.findings
    ]
    figures = [(_escaped(name), _escaped(text)) for name, text in facts(preview)]
    parts = ["<h2>Findings</h2>", _table(findings), "<h2>Figures</h2>", _table(figures)]
    if preview.train is not None:
        parts += ["<h2>Tokens of a row, before truncation</h2>", _histogram(preview.train.lengths)]
    parts.append(
        "<h2>Rows</h2><p>What is learned has a <mark>background</mark>; <b>special tokens</b> are coloured.</p>"
    )
    for row in preview.rows:
        parts += [f"<h3>{_escaped(_head(row))}</h3>", f"<pre>\n{_marked(row.spans)}</pre>"]
    return PAGE.format(title=_escaped(preview.title), body="\n".join(parts))


def _escaped(text: str) -> str:
    return html.escape(visible_text(text))


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _histogram(bins: Sequence[Bin]) -> str:
    most = max(b.rows for b in bins)
    return _table(
        (f"{b.low:,} to {b.high:,}", f"{b.rows:,}", f'<i style="width: {400 * b.rows / most:.0f}px"></i>') for b in bins
    )


def _marked(spans: Sequence[Span]) -> str:
    """A row's text; what is learned in <mark>, special tokens in <b>."""
    parts = []
    for learned, group in groupby(spans, key=lambda span: span.is_target):
        text = "".join(f"<b>{_escaped(s.text)}</b>" if s.is_special else _escaped(s.text) for s in group)
        parts.append(f"<mark>{text}</mark>" if learned else text)
    return "".join(parts)
