"""What a report consists of, before it is HTML or Markdown. All text in it is plain: its writers escape it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Mono(str):
    """A cell that is a name, a value or a path: shown with letters of equal width."""

    __slots__ = ()


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table.

    head: of the columns
    rows: cells of each row, as many as the head has
    right: columns of numbers, aligned on the right
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()


@dataclass(frozen=True)
class Lines:
    """Text whose lines and spaces are kept: a command, an answer."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, as an <svg> element. Markdown shows its words alone."""

    svg: str
    words: str


@dataclass(frozen=True)
class Beside:
    """Texts to compare, each under its name: side by side where there is room."""

    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """What is long and seldom read: shown when its summary is clicked."""

    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Text | Table | Lines | Figure | Beside | Folded


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    blocks: Sequence[Block]


def printable(text: str) -> str:
    """Text that every reader can show: what is no character in UTF-8, or steers a terminal, becomes a mark.

    Answers of an untrained model and damaged files hold such things.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", errors="replace").decode("utf-8")
    return "".join(c if c in "\n\t" or not _is_control(c) else "\ufffd" for c in text)


def _is_control(c: str) -> bool:
    # C0 and C1, the line separators that Markdown or HTML would take for others, direction marks, non-characters
    n = ord(c)
    return n < 32 or 127 <= n < 160 or n in _STEERING or n & 0xFFFE == 0xFFFE or 0xFDD0 <= n <= 0xFDEF


_STEERING = {0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table that is also readable on a console; the cells are escaped already."""
    rows = [head, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
