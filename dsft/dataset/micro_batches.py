"""How a global batch is folded, cut to a token budget, and spread over ranks and micro-batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsft.dataset.folding import Folded, common_prefix, fold, pack
from dsft.dataset.tokens import TokenDataset
from dsft.errors import UserError
from dsft.model.flops import Cost

if TYPE_CHECKING:
    from dsft.model.tree_attention import Tree

SLACKS = (1.02, 1.1, 1.3, math.inf)  # how much more than the most even cut a piece may cost, see cut
MOST_SEARCHED = 50_000  # rows times pieces of a batch; beyond that only the most even cut is looked at
Sequences = list[np.ndarray]
"""What one micro-batch holds: for each sequence the rows (int64) that are folded into it."""


@dataclass(frozen=True)
class MicroBatchOptions:
    """What the model can be given.

    ranks: number of ranks.
    token_budget: most tokens in a micro-batch of one rank, padding included.
    fold: compute what rows have in common once.
    trees: the model's attention takes the structure of a tree; else only rows that continue each other are folded,
        and sequences lie side by side as padded rows.
    """

    ranks: int
    token_budget: int
    fold: bool
    trees: bool


@dataclass(frozen=True)
class Plan:
    """One global batch, as all ranks know it.

    parts: for each rank its micro-batches; all ranks have the same number, some may be empty.
    tokens: computed ones, without padding.
    row_tokens: as if every row were computed by itself.
    flops: of the whole batch.
    imbalance: by how much the rank with the most work exceeds the mean, micro-batch by micro-batch; 0 is perfect.
    """

    parts: list[list[Sequences]]
    targets: int
    tokens: int
    row_tokens: int
    flops: float
    imbalance: float


@dataclass
class MicroBatch:
    """Sequences for one forward pass.

    input_ids: int64 [sequences, length]; [1, tokens] where sequences are packed
    logit_positions: int64 [targets], indices into the flattened input_ids whose next token is a target
    labels: int64 [targets], those next tokens
    loss_weights: float32 [targets], in how many rows each is a target
    position_ids: int64 [1, tokens], a token's position in its rows; None where that is the column
    tree: what each token may attend to; None where that is all before it
    """

    input_ids: torch.Tensor
    logit_positions: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    position_ids: torch.Tensor | None = None
    tree: "Tree | None" = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        ids, positions, labels, weights = (
            t.to(device, non_blocking=True)
            for t in (self.input_ids, self.logit_positions, self.labels, self.loss_weights)
        )
        position_ids = None if self.position_ids is None else self.position_ids.to(device, non_blocking=True)
        return MicroBatch(
            ids, positions, labels, weights, position_ids, None if self.tree is None else self.tree.to(device)
        )


class MicroBatches:
    """Makes plans and micro-batches of one dataset."""

    def __init__(self, data: TokenDataset, layout: MicroBatchOptions, cost: Cost, pad_token: int | None) -> None:
        longest = int(data.lengths.max())
        if longest > layout.token_budget:
            raise UserError(
                f"max_tokens_per_micro_batch is {layout.token_budget}, but the longest row has {longest} tokens; "
                "raise it, or let --max_length and --truncation make rows shorter"
            )
        self._data, self._layout, self._cost, self._pad_token = data, layout, cost, pad_token

    @property
    def rows(self) -> int:
        """Rows of the dataset."""
        return len(self._data)

    def plan(self, rows: np.ndarray) -> Plan:
        """Spread a global batch.

        Args:
            rows: int64 [rows] of the dataset.
        """
        rows = rows[np.argsort(self._data.sorted_place[rows])]
        lengths = self._data.lengths[rows]
        targets = self._data.targets[rows]
        if self._layout.fold and self._layout.trees:
            shared = self._shared(rows)
            pieces = cut(lengths, shared, targets, self._cost, self._layout.ranks, self._layout.token_budget)
            parts = assign_to_ranks(pieces, self._layout.ranks)
            micro_batches = [[[rows[piece.rows]] if piece.tokens else [] for piece in rank] for rank in parts]
            costs = [[piece.cost for piece in rank] for rank in parts]
            tokens = sum(piece.tokens for piece in pieces)
        else:
            ends = self._shared(rows)[1:] < lengths[:-1] if self._layout.fold else np.ones(len(rows) - 1, bool)
            chains = np.split(np.arange(len(rows)), np.flatnonzero(ends) + 1)
            sizes = np.array([lengths[chain[-1]] for chain in chains], np.int64)
            cost = self._cost.of(sizes, sizes * (sizes + 1) / 2, np.array([targets[chain].sum() for chain in chains]))
            spread_chains = spread(
                sizes, cost, self._layout.ranks, self._layout.token_budget, padded=not self._layout.trees
            )
            micro_batches = [[[rows[chains[i]] for i in part] for part in rank] for rank in spread_chains]
            costs = [[float(cost[part].sum()) for part in rank] for rank in spread_chains]
            tokens = int(sizes.sum())
        slowest = sum(max(at_once) for at_once in zip(*costs, strict=True))
        whole = sum(map(sum, costs))
        return Plan(
            parts=micro_batches,
            targets=int(targets.sum()),
            tokens=tokens,
            row_tokens=int(lengths.sum()),
            flops=whole,
            imbalance=slowest * self._layout.ranks / whole - 1,
        )

    def make(self, sequences: Sequences) -> MicroBatch:
        """The tensors of one micro-batch, on CPU."""
        folded = [fold([self._data[row] for row in rows]) for rows in sequences]
        if not folded:
            nothing = np.zeros(1, np.int64)
            folded = [Folded(nothing, nothing, nothing - 1, nothing + 1, nothing)]
        return packed(folded) if self._layout.trees else padded(folded, self._pad_token)

    def _shared(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens each row has in common with the one before it, int64 [rows]; rows are sorted."""
        tokens = [self._data[row][0] for row in rows]
        return np.array([0, *map(common_prefix, tokens[:-1], tokens[1:])], np.int64)


def packed(sequences: Sequence[Folded]) -> MicroBatch:
    """Sequences one after the other in one row, for attention that knows their structure."""
    from dsft.model.tree_attention import Tree

    whole = pack(sequences)
    is_target = np.flatnonzero(whole.weight)
    return MicroBatch(
        input_ids=torch.from_numpy(whole.tokens.astype(np.int64))[None],
        logit_positions=torch.from_numpy(whole.parent[is_target]),
        labels=torch.from_numpy(whole.tokens[is_target].astype(np.int64)),
        loss_weights=torch.from_numpy(whole.weight[is_target].astype(np.float32)),
        position_ids=torch.from_numpy(whole.depth)[None],
        tree=Tree(whole.subtree_end, whole.parent),
    )


def padded(chains: Sequence[Folded], pad_token: int | None) -> MicroBatch:
    """Sequences without branches side by side, padded on the right to the longest.

    A causal model's real positions never see padding on their right, so no attention mask is needed, and attention
    keeps its fastest kernel. Where the tokenizer has no pad token, any other does as well.
    """
    length = max(map(len, chains))
    ids = np.full((len(chains), length), pad_token or 0, dtype=np.int64)
    positions, labels, weights = [], [], []
    for index, chain in enumerate(chains):
        assert chain.is_chain
        ids[index, : len(chain)] = chain.tokens
        is_target = np.flatnonzero(chain.weight)
        positions.append(index * length + chain.parent[is_target])
        labels.append(chain.tokens[is_target].astype(np.int64))
        weights.append(chain.weight[is_target].astype(np.float32))
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        logit_positions=torch.from_numpy(np.concatenate(positions)),
        labels=torch.from_numpy(np.concatenate(labels)),
        loss_weights=torch.from_numpy(np.concatenate(weights)),
    )


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a sorted batch, folded into one tree."""

    rows: slice
    tokens: int
    cost: float


def cut(
    lengths: np.ndarray, shared: np.ndarray, targets: np.ndarray, cost: Cost, ranks: int, token_budget: int
) -> list[Chunk]:
    """Cut sorted rows into pieces so that all ranks together are done soon.

    What rows on both sides of a cut have in common is computed in both pieces, and counted in both. So a cut within a
    dialogue costs tokens, and uneven pieces cost waiting. Tried are the cut whose largest piece is the cheapest, and
    those of the least total cost in which no piece costs much more than that; the one with the least `waiting_cost`
    is taken.

    Args:
        lengths: int64 [rows], tokens of each row; rows are sorted by their tokens.
        shared: int64 [rows], tokens that a row has in common with the one before it.
        targets: int64 [rows].
        cost: of tokens, pairs and targets.
        ranks: the number of pieces is a multiple of it.
        token_budget: at least the longest row.
    """
    prices = Prices(lengths, shared, targets, cost, token_budget)
    wanted = ranks * math.ceil(len(prices.cut_greedily(math.inf)) / ranks)
    even = prices.cut_evenly(wanted)
    candidates = [even]
    if len(lengths) * wanted <= MOST_SEARCHED:
        largest = max(piece.cost for piece in even)
        for more in (0, ranks):
            cuts = (prices.cut_cheaply(largest * slack, wanted + more) for slack in SLACKS)
            candidates += [found for found in cuts if found is not None]
    filled = [pieces + [Chunk(slice(0, 0), 0, 0.0)] * (-len(pieces) % ranks) for pieces in candidates]
    return min(filled, key=lambda pieces: waiting_cost(assign_to_ranks(pieces, ranks)))


class Prices:
    """What pieces of sorted rows cost; see cut."""

    def __init__(
        self, lengths: np.ndarray, shared: np.ndarray, targets: np.ndarray, cost: Cost, token_budget: int
    ) -> None:
        def pairs(depth: np.ndarray) -> np.ndarray:
            return depth * (depth + 1) / 2

        costs = cost.of(lengths - shared, pairs(lengths) - pairs(shared), targets)
        self._rows, self._shared, self._budget = len(lengths), shared, token_budget
        self._tokens_before = np.concatenate([[0], np.cumsum(lengths - shared)])
        self._cost_before = np.concatenate([[0.0], np.cumsum(costs)])
        self._shared_cost = cost.of(shared, pairs(shared), 0)

    def _piece(self, start: int, end: int) -> Chunk:
        tokens = self._tokens_before[end] - self._tokens_before[start] + self._shared[start]
        price = self._cost_before[end] - self._cost_before[start] + self._shared_cost[start]
        return Chunk(slice(start, end), int(tokens), float(price))

    def cut_greedily(self, limit: float) -> list[Chunk]:
        """The fewest pieces within the token budget of which none costs more than `limit`, if no single row does."""
        made, start = [], 0
        while start < self._rows:
            tokens = self._budget - self._shared[start] + self._tokens_before[start]
            price = limit - self._shared_cost[start] + self._cost_before[start]
            ends = (
                np.searchsorted(self._tokens_before, tokens, "right"),
                np.searchsorted(self._cost_before, price, "right"),
            )
            end = max(start + 1, int(min(ends)) - 1)
            made.append(self._piece(start, end))
            start = end
        return made

    def cut_evenly(self, most: int) -> list[Chunk]:
        """At most so many pieces, the largest as cheap as it can be: the limit of the greedy cut is bisected."""
        low, high = 0.0, float(self._cost_before[-1] + self._shared_cost.sum()) + 1
        while high - low > 1e-4 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if len(self.cut_greedily(middle)) <= most else (middle, high)
        return self.cut_greedily(high)

    def cut_cheaply(self, limit: float, most: int) -> list[Chunk] | None:
        """At most so many pieces of the least total cost, none above `limit`; None where there is no such cut.

        By dynamic programming: least[k, j] is the least cost of the first j rows in k pieces.
        """
        least = np.full((most + 1, self._rows + 1), math.inf)
        least[0, 0] = 0.0
        came_from = np.zeros((most + 1, self._rows + 1), np.int64)
        first = 0  # the first row with which a piece that ends here may begin
        for end in range(1, self._rows + 1):
            while first < end - 1:
                piece = self._piece(first, end)
                if piece.tokens <= self._budget and piece.cost <= limit:
                    break
                first += 1
            starts = slice(first, end)
            prices = self._cost_before[end] - self._cost_before[starts] + self._shared_cost[starts]
            sums = least[:-1, starts] + prices
            best = sums.argmin(axis=1)
            least[1:, end] = sums[np.arange(most), best]
            came_from[1:, end] = best + first
        count, end = int(least[:, -1].argmin()), self._rows
        if not math.isfinite(least[count, end]):
            return None
        made = []
        while count:
            start = int(came_from[count, end])
            made.append(self._piece(start, end))
            count, end = count - 1, start
        return made[::-1]


def waiting_cost(hands: Sequence[Sequence[Chunk]]) -> float:
    """Of the most expensive of the n-th pieces of all ranks, summed over n: for these all ranks wait."""
    return sum(max(piece.cost for piece in at_once) for at_once in zip(*hands, strict=True))


def assign_to_ranks(pieces: Sequence[Chunk], ranks: int) -> list[list[Chunk]]:
    """Deal a multiple of `ranks` pieces so that the n-th ones of all ranks are alike, and ranks have like sums."""
    hands: list[list[Chunk]] = [[] for _ in range(ranks)]
    ordered = sorted(pieces, key=lambda piece: -piece.cost)
    for first in range(0, len(ordered), ranks):
        by_load = sorted(range(ranks), key=lambda rank: sum(piece.cost for piece in hands[rank]))
        for rank, piece in zip(by_load, ordered[first : first + ranks], strict=True):
            hands[rank].append(piece)
    return hands


def spread(
    sizes: np.ndarray, cost: np.ndarray, ranks: int, token_budget: int, *, padded: bool
) -> list[list[np.ndarray]]:
    """Spread sequences over ranks and micro-batches so that ranks have like amounts of work.

    Args:
        sizes: tokens of each sequence, int64 [sequences].
        cost: of each sequence, float64 [sequences].
        ranks: number of ranks.
        token_budget: most tokens in a micro-batch, at least the longest sequence.
        padded: every sequence counts as long as the longest beside it.

    Returns:
        For each rank its micro-batches, each an int64 array of indices. All ranks have the same number of them, because
        every forward and backward is collective; some may be empty. Sequences of like size share a micro-batch (little
        padding), and the n-th micro-batches of all ranks are alike in size.
    """
    members: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for index in np.lexsort((-sizes, -cost)):  # the heaviest first, each to the rank with the least so far
        rank = int(np.argmin(load))
        members[rank].append(int(index))
        load[rank] += cost[index]
    filled = [_fill([int(size) for size in sizes[own]], token_budget, padded) for own in members]
    steps = max(map(len, filled))
    parts = []
    for own, ends in zip(members, filled, strict=True):
        starts = np.cumsum([0, *ends])
        groups = [np.array(own[a:b], np.int64) for a, b in pairwise(starts)]
        parts.append(groups + [np.empty(0, np.int64)] * (steps - len(groups)))
    return parts


def _fill(sizes: list[int], token_budget: int, padded: bool) -> list[int]:
    """How many of the sequences, in their order, go into each micro-batch."""
    counts: list[int] = []
    tokens = longest = 0
    for size in sizes:
        longest = max(longest, size)
        tokens = longest * (counts[-1] + 1) if padded and counts else tokens + size
        if not counts or tokens > token_budget:
            counts.append(0)
            tokens = longest = size
        counts[-1] += 1
    return counts or [0]
