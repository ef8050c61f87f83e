"""Which rows share an optimizer step: decided by (seed, epoch) alone, whatever the ranks and the backend."""

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

import numpy as np

OPEN_BATCHES = 16  # that may still be filled while an epoch is planned


class GlobalBatches:
    """The global batches of all epochs, indexed by optimizer step (0-based).

    Whole dialogues are drawn in random order, each into the first batch with enough space. A dialogue is split only if
    it has more rows than a batch. Every row is in exactly one batch of an epoch, or in as many as `times` says; a batch
    may have fewer rows than `batch_size`, and epochs may differ by a few steps.

    Args:
        dialogue: int64 [rows], equal for rows that should share a batch; np.arange(rows) shuffles plain rows.
        order: int64 [rows], along which a dialogue that is too large is split.
        batch_size: rows.
        seed: of the shuffling.
        times: how often each row is in an epoch (int64 [rows]), given its number; by default once.
    """

    def __init__(
        self,
        dialogue: np.ndarray,
        order: np.ndarray,
        batch_size: int,
        seed: int,
        times: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self._batch_size, self._seed = batch_size, seed
        self._dialogue, self._by_dialogue = dialogue, np.lexsort((order, dialogue))
        self._times = times or (lambda epoch: np.ones(len(dialogue), np.int64))
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
        times = self._times(epoch)[self._by_dialogue]
        copies = [self._by_dialogue[times > copy] for copy in range(times.max())]
        laid, copy = np.concatenate(copies), np.repeat(np.arange(len(copies)), list(map(len, copies)))
        starts = np.flatnonzero((np.diff(self._dialogue[laid]) != 0) | (np.diff(copy) != 0)) + 1
        bounds = np.concatenate([[0], starts, [len(laid)]])
        batches: list[list[np.ndarray]] = []
        space: dict[int, int] = {}  # free rows of the open batches, oldest first
        for index in np.random.default_rng([self._seed, epoch]).permutation(len(bounds) - 1).tolist():
            rows = laid[bounds[index] : bounds[index + 1]]
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


class Repeats:
    """How often each row of a mixture is in an epoch, by the weight of its source.

    Of a source with n rows and weight w, an epoch has round(n * w) rows: all of them floor(w) times, and the rest in an
    order drawn by the seed, in which the next epoch continues where this one ends. The rows of a dialogue follow each
    other in that order.

    Args:
        source: int64 [rows], index of each row's source.
        weights: float64 [sources].
        dialogue, order: int64 [rows], see GlobalBatches.
        seed: of the order.
    """

    def __init__(
        self, source: np.ndarray, weights: np.ndarray, dialogue: np.ndarray, order: np.ndarray, seed: int
    ) -> None:
        self._rows, self._weights = len(source), weights
        self._orders = []
        for number in range(len(weights)):
            rows = np.flatnonzero(source == number)
            _, index = np.unique(dialogue[rows], return_inverse=True)
            drawn = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, number))).permutation(len(rows))
            self._orders.append(rows[np.lexsort((order[rows], drawn[index]))])

    def __call__(self, epoch: int) -> np.ndarray:
        """Int64 [rows]."""
        times = np.zeros(self._rows, np.int64)
        for rows, weight in zip(self._orders, self._weights, strict=True):
            whole, more = divmod(round(len(rows) * weight), len(rows))
            times[rows] = whole
            times[rows[(epoch * more + np.arange(more)) % len(rows)]] += 1
        return times
