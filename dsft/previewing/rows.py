"""Rows as the model will see them: which rows to show, and their tokens as text with the targets marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from dsft.dataset.readers import Cell
from dsft.dataset.tokens import Counts, DataFormat, count_targets, truncate_row
from dsft.errors import UserError
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
    where: file and row
    spans: all of its text, as it is trained on
    tokens, targets: how many it has
    cut: what truncation does to it; empty where it is whole
    """

    number: int
    where: str
    spans: list[Span]
    tokens: int
    targets: int
    cut: str = ""

    @property
    def learned(self) -> str:
        """The text of the targets."""
        return "".join(span.text for span in self.spans if span.is_target)


def choose_rows(lengths: np.ndarray, count: int, numbers: Sequence[int] | None = None) -> list[int]:
    """Which rows to show: the first, the longest, then evenly spread ones.

    Args:
        lengths: tokens of each row, int64 [rows].
        count: how many.
        numbers: these and no others.

    Raises:
        UserError: a number beyond the last row.
    """
    rows = len(lengths)
    if numbers is not None:
        beyond = [number for number in numbers if number >= rows]
        if beyond:
            raise UserError(
                f"--row_numbers {beyond[0]}: there are {rows} training rows; name numbers from 0 to {rows - 1}"
            )
        return list(dict.fromkeys(numbers))
    spread = [step * rows // max(1, count - 1) for step in range(1, count)]
    picks = [0, int(np.argmax(lengths)), *spread[:-1], rows - 1, *range(min(rows, count))]
    return list(islice(dict.fromkeys(pick for pick in picks if pick < rows), count))


def view_row(
    number: int,
    cell: Cell,
    row: tuple[np.ndarray, np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    data_format: DataFormat,
) -> RowView:
    """A row, cut to its length as the Trainer cuts it.

    Args:
        number: of the row.
        cell: where it stands.
        row: token ids int32 [length] and is-target bool [length], before any truncation.
        tokenizer: of the model.
        data_format: length and truncation.
    """
    tokens, is_target = row
    limit = f"{len(tokens):,} tokens are more than max_length {data_format.max_length}"
    try:
        kept = truncate_row(tokens, is_target, cell, data_format, Counts())
    except UserError:
        return _view(number, cell, row, tokenizer, f"refused: {limit}")
    if kept is None:
        why = limit if data_format.truncation == "drop" else f"{len(tokens):,} tokens leave no target within max_length"
        return _view(number, cell, row, tokenizer, f"dropped: {why}")
    lost = len(tokens) - len(kept[0])
    if not lost:
        return _view(number, cell, row, tokenizer, "")
    if data_format.truncation == "left":
        where, gone = "front of the prompt", tokens[:lost]
    else:
        targets = int(is_target[len(kept[0]) :].sum())
        where, gone = f"end, {targets:,} targets among them,", tokens[-lost:]
    text = _decode(tokenizer, gone)
    text = text if len(text) <= 120 else f"{text[:60]} … {text[-60:]}"
    return _view(number, cell, kept, tokenizer, f"{lost:,} tokens at the {where} are cut: {text!r}")


def _view(
    number: int, cell: Cell, row: tuple[np.ndarray, np.ndarray], tokenizer: PreTrainedTokenizerBase, cut: str
) -> RowView:
    tokens, is_target = row
    return RowView(
        number, str(cell), make_spans(tokens, is_target, tokenizer), len(tokens), count_targets(is_target), cut
    )


def make_spans(tokens: np.ndarray, is_target: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """A row's tokens (int32 [length]) and mask (bool [length]) as text.

    A stretch is decoded as a whole: one token may hold only a part of a character.
    """
    special = np.isin(tokens, list({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}))
    spans, start = [], 0
    for (learned, marked), group in groupby(zip(is_target.tolist(), special.tolist(), strict=True)):
        end = start + sum(1 for _ in group)
        spans.append(Span(_decode(tokenizer, tokens[start:end]), learned, marked))
        start = end
    return spans


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def plain_text(view: RowView) -> str:
    """A row for a pipe or a file: targets stand between ⟦ and ⟧."""
    parts = []
    for learned, group in groupby(view.spans, key=lambda span: span.is_target):
        text = visible_text("".join(span.text for span in group))
        parts.append(f"{OPEN}{text}{CLOSE}" if learned else text)
    return "".join(parts)
