"""Split a validation set off the training rows: whole dialogues and levels, drawn by the seed alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.dataset.tokens import TokenDataset

SEARCHED = 1000  # the last so many rows are chosen to meet the target exactly; those before are taken as drawn


def rows_to_split_off(data: "TokenDataset", fraction: float, seed: int) -> np.ndarray:
    """The rows that validate: int64 [rows], ascending; as near to `fraction` of them as whole dialogues allow.

    Raises:
        UserError: all rows are of one dialogue.
    """
    groups = join_rows([data.dialogue + 1, data.level, data.row_hash, data.file_row])
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise UserError(
            f"--val_fraction {fraction} splits off whole dialogues, but all {len(data)} rows of --train_files belong "
            "to one dialogue (or one game level); use --val_files instead"
        )
    # A stream apart from the one that shuffles the batches, which starts from the same seed.
    order = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0]).permutation(len(sizes))
    chosen = order[choose_sizes(sizes[order].tolist(), fraction * len(data))]
    return np.flatnonzero(np.isin(group, chosen))


def split_off(data: "TokenDataset", rows: np.ndarray) -> tuple["TokenDataset", "TokenDataset"]:
    """The training rows without those of `rows_to_split_off`, and those as a validation set."""
    train, val = data.without(rows), data.subset(rows)
    val.counts = replace(val.counts, rows_dropped=0, tokens_dropped=0)  # counted with the training rows
    return train, val


def join_rows(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Connected components: rows that share a key are in one group.

    Args:
        keys: integers, [rows] each; a key is compared with those of the same array, 0 stands for no key.

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
    """Indices of sizes whose sum is nearest to `wanted`: at least one, and not all. Of a tie, the smaller sum.

    Exact up to SEARCHED; beyond it, the first ones are taken as they come and the rest makes up the difference. This is
    subset sum with the reachable sums as the bits of an int: each further size adds the bits shifted by it.
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
        else:  # the small ones that follow make up the difference best
            left += range(index, len(sizes))
            break
    least = 0 if taken else 1
    most = sum(sizes[index] for index in left) - 1
    limit = min(most, max(int(2 * wanted) + 1, min(sizes[index] for index in left)))
    nearest = math.ceil(wanted - 0.5)
    reached, last = 1, {0: -1}  # sum -> index of the size that made it reachable
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
