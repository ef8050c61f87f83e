"""Rows as the model will see them: which rows to show, and their tokens as text with the targets marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from dsft.config.flags import RowFlags
from dsft.dataset.readers import Cell
from dsft.dataset.token_files import Counts, count_targets
from dsft.dataset.tokens import truncate_row
from dsft.errors import UserError
from dsft.previewing.row_checks import excerpt
from dsft.text import visible_text

OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Span:
    """A stretch of a row's text whose tokens are all targets or none, and all special or none."""

    text: str
    is_target: bool
    is_special: bool


@dataclass(frozen=True)
class RowView:
    """One row.

    number: among all training rows, from 0
    place: file and row
    spans: its text as trained on; all of it where it is not trained on
    tokens, targets: their numbers
    cut: what truncation does to it; empty where it is whole
    weight: of its targets in the loss
    """

    number: int
    place: str
    spans: list[Span]
    tokens: int
    targets: int
    cut: str = ""
    weight: float = 1.0


def choose_rows(lengths: np.ndarray, count: int, numbers: Sequence[int] | None = None) -> list[int]:
    """`numbers`, else so many of the rows (lengths int64 [rows]): the first, the longest, then evenly spaced ones.

    Raises:
        UserError: a number beyond the last row.
    """
    rows = len(lengths)
    if numbers is not None:
        for number in numbers:
            if number >= rows:
                raise UserError(
                    f"--row_numbers {number}: there are {rows:,} training rows; use numbers from 0 to {rows - 1}"
                )
        return list(dict.fromkeys(numbers))
    spaced = [step * rows // max(1, count - 1) for step in range(1, count - 1)]
    picks = [0, int(np.argmax(lengths)), *spaced, rows - 1, *range(min(rows, count))]
    return list(islice(dict.fromkeys(picks), count))


def view_row(
    number: int, cell: Cell, row: tuple[np.ndarray, np.ndarray], tokenizer: PreTrainedTokenizerBase, flags: RowFlags
) -> RowView:
    """A row of token ids (int32 [length]) and is-target (bool [length]), truncated as in training."""
    tokens, is_target = row
    limit, cut = f"exceed max_length {flags.max_length:,}", ""
    try:
        kept = truncate_row(tokens, is_target, cell, flags, Counts())
    except UserError:
        kept, cut = row, f"refused: {len(tokens):,} tokens {limit}"
    if kept is None:
        reason = limit if flags.truncation == "drop" else "leave no target within max_length"
        kept, cut = row, f"dropped: {len(tokens):,} tokens {reason}"
    lost = len(tokens) - len(kept[0])
    if lost:
        gone, where = tokens[-lost:], f"end, including {int(is_target[-lost:].sum()):,} targets,"
        if flags.truncation == "left":
            gone, where = tokens[:lost], "start of the prompt"
        cut = f"{lost:,} tokens at the {where} are cut: {excerpt(_decode(tokenizer, gone), limit=120)}"
    return RowView(number, str(cell), make_spans(*kept, tokenizer), len(kept[0]), count_targets(kept[1]), cut)


def make_spans(tokens: np.ndarray, is_target: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """A row's tokens (int32 [length]) and mask (bool [length]) as text.

    A stretch is decoded as a whole: one token may hold only a part of a character.
    """
    special = np.isin(tokens, list({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}))
    bounds = np.flatnonzero((np.diff(is_target) != 0) | (np.diff(special) != 0)) + 1
    stretches = np.split(np.arange(len(tokens)), bounds)
    return [Span(_decode(tokenizer, tokens[s]), bool(is_target[s[0]]), bool(special[s[0]])) for s in stretches]


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def plain_text(view: RowView) -> str:
    """A row for a pipe or a file, with targets between ⟦ and ⟧."""
    parts = []
    for is_target, group in groupby(view.spans, key=lambda span: span.is_target):
        text = visible_text("".join(span.text for span in group))
        parts.append(f"{OPEN}{text}{CLOSE}" if is_target else text)
    return "".join(parts)
