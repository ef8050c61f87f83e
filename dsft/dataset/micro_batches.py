"""A global batch as micro-batches: planned alike on every rank, then built as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from dsft.dataset.cutting import assign_to_ranks, costs_of, cut, makespan, pack_sequences
from dsft.dataset.folding import Folded, fold, pack, shared_prefixes
from dsft.dataset.tokens import TokenDataset
from dsft.errors import UserError
from dsft.model.flops import Cost

if TYPE_CHECKING:
    from dsft.model.tree_attention import Tree

Sequences = list[np.ndarray]
"""What one micro-batch holds: for each sequence the rows (int64) that are folded into it."""


@dataclass(frozen=True)
class MicroBatchOptions:
    """What micro-batches may look like.

    If the model's attention does not support trees, only rows that are prefixes of each other are folded, and sequences
    are padded side by side.
    """

    ranks: int
    token_budget: int  # most tokens in a micro-batch of one rank, including padding
    fold: bool  # compute shared prefixes once
    trees: bool  # the model's attention supports them


@dataclass(frozen=True)
class Plan:
    """One global batch, the same on all ranks."""

    parts: list[list[Sequences]]  # the micro-batches of each rank; all ranks have the same number, some may be empty
    targets: int
    weight: float  # of all targets, by which the summed loss is divided
    source_weights: np.ndarray  # float64 [sources], the same of each source
    tokens: int  # computed, excluding padding
    row_tokens: int  # as if every row were computed by itself
    flops: float
    imbalance: float  # by how much the slowest rank exceeds the mean, summed over micro-batches; 0 is perfect


@dataclass
class MicroBatch:
    """The tensors of one forward pass.

    Instead of labels in the shape of input_ids, with -100 to ignore a token, it lists the targets.
    """

    input_ids: torch.Tensor  # int64 [sequences, length]; [1, tokens] if sequences are packed
    logit_positions: torch.Tensor  # int64 [targets], indices into the flattened input_ids whose next token is a target
    labels: torch.Tensor  # int64 [targets], those next tokens
    loss_weights: torch.Tensor  # float32 [targets], summed over the rows in which each is a target
    source_weights: torch.Tensor  # float32 [targets, sources], the same of each source's rows
    position_ids: torch.Tensor | None = None  # int64 [1, tokens], positions in the rows; None if these are the columns
    tree: "Tree | None" = None  # what each token attends to; None for causal attention

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`, for FlexAttention of whole blocks."""
        from dsft.model.tree_attention import flex_length

        if device.type == "cuda" and self.tree is not None:
            return self.filled(flex_length(len(self.tree)))._to(device)
        return self._to(device)

    def filled(self, length: int) -> "MicroBatch":
        """With meaningless tokens at the end of a packed sequence, which attend to themselves alone."""
        assert self.tree is not None
        assert self.position_ids is not None
        ids, positions = (F.pad(x, (0, length - len(self.tree))) for x in (self.input_ids, self.position_ids))
        return replace(self, input_ids=ids, position_ids=positions, tree=self.tree.filled(length))

    def _to(self, device: torch.device) -> "MicroBatch":
        tensors = {name: x.to(device, non_blocking=True) for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **tensors, tree=self.tree and self.tree.to(device))


class MicroBatches:
    """Plans and builds the micro-batches of a dataset."""

    def __init__(self, data: TokenDataset, options: MicroBatchOptions, cost: Cost, pad_token: int | None) -> None:
        longest = int(data.lengths.max())
        if longest > options.token_budget:
            raise UserError(
                f"max_tokens_per_micro_batch is {options.token_budget}, but the longest row has {longest} tokens; "
                "raise it, or shorten rows with --max_length and --truncation"
            )
        self._data, self._options, self._cost, self._pad_token = data, options, cost, pad_token

    @property
    def rows(self) -> int:
        """Rows of the dataset."""
        return len(self._data)

    @property
    def sources(self) -> list[str]:
        """Names of the dataset's sources."""
        return self._data.sources

    def plan(self, rows: np.ndarray) -> Plan:
        """Distribute a global batch. rows: int64 [rows] of the dataset."""
        ranks, budget = self._options.ranks, self._options.token_budget
        rows = rows[np.argsort(self._data.sorted_place[rows])]
        lengths, targets = self._data.lengths[rows], self._data.targets[rows]
        shared = np.zeros(len(rows), np.int64)
        if self._options.fold:
            shared = shared_prefixes([self._data[row][0] for row in rows])
        if self._options.fold and self._options.trees:
            dialogue = self._data.dialogue[rows]
            per_rank = assign_to_ranks(cut(lengths, shared, targets, dialogue, self._cost, ranks, budget), ranks)
            parts = [[[rows[chunk.rows]] if chunk.tokens else [] for chunk in own] for own in per_rank]
            costs = costs_of(per_rank)
            tokens = sum(chunk.tokens for own in per_rank for chunk in own)
        else:
            ends = shared[1:] < lengths[:-1]
            chains = np.split(np.arange(len(rows)), np.flatnonzero(ends) + 1)
            sizes = np.array([lengths[chain[-1]] for chain in chains], np.int64)
            cost = self._cost.of(sizes, sizes * (sizes + 1) / 2, np.array([targets[chain].sum() for chain in chains]))
            packs = pack_sequences(sizes, cost, ranks, budget, padded=not self._options.trees)
            parts = [[[rows[chains[i]] for i in part] for part in own] for own in packs]
            costs = [[float(cost[part].sum()) for part in own] for own in packs]
            tokens = int(sizes.sum())
        flops = sum(map(sum, costs))
        weights = targets[:, None] * self._weights(rows)
        return Plan(
            parts=parts,
            targets=int(targets.sum()),
            weight=float(weights.sum()),
            source_weights=weights.sum(axis=0),
            tokens=tokens,
            row_tokens=int(lengths.sum()),
            flops=flops,
            imbalance=makespan(costs) * ranks / flops - 1,
        )

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        """The weight of each row in the column of its source, float64 [rows, sources]."""
        columns = np.arange(len(self._data.sources))
        return self._data.weight[rows][:, None] * (self._data.source[rows][:, None] == columns)

    def make(self, sequences: Sequences) -> MicroBatch:
        """The tensors of one micro-batch, on CPU."""
        folded = [fold([self._data[row] for row in rows], self._weights(rows)) for rows in sequences]
        if not folded:
            nothing = np.zeros(1, np.int64)
            folded = [Folded(nothing, nothing, nothing - 1, nothing + 1, self._weights(nothing) * 0)]
        return packed(folded) if self._options.trees else padded(folded, self._pad_token)


def packed(sequences: Sequence[Folded]) -> MicroBatch:
    """Sequences concatenated into one, for attention that keeps them apart."""
    from dsft.model.tree_attention import Tree

    whole = pack(sequences)
    batch = _with_targets(whole.tokens[None], whole, whole.parent)
    return replace(batch, position_ids=torch.from_numpy(whole.depth)[None], tree=Tree(whole.subtree_end, whole.parent))


def padded(chains: Sequence[Folded], pad_token: int | None) -> MicroBatch:
    """Sequences without branches, right-padded to the longest.

    With causal attention no token sees the padding to its right, so no attention mask is needed, and the fastest kernel
    stays available. If the tokenizer has no pad token, any other will do.
    """
    assert all(chain.is_chain for chain in chains)
    whole, length = pack(chains), max(map(len, chains))
    place = np.repeat(np.arange(len(chains)) * length, list(map(len, chains))) + whole.depth
    ids = np.full(len(chains) * length, pad_token or 0, np.int64)
    ids[place] = whole.tokens
    return _with_targets(ids.reshape(-1, length), whole, place - 1)


def _with_targets(input_ids: np.ndarray, whole: Folded, positions: np.ndarray) -> MicroBatch:
    """positions: int64 [tokens], where in the flattened input_ids each token of `whole` is predicted."""
    weights = whole.weight.reshape(len(whole), -1)
    is_target = np.flatnonzero(weights.any(axis=1))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        logit_positions=torch.from_numpy(positions[is_target]),
        labels=torch.from_numpy(whole.tokens[is_target].astype(np.int64)),
        loss_weights=torch.from_numpy(weights[is_target].sum(axis=1).astype(np.float32)),
        source_weights=torch.from_numpy(weights[is_target].astype(np.float32)),
    )
