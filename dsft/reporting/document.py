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


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table that is also readable on a console; the cells are escaped already."""
    rows = [head, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
