"""The leak guard: what stands in the training rows and in the validation rows.

A model is judged on rows that it was not trained on, or the validation loss measures its memory. Four things are
looked for: whole rows, prompts, dialogues, and levels of a game; see docs/leaks.md.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from dsft.dataset.folding import sort_key
from dsft.dataset.splitting import join_rows, rows_to_split_off, split_off
from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.dataset.tokens import TokenDataset

OnLeak = Literal["warn", "error", "drop_val", "drop_train", "ignore"]


class SeparationFlags(Protocol):
    """The flags that say what becomes of rows on both sides."""

    val_fraction: float | None
    on_leak: OnLeak
    seed: int


@dataclass(frozen=True)
class Matches:
    """What one kind of leak was found in.

    val: int64 [matches], the validation rows, ascending
    train: int64 [matches], the first training row that each of them matches
    distinct: how many different rows, prompts, dialogues or levels of the validation set that are
    """

    val: np.ndarray
    train: np.ndarray
    distinct: int

    def __len__(self) -> int:
        return len(self.val)

    def examples(self, count: int = 3) -> list[tuple[int, int]]:
        """Some (validation row, training row)."""
        return list(zip(self.val[:count].tolist(), self.train[:count].tolist(), strict=True))


@dataclass(frozen=True)
class Leaks:
    """What two datasets have in common. Where nothing leaks it is false.

    rows: the same tokens and targets.
    prompts: the same prompt, whatever the answer.
    dialogues: rows of one dialogue, by the definition of dsft.dataset.folding.find_dialogues over both sets.
    levels: the same level of a game, whichever seed made it.
    val_rows, train_rows: int64 [rows], ascending: all rows of the dialogues and levels that both sets have, and of
        those that these touch in turn. Without the ones or the others, nothing leaks.
    """

    rows: Matches
    prompts: Matches
    dialogues: Matches
    levels: Matches
    val_rows: np.ndarray
    train_rows: np.ndarray

    def __bool__(self) -> bool:
        return len(self.val_rows) > 0

    def summary(self, train: "TokenDataset", val: "TokenDataset") -> str:
        """The counts and an example, in words."""
        kinds = (
            (self.rows, "whole rows", "is a copy of"),
            (self.prompts, "prompts", "has the prompt of"),
            (self.dialogues, f"rows of {self.dialogues.distinct} dialogues", "is of the dialogue of"),
            (self.levels, f"rows of {self.levels.distinct} levels", "is of the level of"),
        )
        found = [kind for kind in kinds if len(kind[0])]
        (val_row, train_row), relation = found[0][0].examples(1)[0], found[0][2]
        return (
            f"{len(self.val_rows)} of {len(val)} validation rows leak from the training rows "
            f"({', '.join(f'{len(matches)} {kind}' for matches, kind, _ in found)}): "
            f"{val.place(val_row)} {relation} {train.place(train_row)}"
        )


def find_leaks(train: "TokenDataset", val: "TokenDataset") -> Leaks:
    """Compare hashes of rows, prompts and levels, and the beginnings of dialogues by binary search.

    For n training and m validation dialogues of about l tokens that takes m log(n) comparisons of l tokens, and memory
    for some numbers a row.
    """
    dialogues = _common_dialogues(train, val)
    levels = train.level, val.level
    rows = train.row_hash, val.row_hash
    group = join_rows([np.concatenate(pair) for pair in (dialogues, levels, rows)])
    train_group, val_group = group[: len(train)], group[len(train) :]
    common = np.intersect1d(train_group, val_group)
    return Leaks(
        rows=_match(*rows),
        prompts=_match(train.prompt_hash, val.prompt_hash),
        dialogues=_match(*dialogues),
        levels=_match(*levels),
        val_rows=np.flatnonzero(np.isin(val_group, common)),
        train_rows=np.flatnonzero(np.isin(train_group, common)),
    )


def rows_to_drop(
    train: "TokenDataset", val: "TokenDataset", on_leak: OnLeak, warn: Callable[[str], None]
) -> tuple[np.ndarray, str]:
    """Look for leaks and do as --on_leak says.

    Returns:
        int64 [rows], ascending: rows that the training set (drop_train) or the validation set (drop_val) must lose; and
        a line that says so, empty where there are none.

    Raises:
        UserError: there are leaks and on_leak is error, or nothing would be left.
    """
    nothing = np.empty(0, np.int64), ""
    if on_leak == "ignore":
        return nothing
    leaks = find_leaks(train, val)
    if not leaks:
        return nothing
    told = leaks.summary(train, val)
    if on_leak == "error":
        raise UserError(f"{told}; name other --val_files, or let --on_leak drop_val or drop_train leave them out")
    if on_leak == "warn":
        warn(f"{told}; --on_leak drop_val or drop_train leaves them out, --on_leak ignore says nothing")
        return nothing
    side, data, dropped = (
        ("validation", val, leaks.val_rows) if on_leak == "drop_val" else ("training", train, leaks.train_rows)
    )
    if len(dropped) == len(data):
        raise UserError(f"--on_leak {on_leak} leaves no {side} row: {told}; name other --val_files")
    return dropped, f"--on_leak {on_leak} leaves out {len(dropped)} of {len(data)} {side} rows: {told}"


@dataclass(frozen=True)
class Separation:
    """Which rows train and which validate. It is small, so one rank can find it for all.

    split: int64 [rows], training rows that validate; None where none are split off
    drop_train, drop_val: int64 [rows], rows that --on_leak leaves out
    text: what is left out, in one line; empty where nothing is
    """

    split: np.ndarray | None = None
    drop_train: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    drop_val: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    text: str = ""

    def apply(self, train: "TokenDataset", val: "TokenDataset | None") -> "tuple[TokenDataset, TokenDataset | None]":
        """The rows that train and those that validate."""
        if self.split is not None:
            return split_off(train, self.split)
        return train.without(self.drop_train), None if val is None else val.without(self.drop_val)


def separate(
    train: "TokenDataset", val: "TokenDataset | None", flags: SeparationFlags, warn: Callable[[str], None]
) -> Separation:
    """Split off a validation set, or look for what the one given has in common with the training rows.

    Raises:
        UserError: what the flags ask for cannot be done, or --on_leak error finds something.
    """
    if flags.val_fraction is not None:
        return Separation(split=rows_to_split_off(train, flags.val_fraction, flags.seed))
    if val is None:
        return Separation()
    rows, text = rows_to_drop(train, val, flags.on_leak, warn)
    if flags.on_leak == "drop_train":
        return Separation(drop_train=rows, text=text)
    return Separation(drop_val=rows, text=text)


def _match(train: np.ndarray, val: np.ndarray) -> Matches:
    """Validation rows whose key stands in the training set, by keys of any integers, [rows] each; 0 is none."""
    known, first = np.unique(train, return_index=True)
    place = np.minimum(np.searchsorted(known, val), len(known) - 1)
    rows = np.flatnonzero((known[place] == val) & (val != 0))
    return Matches(rows, first[place[rows]], len(np.unique(val[rows])))


def _common_dialogues(train: "TokenDataset", val: "TokenDataset") -> tuple[np.ndarray, np.ndarray]:
    """Number the dialogues of both sets together, from 1: int64 [training rows], int64 [validation rows].

    All rows of a dialogue begin with its shortest prompt: of two rows that are linked, the one begins with the other's
    prompt, and so with every prompt that this one begins with. So two dialogues are one where the shortest prompt of
    the one is the beginning of the other's. Within a set none is, and they are sorted: the beginning of a prompt can
    only be the last one before it, and those that begin with it follow it in a row.
    """
    train_firsts, train_index = _shortest_prompts(train)
    val_firsts, val_index = _shortest_prompts(val)
    train_number = np.arange(1, len(train_firsts) + 1)
    val_number = np.arange(1, len(val_firsts) + 1) + len(train_firsts)

    def train_key(row: int) -> bytes:
        return sort_key(train.prompt(row))

    for dialogue, row in enumerate(val_firsts):
        own = sort_key(val.prompt(row))
        place = bisect_left(train_firsts, own, key=train_key)
        if place and own.startswith(train_key(train_firsts[place - 1])):
            val_number[dialogue] = train_number[place - 1]
        while place < len(train_firsts) and train_key(train_firsts[place]).startswith(own):
            train_number[place] = val_number[dialogue]
            place += 1
    return train_number[train_index], val_number[val_index]


def _shortest_prompts(data: "TokenDataset") -> tuple[list[int], np.ndarray]:
    """A row with the shortest prompt of each dialogue, sorted by their tokens; and which of them is each row's."""
    order = np.lexsort((data.prompt_ends - data.prompt_starts, data.dialogue))
    _, first, index = np.unique(data.dialogue[order], return_index=True, return_inverse=True)
    number = np.empty(len(data), np.int64)
    number[order] = index
    return order[first].tolist(), number
