"""Cut a global batch into chunks of similar cost and assign them to ranks, so that no rank waits long for another."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsft.model.flops import Cost

SLACKS = (1.02, 1.3)  # how far a chunk may exceed the largest of the most even cut; one rank waits for none
FILLED = (1.0, 1.02, 1.05, 1.1, 1.2)  # times a chunk's even share, to which dialogues are put together, see cut
MAX_DIALOGUES = 4096  # of a batch; of more, a cut one is little of a chunk
MAX_SEARCH = 50_000  # rows times chunks of a batch; beyond that only the most even cut is considered


@dataclass(frozen=True)
class Chunk:
    """Rows of a sorted batch, folded into one tree."""

    rows: np.ndarray  # int64, ascending
    tokens: int
    cost: float


def costs_of(per_rank: Sequence[Sequence[Chunk]]) -> list[list[float]]:
    """Of each chunk of each rank."""
    return [[chunk.cost for chunk in own] for own in per_rank]


def cut(
    lengths: np.ndarray,
    shared: np.ndarray,
    targets: np.ndarray,
    dialogue: np.ndarray,
    cost: Cost,
    ranks: int,
    token_budget: int,
) -> list[Chunk]:
    """Cut sorted rows into chunks so that the slowest rank is done early.

    A prefix shared by rows of two chunks is computed and counted in both: a cut within a dialogue costs tokens, uneven
    chunks cost waiting. The rows are cut as they are sorted, and with the dialogues in orders in which some of them
    make about one chunk's share. The candidates are the most even cut of each order, and the cheapest cuts, of the
    rows as sorted and of the best order, whose chunks cost little more than its largest; the smallest `makespan` wins.

    Args:
        lengths: int64 [rows], tokens of each row; rows are sorted by their tokens.
        shared: int64 [rows], length of the prefix shared with the row before.
        targets: int64 [rows].
        dialogue: [rows], the same for rows that are better not parted.
        cost: of tokens, pairs and targets.
        ranks: the number of chunks is a multiple of it.
        token_budget: at least the longest row.
    """

    def cutter(order: np.ndarray) -> _Cutter:
        return _Cutter(order, lengths[order], _shared_in(order, shared), targets[order], cost, token_budget)

    def filled(chunks: list[Chunk]) -> list[Chunk]:
        return chunks + [Chunk(rows[:0], 0, 0.0)] * (-len(chunks) % ranks)

    def slowest(chunks: list[Chunk]) -> float:
        return makespan(costs_of(assign_to_ranks(chunks, ranks)))

    rows = np.arange(len(lengths))
    as_sorted = cutter(rows)
    count = ranks * math.ceil(len(as_sorted.greedy(math.inf)) / ranks)
    orders = _orders(as_sorted.costs, dialogue, count) if ranks > 1 else ()
    even = {one: filled(one.even(count)) for one in (as_sorted, *map(cutter, orders))}
    best, found = min(even, key=lambda one: slowest(even[one])), list(even.values())
    slacks = SLACKS if ranks > 1 else (math.inf,)
    for one in dict.fromkeys((as_sorted, best)) if len(rows) * count <= MAX_SEARCH else ():
        largest = max(chunk.cost for chunk in even[one])
        cuts = [one.cheapest(largest * slack, most) for slack in slacks for most in (count, count + ranks)]
        found += [filled(chunks) for chunks in cuts if chunks is not None]
    return [_recounted(chunk, cutter) for chunk in min(found, key=slowest)]


def _orders(costs: np.ndarray, dialogue: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Orders of the rows, int64 [rows], in which dialogues follow each other that cost about a chunk's share together.

    Each dialogue, the most expensive first, goes to the fullest of `count` chunks that has room for it ("best fit
    decreasing", a rule for bin packing), else to the emptiest.
    """
    dialogues = np.split(np.arange(len(costs)), np.flatnonzero(np.diff(dialogue)) + 1)
    sizes = np.array([costs[rows].sum() for rows in dialogues])
    for factor in FILLED if 1 < len(dialogues) <= MAX_DIALOGUES else ():
        load, room = np.zeros(count), factor * sizes.sum() / count
        chunk_of = np.zeros(len(dialogues), np.int64)
        for index in np.argsort(-sizes, kind="stable"):
            fits = load + sizes[index] <= room
            chunk_of[index] = chunk = np.where(fits, load, -1).argmax() if fits.any() else load.argmin()
            load[chunk] += sizes[index]
        place = np.argsort(np.argsort(-load, kind="stable"))[chunk_of]
        yield np.concatenate([dialogues[index] for index in np.argsort(place, kind="stable")])


def _shared_in(order: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Length of the prefix that each row shares with the one before it in `order`."""
    found = shared[order]
    for i in np.flatnonzero(np.diff(order) != 1) + 1:
        first, second = sorted(order[i - 1 : i + 1])
        found[i] = shared[first + 1 : second + 1].min()
    found[0] = 0
    return found


def _recounted(chunk: Chunk, cutter: Callable[[np.ndarray], "_Cutter"]) -> Chunk:
    """With its rows in ascending order, in which each shares the most with the one before."""
    return cutter(np.sort(chunk.rows)).chunk(0, len(chunk.rows)) if chunk.tokens else chunk


class _Cutter:
    """The ways to cut rows in the given order; see cut."""

    def __init__(
        self,
        rows: np.ndarray,
        lengths: np.ndarray,
        shared: np.ndarray,
        targets: np.ndarray,
        cost: Cost,
        token_budget: int,
    ) -> None:
        pairs, shared_pairs = lengths * (lengths + 1) / 2, shared * (shared + 1) / 2
        self.costs = costs = cost.of(lengths - shared, pairs - shared_pairs, targets)  # beyond the shared prefix
        self._order, self._rows, self._shared, self._budget = rows, len(rows), shared, token_budget
        self._tokens_before = np.concatenate([[0], np.cumsum(lengths - shared)])
        self._cost_before = np.concatenate([[0.0], np.cumsum(costs)])
        self._shared_cost = cost.of(shared, shared_pairs, 0)

    def chunk(self, start: int, end: int) -> Chunk:
        """The rows from `start` to `end`."""
        tokens = self._tokens_before[end] - self._tokens_before[start] + self._shared[start]
        cost = self._cost_before[end] - self._cost_before[start] + self._shared_cost[start]
        return Chunk(self._order[start:end], int(tokens), float(cost))

    def greedy(self, limit: float) -> list[Chunk]:
        """The fewest chunks within the token budget, none above `limit` unless a single row is."""
        chunks, start = [], 0
        while start < self._rows:
            tokens = self._budget - self._shared[start] + self._tokens_before[start]
            cost = limit - self._shared_cost[start] + self._cost_before[start]
            ends = (
                np.searchsorted(self._tokens_before, tokens, "right"),
                np.searchsorted(self._cost_before, cost, "right"),
            )
            end = max(start + 1, int(min(ends)) - 1)
            chunks.append(self.chunk(start, end))
            start = end
        return chunks

    def even(self, count: int) -> list[Chunk]:
        """At most `count` chunks, the largest as cheap as possible, by bisecting the limit of the greedy cut."""
        low, high = 0.0, float(self._cost_before[-1] + self._shared_cost.sum()) + 1
        while high - low > 1e-4 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if len(self.greedy(middle)) <= count else (middle, high)
        return self.greedy(high)

    def cheapest(self, limit: float, count: int) -> list[Chunk] | None:
        """At most `count` chunks of the least total cost, none above `limit`; None if there is no such cut.

        By dynamic programming: least[k, j] is the least cost of the first j rows in k chunks.
        """
        least = np.full((count + 1, self._rows + 1), math.inf)
        least[0, 0] = 0.0
        came_from = np.zeros((count + 1, self._rows + 1), np.int64)
        first = 0  # the earliest row that a chunk ending here may start with
        for end in range(1, self._rows + 1):
            while first < end - 1:
                chunk = self.chunk(first, end)
                if chunk.tokens <= self._budget and chunk.cost <= limit:
                    break
                first += 1
            starts = slice(first, end)
            costs = self._cost_before[end] - self._cost_before[starts] + self._shared_cost[starts]
            sums = least[:-1, starts] + costs
            best = sums.argmin(axis=1)
            least[1:, end] = sums[np.arange(count), best]
            came_from[1:, end] = best + first
        used, end = int(least[:, -1].argmin()), self._rows
        if not math.isfinite(least[used, end]):
            return None
        chunks = []
        while used:
            start = int(came_from[used, end])
            chunks.append(self.chunk(start, end))
            used, end = used - 1, start
        return chunks[::-1]


def makespan(costs: Sequence[Sequence[float]]) -> float:
    """All ranks wait for the most expensive of their n-th micro-batches, summed over n. costs: per rank and batch."""
    return sum(max(at_once) for at_once in zip(*costs, strict=True))


def assign_to_ranks(chunks: Sequence[Chunk], ranks: int) -> list[list[Chunk]]:
    """Assign a multiple of `ranks` chunks: the n-th of all ranks cost about the same, and so do the ranks' sums."""
    per_rank: list[list[Chunk]] = [[] for _ in range(ranks)]
    ordered = sorted(chunks, key=lambda chunk: -chunk.cost)
    for first in range(0, len(ordered), ranks):
        by_load = sorted(per_rank, key=lambda own: sum(chunk.cost for chunk in own))
        for own, chunk in zip(by_load, ordered[first : first + ranks], strict=True):
            own.append(chunk)
    return per_rank


def pack_sequences(
    sizes: np.ndarray, costs: np.ndarray, ranks: int, token_budget: int, *, padded: bool
) -> list[list[np.ndarray]]:
    """Assign sequences that cannot be folded together to ranks of similar load, and pack each rank's into batches.

    Args:
        sizes: int64 [sequences], tokens of each.
        costs: float64 [sequences].
        ranks: number of ranks; all get the same number of micro-batches, some of them empty.
        token_budget: of a micro-batch, at least the longest sequence.
        padded: sequences of a micro-batch are padded to the longest, so similar lengths share one.

    Returns:
        The micro-batches of each rank, as int64 indices of sequences; the n-th of all ranks are of similar size.
    """
    per_rank: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for index in np.lexsort((-sizes, -costs)).tolist():  # the heaviest first, each to the least loaded rank
        rank = int(load.argmin())
        per_rank[rank].append(index)
        load[rank] += costs[index]
    packed = [_pack(own, sizes.tolist(), token_budget, padded) for own in per_rank]
    count = max(map(len, packed))
    return [[np.array(part, np.int64) for part in own + [[]] * (count - len(own))] for own in packed]


def _pack(indices: list[int], sizes: list[int], token_budget: int, padded: bool) -> list[list[int]]:
    """Micro-batches of sequences in the given order, each as full as the budget allows."""
    batches: list[list[int]] = [[]]
    tokens = longest = 0
    for index in indices:
        longest = max(longest, sizes[index])
        tokens = longest * (len(batches[-1]) + 1) if padded else tokens + sizes[index]
        if tokens > token_budget:
            batches.append([])
            tokens = longest = sizes[index]
        batches[-1].append(index)
    return batches
