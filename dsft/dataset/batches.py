"""Which rows meet in which optimizer step: decided by (seed, epoch) alone, whatever the ranks and the backend."""

from bisect import bisect_right
from functools import lru_cache

import numpy as np

OPEN_BATCHES = 16  # that may still be filled up while an epoch is laid out


class GlobalBatches:
    """The global batches of all epochs, numbered by optimizer step (0-based).

    Whole dialogues are drawn in random order, each into the first batch that has room for it. A dialogue is split only
    where it alone has more rows than a batch. Every row stands in exactly one batch of an epoch; a batch may have fewer
    rows than `batch_size`, and an epoch may have a few steps more or less than another.

    Args:
        dialogue: int64 [rows], equal for rows that must meet; np.arange(rows) shuffles plain rows.
        order: int64 [rows], along which a dialogue that is too large is split.
        batch_size: rows.
        seed: of the shuffling.
    """

    def __init__(self, dialogue: np.ndarray, order: np.ndarray, batch_size: int, seed: int) -> None:
        self._batch_size, self._seed = batch_size, seed
        by_dialogue = np.lexsort((order, dialogue))
        starts = np.flatnonzero(np.diff(dialogue[by_dialogue])) + 1
        self._dialogues = np.split(by_dialogue, starts)
        self._first_steps = [0]  # of the epochs known so far, and of the next
        self._layout = lru_cache(maxsize=2)(self._lay_out)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, each int64 [rows]."""
        return self._layout(epoch)

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch begins."""
        while len(self._first_steps) <= epoch:
            self._first_steps.append(self._first_steps[-1] + len(self.epoch(len(self._first_steps) - 1)))
        return self._first_steps[epoch]

    def __getitem__(self, step: int) -> np.ndarray:
        """The rows of a step, int64 [rows]."""
        epoch = self._epoch_of(step)
        return self.epoch(epoch)[step - self.first_step(epoch)]

    def epochs_after(self, step: int) -> float:
        """Epochs that are done once `step` steps are, with the share of the running one; whole at an epoch's end."""
        epoch = self._epoch_of(step)
        return epoch + (step - self.first_step(epoch)) / len(self.epoch(epoch))

    def position(self, step: int) -> tuple[int, int]:
        """Whole epochs done once `step` steps are, and batches done in the running one."""
        epoch = self._epoch_of(step)
        return epoch, step - self.first_step(epoch)

    def _epoch_of(self, step: int) -> int:
        while self._first_steps[-1] <= step:
            self.first_step(len(self._first_steps))
        return bisect_right(self._first_steps, step) - 1

    def _lay_out(self, epoch: int) -> list[np.ndarray]:
        size = self._batch_size
        batches: list[list[np.ndarray]] = []
        room: dict[int, int] = {}  # of the open batches, oldest first
        for index in np.random.default_rng([self._seed, epoch]).permutation(len(self._dialogues)):
            rows = self._dialogues[index]
            for piece in [rows[start : start + size] for start in range(0, len(rows), size)]:
                batch = next((b for b, free in room.items() if free >= len(piece)), None)
                if batch is None:
                    batch = len(batches)
                    batches.append([])
                    room[batch] = size
                    if len(room) > OPEN_BATCHES:
                        del room[next(iter(room))]
                batches[batch].append(piece)
                room[batch] -= len(piece)
                if not room[batch]:
                    del room[batch]
        return [np.concatenate(batch) for batch in batches]
