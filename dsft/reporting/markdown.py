"""A report as Markdown (GitHub's), which also reads well as plain text."""

import re
from collections.abc import Sequence

from dsft.reporting.document import (
    Beside,
    Block,
    Document,
    Figure,
    Folded,
    Heading,
    Lines,
    Mono,
    Table,
    Text,
    aligned,
)
from dsft.text import printable

# & begins an entity, $ a formula; within a word an underscore is only itself.
SPECIAL = re.compile(r"([\\`*\[\]<>|#~&!$]|(?<![^\W_])_|_(?![^\W_]))")
LIST_MARK = re.compile(r"^([-+=]|\d+[.)])")


def as_markdown(document: Document) -> str:
    """The file's text."""
    return blocks_as_markdown([Heading(1, document.title), *document.blocks])


def blocks_as_markdown(blocks: Sequence[Block]) -> str:
    """Blocks, and an empty line between them."""
    return "\n\n".join(part for block in blocks for part in _parts(block)) + "\n"


def escape(text: str) -> str:
    """Plain text as one line of Markdown that shows it."""
    line = " ".join(printable(text).split())
    return SPECIAL.sub(r"\\\1", line)


def _paragraph(text: str) -> str:
    """Plain text that stands by itself, where a number and a point would begin a list."""
    return LIST_MARK.sub(lambda mark: mark[1][:-1] + "\\" + mark[1][-1], escape(text))


def code(text: str) -> str:
    """Plain text as a code span, in a table or out of it."""
    line = " ".join(printable(text).split())
    if not line:
        return ""
    if "|" in line or "\\" in line:  # within a table a code span cannot hold every mixture of these two
        return escape(line)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fenced(text: str, language: str = "") -> str:
    """Text as a code block, whatever it holds."""
    text = printable(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _cell(text: str) -> str:
    return code(text) if isinstance(text, Mono) else escape(text)


def _parts(block: Block) -> list[str]:
    match block:
        case Heading(level, text):
            return [f"{'#' * level} {escape(text)}"]
        case Text(text):
            return [_paragraph(text)]
        case Table(head, rows, _):
            return ["\n".join(aligned([_cell(c) for c in head], [[_cell(c) for c in row] for row in rows]))]
        case Lines(text, language):
            return [fenced(text, language)]
        case Figure(_, words):
            return [_paragraph(words)]
        case Beside(texts):
            return [part for name, text in texts for part in (f"{_paragraph(name)}:", fenced(text))]
        case Folded(summary, blocks):
            inner = [part for part_block in blocks for part in _parts(part_block)]
            return [f"**{escape(summary)}**", *inner]
