"""Which rows meet in which batch, and how a batch is spread over ranks and micro-batches."""

import math

import numpy as np


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch (int64 [rows]): depends on (seed, epoch) alone, not on ranks or backend."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def global_batch(rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Row indices of optimizer step `step` (0-based), counted over all epochs.

    Every row stands in exactly one batch of an epoch; the last batch of an epoch may be smaller.
    """
    epoch, index = divmod(step, steps_per_epoch(rows, batch_size))
    return epoch_order(rows, seed, epoch)[index * batch_size : (index + 1) * batch_size]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps in a pass over the rows."""
    return math.ceil(rows / batch_size)


def spread(lengths: np.ndarray, ranks: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """Spread rows over ranks and micro-batches so that ranks have like amounts of work.

    Args:
        lengths: tokens of each row, int64 [rows].
        ranks: number of ranks.
        micro_batch_size: most rows in a micro-batch.

    Returns:
        For each rank its micro-batches, each an int64 array of positions in `lengths`. All ranks have the same
        number of micro-batches, because every forward and backward is collective; some may be empty.
        Rows of like length share a micro-batch (little padding), and the n-th micro-batches of all ranks are
        alike in size (ranks wait for each other layer by layer).
    """
    steps = max(1, math.ceil(len(lengths) / (ranks * micro_batch_size)))
    capacity = steps * micro_batch_size
    members: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for row in np.argsort(-lengths, kind="stable"):  # longest first, each to the rank with the least so far
        rank = min((r for r in range(ranks) if len(members[r]) < capacity), key=lambda r: (load[r], r))
        members[rank].append(int(row))
        load[rank] += int(lengths[row])
    return [[np.array(part, dtype=np.int64) for part in np.array_split(rows, steps)] for rows in members]
