"""A validation set split off the training rows: whole dialogues and levels, drawn by the seed alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.dataset.tokens import TokenDataset

SEARCHED = 1000  # rows for which the groups are chosen so that their number comes out; those before are just drawn


def rows_to_split_off(data: "TokenDataset", fraction: float, seed: int) -> np.ndarray:
    """The rows that validate: int64 [rows], ascending.

    Args:
        data: what is split.
        fraction: share of the rows that validate, above 0 and below 1; what comes nearest to it is taken.
        seed: of the drawing.

    Raises:
        UserError: the rows are all of one dialogue.
    """
    groups = join_rows([data.dialogue + 1, data.level, data.row_hash])
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise UserError(
            f"--val_fraction {fraction} splits whole dialogues, and all {len(data)} rows of --train_files belong to "
            "one (or to one level of a game); name --val_files instead"
        )
    # Apart from the stream that lays out the batches, which begins with the seed too.
    order = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0]).permutation(len(sizes))
    chosen = order[choose_sizes(sizes[order].tolist(), fraction * len(data))]
    return np.flatnonzero(np.isin(group, chosen))


def split_off(data: "TokenDataset", rows: np.ndarray) -> tuple["TokenDataset", "TokenDataset"]:
    """Training rows without those of `rows_to_split_off`, and these as a validation set."""
    train, val = data.without(rows), data.subset(rows)
    val.counts = replace(val.counts, rows_dropped=0, tokens_dropped=0)  # told once, with the training rows
    return train, val


def join_rows(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Number groups of rows: rows with an equal key are in one group, and so are those with a common neighbour.

    Args:
        keys: integers, [rows] each; a key is compared with those of the same array. 0 is none.

    Returns:
        int64 [rows], the first row of each row's group.
    """
    rows = len(keys[0])
    known = [np.flatnonzero(key) for key in keys]
    numbers = [np.unique(key[where], return_inverse=True)[1] for key, where in zip(keys, known, strict=True)]
    group, before = np.arange(rows), np.empty(0, np.int64)
    while not np.array_equal(group, before):
        before = group.copy()
        for where, number in zip(known, numbers, strict=True):
            least = np.full(len(where), rows)
            np.minimum.at(least, number, group[where])
            group[where] = least[number]
    return group


def choose_sizes(sizes: Sequence[int], wanted: float) -> list[int]:
    """Indices of sizes whose sum comes nearest to `wanted`; at least one, and not all. Of equals the smaller sum.

    Exact up to SEARCHED; of more, the first ones are taken as they come, and the rest makes up the difference. The sums
    that the first sizes can have are bits of a number, to which each further size adds those that lie by it higher.
    """
    taken: list[int] = []
    left: list[int] = []
    largest = wanted - SEARCHED
    for index, size in enumerate(sizes):
        if size > largest:
            left.append(index)
        elif size <= wanted - SEARCHED:
            taken.append(index)
            wanted -= size
        else:  # going on would use up the small ones, which make up the difference best
            left += range(index, len(sizes))
            break
    least = 0 if taken else 1
    most = sum(sizes[index] for index in left) - 1
    limit = min(most, max(int(2 * wanted) + 1, min(sizes[index] for index in left)))
    nearest = math.ceil(wanted - 0.5)
    reached, last = 1, {0: -1}  # sum -> index of the size that made it possible
    for index in left:
        new = (reached << sizes[index]) & ~reached & ((1 << (limit + 1)) - 1)
        reached |= new
        while new:
            bit = new & -new
            last[bit.bit_length() - 1] = index
            new ^= bit
        if least <= nearest <= limit and reached >> nearest & 1:
            break
    total = min((total for total in last if total >= least), key=lambda total: (abs(total - wanted), total))
    while total:
        taken.append(last[total])
        total -= sizes[last[total]]
    return taken
