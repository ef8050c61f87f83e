"""Which rows share an optimizer step: decided by (seed, epoch) alone, whatever the ranks and the backend."""

from bisect import bisect_right
from functools import lru_cache

import numpy as np

OPEN_BATCHES = 16  # that may still be filled while an epoch is planned


class GlobalBatches:
    """The global batches of all epochs, indexed by optimizer step (0-based).

    Whole dialogues are drawn in random order, each into the first batch with enough space. A dialogue is split only if
    it has more rows than a batch. Every row is in exactly one batch of an epoch; a batch may have fewer rows than
    `batch_size`, and epochs may differ by a few steps.

    Args:
        dialogue: int64 [rows], equal for rows that should share a batch; np.arange(rows) shuffles plain rows.
        order: int64 [rows], along which a dialogue that is too large is split.
        batch_size: rows.
        seed: of the shuffling.
    """

    def __init__(self, dialogue: np.ndarray, order: np.ndarray, batch_size: int, seed: int) -> None:
        self._batch_size, self._seed = batch_size, seed
        by_dialogue = np.lexsort((order, dialogue))
        starts = np.flatnonzero(np.diff(dialogue[by_dialogue])) + 1
        self._by_dialogue, self._bounds = by_dialogue, np.concatenate([[0], starts, [len(dialogue)]])
        self._first_steps = [0]  # of the epochs known so far, and of the next
        self._batches = lru_cache(maxsize=2)(self._draw)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, each int64 [rows]."""
        return self._batches(epoch)

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        while len(self._first_steps) <= epoch:
            self._first_steps.append(self._first_steps[-1] + len(self.epoch(len(self._first_steps) - 1)))
        return self._first_steps[epoch]

    def position(self, step: int) -> tuple[int, int]:
        """Whole epochs completed after `step` steps, and batches completed in the current one."""
        while self._first_steps[-1] <= step:
            self.first_step(len(self._first_steps))
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def __getitem__(self, step: int) -> np.ndarray:
        """The rows of a step, int64 [rows]."""
        epoch, batch = self.position(step)
        return self.epoch(epoch)[batch]

    def epochs_after(self, step: int) -> float:
        """Epochs completed after `step` steps, as a fraction; whole at the end of an epoch."""
        epoch, batch = self.position(step)
        return epoch + batch / len(self.epoch(epoch))

    def _draw(self, epoch: int) -> list[np.ndarray]:
        size = self._batch_size
        batches: list[list[np.ndarray]] = []
        space: dict[int, int] = {}  # free rows of the open batches, oldest first
        for index in np.random.default_rng([self._seed, epoch]).permutation(len(self._bounds) - 1).tolist():
            rows = self._by_dialogue[self._bounds[index] : self._bounds[index + 1]]
            for part in [rows[start : start + size] for start in range(0, len(rows), size)]:
                batch = next((b for b, free in space.items() if free >= len(part)), None)
                if batch is None:
                    batch = len(batches)
                    batches.append([])
                    space[batch] = size
                    if len(space) > OPEN_BATCHES:
                        del space[next(iter(space))]
                batches[batch].append(part)
                space[batch] -= len(part)
                if not space[batch]:
                    del space[batch]
        return [np.concatenate(batch) for batch in batches]
