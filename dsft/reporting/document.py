"""A report, written once as Markdown (GitHub's) that also reads well as plain text; html.py makes the page from it.

Callers pass plain text: every function here escapes what it is given.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsft.text import printable

# & begins an entity, $ a formula; within a word an underscore is only itself.
SPECIAL = re.compile(r"([\\`*\[\]<>|#~&!$]|(?<![^\W_])_|_(?![^\W_]))")
LIST_MARK = re.compile(r"^([-+=]|\d+[.)])")


@dataclass(frozen=True)
class Spliced:
    """A block that Markdown cannot express, such as a chart: trusted HTML for the page, Markdown for the text file."""

    html: str
    markdown: str


Block = str | Spliced
"""Markdown, or a block with its own HTML."""


class Mono(str):
    """A table cell in a monospace font: a name, a value or a path."""

    __slots__ = ()


def as_markdown(blocks: Sequence[Block]) -> str:
    """The text of the .md file."""
    return "\n\n".join(block.markdown if isinstance(block, Spliced) else block for block in blocks) + "\n"


def heading(level: int, text: str) -> str:
    """A heading; level 1 is the title."""
    return f"{'#' * level} {escape(text)}"


def paragraph(text: str) -> str:
    """A paragraph; a number and a point at its start do not begin a list."""
    return LIST_MARK.sub(lambda mark: mark[1][:-1] + "\\" + mark[1][-1], escape(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table whose columns line up as plain text too; the columns in `right` are right-aligned on the page."""
    cells = [[code(cell) if isinstance(cell, Mono) else escape(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|".join("-" * (w + 1) + (":" if column in right else "-") for column, w in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def fenced(text: str, language: str = "") -> str:
    """A code block: lines and spaces are kept."""
    text = printable(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def escape(text: str) -> str:
    """Plain text as one line of Markdown."""
    return SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))


def code(text: str) -> str:
    """Plain text as a code span, inside a table or outside."""
    line = " ".join(printable(text).split())
    if not line or "|" in line or "\\" in line:  # in a table a code span cannot hold every mixture of these two
        return escape(line)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{line}{space}{ticks}"
