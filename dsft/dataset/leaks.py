"""The leak guard: validation rows that are also training rows, or share a prompt, a dialogue or a game level with one.

A validation loss on rows that were trained on measures memory; see docs/leaks.md.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dsft.dataset.folding import sort_key
from dsft.dataset.splitting import join_rows, rows_to_split_off, split_off
from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.config import TrainConfig
    from dsft.dataset.tokens import TokenDataset

NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Matches:
    """What one kind of leak was found in.

    val: int64 [matches], the validation rows, ascending
    train: int64 [matches], the first training row that each of them matches
    distinct: number of different rows, prompts, dialogues or levels among them
    """

    val: np.ndarray
    train: np.ndarray
    distinct: int

    def __len__(self) -> int:
        return len(self.val)


@dataclass(frozen=True)
class Leaks:
    """What two datasets have in common; false where nothing leaks.

    rows: the same tokens and targets
    prompts: the same prompt, whatever the answer
    dialogues: rows of one dialogue, as dsft.dataset.folding.find_dialogues defines it, over both sets
    levels: the same level of a game, whichever seed made it
    val_rows, train_rows: int64 [rows], ascending: all rows of the dialogues and levels that are in both sets, and of
        those connected to them. Without the ones or the others, nothing leaks.
    """

    rows: Matches
    prompts: Matches
    dialogues: Matches
    levels: Matches
    val_rows: np.ndarray
    train_rows: np.ndarray

    def __bool__(self) -> bool:
        return len(self.val_rows) > 0

    def kinds(self) -> dict[str, Matches]:
        """The kinds that were found, by name."""
        kinds = {"row": self.rows, "prompt": self.prompts, "dialogue": self.dialogues, "level": self.levels}
        return {name: matches for name, matches in kinds.items() if len(matches)}

    def summary(self, train: "TokenDataset", val: "TokenDataset") -> str:
        """The counts and an example, in one line."""
        kinds = self.kinds()
        first = next(iter(kinds.values()))
        return (
            f"{len(self.val_rows):,} of {len(val):,} validation rows leak from the training rows "
            f"({', '.join(f'{len(matches):,} by {name}' for name, matches in kinds.items())}), "
            f"e.g. {val.place(int(first.val[0]))} from {train.place(int(first.train[0]))}"
        )


def find_leaks(train: "TokenDataset", val: "TokenDataset") -> Leaks:
    """Compare hashes of rows, prompts and levels, and the beginnings of dialogues by binary search.

    For n training and m validation dialogues of about l tokens, this takes m log(n) comparisons of l tokens, and memory
    for a few numbers per row.
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


@dataclass(frozen=True)
class Separation:
    """Which rows train and which validate. It is small, so one rank can decide for all.

    split: int64 [rows], training rows that validate; None where none are split off
    drop_train, drop_val: int64 [rows], rows that --on_leak drops
    leaks: what was found; None where nothing was looked for
    text: what is dropped, in one line; empty where nothing is
    """

    split: np.ndarray | None = None
    drop_train: np.ndarray = field(default_factory=NO_ROWS.copy)
    drop_val: np.ndarray = field(default_factory=NO_ROWS.copy)
    leaks: Leaks | None = None
    text: str = ""

    def apply(self, train: "TokenDataset", val: "TokenDataset | None") -> "tuple[TokenDataset, TokenDataset | None]":
        """The rows that train and those that validate."""
        if self.split is not None:
            return split_off(train, self.split)
        return train.without(self.drop_train), None if val is None else val.without(self.drop_val)


def separate(
    train: "TokenDataset", val: "TokenDataset | None", flags: "TrainConfig", warn: Callable[[str], None]
) -> Separation:
    """Split off a validation set, or look for leaks into the one given and do as --on_leak says.

    Raises:
        UserError: the rows cannot be split, --on_leak error finds a leak, or dropping would leave no row.
    """
    if flags.val_fraction is not None:
        return Separation(split=rows_to_split_off(train, flags.val_fraction, flags.seed))
    if val is None or flags.on_leak == "ignore":
        return Separation()
    leaks = find_leaks(train, val)
    if not leaks:
        return Separation(leaks=leaks)
    summary = leaks.summary(train, val)
    if flags.on_leak == "error":
        raise UserError(f"{summary}; choose other --val_files, or drop the rows with --on_leak drop_val or drop_train")
    if flags.on_leak == "warn":
        warn(f"{summary}; drop the rows with --on_leak drop_val or drop_train, or silence this with --on_leak ignore")
        return Separation(leaks=leaks)
    drop_val = flags.on_leak == "drop_val"
    name, data, dropped = ("validation", val, leaks.val_rows) if drop_val else ("training", train, leaks.train_rows)
    if len(dropped) == len(data):
        raise UserError(f"--on_leak {flags.on_leak} would leave no {name} row: {summary}; choose other --val_files")
    text = f"--on_leak {flags.on_leak} drops {len(dropped):,} of {len(data):,} {name} rows: {summary}"
    if drop_val:
        return Separation(drop_val=dropped, leaks=leaks, text=text)
    return Separation(drop_train=dropped, leaks=leaks, text=text)


def _match(train: np.ndarray, val: np.ndarray) -> Matches:
    """Validation rows whose key is in the training set; keys are integers, [rows] each, and 0 stands for no key."""
    known, first = np.unique(train, return_index=True)
    place = np.minimum(np.searchsorted(known, val), len(known) - 1)
    rows = np.flatnonzero((known[place] == val) & (val != 0))
    return Matches(rows, first[place[rows]], len(np.unique(val[rows])))


def _common_dialogues(train: "TokenDataset", val: "TokenDataset") -> tuple[np.ndarray, np.ndarray]:
    """Number the dialogues of both sets together, from 1: int64 [training rows], int64 [validation rows].

    All rows of a dialogue begin with its shortest prompt, so two dialogues are the same where the shortest prompt of
    one is a prefix of the other's. Within a set no shortest prompt is a prefix of another and they are sorted: a prefix
    of a prompt can only be the last one before it, and those that it is a prefix of follow it directly.
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
    """A row with the shortest prompt of each dialogue, sorted by tokens; and the index of each row's dialogue."""
    order = np.lexsort((data.rows["prompt"], data.dialogue))
    _, first, index = np.unique(data.dialogue[order], return_index=True, return_inverse=True)
    number = np.empty(len(data), np.int64)
    number[order] = index
    return order[first].tolist(), number
