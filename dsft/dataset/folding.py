"""Rows that share beginnings as one sequence in which every shared beginning stands once.

The rows of a global batch form a prefix tree. Written down depth first, it is one sequence of tokens in which a
token's ancestors stand before it, and its descendants directly after it:

    rows  a b c     tokens       a b c d e      depth        0 1 2 2 1
          a b d     subtree_end  5 4 3 4 5      parent      -1 0 1 1 0
          a e

Token i may attend to token j where j <= i < subtree_end[j]: those are exactly its ancestors and itself. The same rule
keeps trees apart that are packed side by side. Where no row parts ways from another, it is a causal mask.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Folded:
    """Rows as one sequence. All arrays have one entry a token.

    tokens: int32
    depth: int64, the token's position in every row it stands in
    parent: int64, index of the token before it in those rows; -1 for a first token
    subtree_end: int64, index after its last descendant
    weight: int64, in how many rows the token is a target; it is predicted from its parent
    """

    tokens: np.ndarray
    depth: np.ndarray
    parent: np.ndarray
    subtree_end: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no row parts ways from another: plain causal attention then sees what it may see."""
        return bool((self.subtree_end == len(self)).all())


def fold(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Folded:
    """Fold rows of (token ids int32 [length], is-target bool [length]) into one sequence."""
    order = sort_rows([tokens for tokens, _ in rows])
    total = sum(len(tokens) for tokens, _ in rows)
    tokens = np.zeros(total, np.int32)
    depth, parent, weight, subtree_end = (np.zeros(total, np.int64) for _ in range(4))
    path = np.empty(0, np.int64)  # where each token of the row before stands
    before = np.empty(0, np.int32)
    used = 0
    for row in order:
        own, is_target = rows[row]
        shared = common_prefix(before, own)
        subtree_end[path[shared:]] = used
        new = np.arange(used, used + len(own) - shared)
        path = np.concatenate([path[:shared], new])
        tokens[new], depth[new] = own[shared:], np.arange(shared, len(own))
        if len(new):
            parent[new] = np.concatenate([path[shared - 1 : shared] if shared else [-1], new[:-1]])
        weight[path[1:]] += is_target[1:]  # a row's first token is predicted by nothing
        used += len(new)
        before = own
    subtree_end[path] = used
    return Folded(tokens[:used], depth[:used], parent[:used], subtree_end[:used], weight[:used])


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two rows share at their beginning."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def attention_mask(folded: Folded) -> np.ndarray:
    """Bool [tokens, tokens]: entry (i, j) says whether token i sees token j."""
    index = np.arange(len(folded))
    return (index[None, :] <= index[:, None]) & (index[:, None] < folded.subtree_end[None, :])


def pack(sequences: Iterable[Folded]) -> Folded:
    """Sequences side by side as one that keeps them apart."""
    parts = list(sequences)
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    return Folded(
        tokens=np.concatenate([part.tokens for part in parts]),
        depth=np.concatenate([part.depth for part in parts]),
        parent=np.concatenate(
            [np.where(part.parent < 0, -1, part.parent + start) for part, start in zip(parts, starts, strict=True)]
        ),
        subtree_end=np.concatenate([part.subtree_end + start for part, start in zip(parts, starts, strict=True)]),
        weight=np.concatenate([part.weight for part in parts]),
    )


def sort_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Indices (int64 [rows]) that sort rows of token ids (int32 [length]); rows with a common beginning meet.

    Takes four bytes a token of memory beside the rows.
    """
    keys = [sort_key(row) for row in rows]
    return np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)


def sort_key(tokens: np.ndarray) -> bytes:
    """Sorts as the token ids (int32 [length]) do, and is the beginning of another key where they are of the others."""
    return tokens.astype(">u4").tobytes()


def find_dialogues(rows: Sequence[np.ndarray], prompt_lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Number the dialogues: rows belong to one where the prompt of the one is the beginning of the other.

    So the turns of a dialogue belong together, and several answers to one prompt; dialogues that have a system
    prompt in common do not. What a number is means nothing.

    Args:
        rows: token ids, int32 [length] each.
        prompt_lengths: tokens before a row's first target, int64 [rows].
        order: of sort_rows.

    Returns:
        int64 [rows]
    """
    shared = np.array([common_prefix(rows[a], rows[b]) for a, b in pairwise(order)], np.int64)
    prompts = prompt_lengths[order]
    together = _linked(prompts, shared) | _linked(prompts[::-1], shared[::-1])[::-1]
    dialogue = np.empty(len(rows), np.int64)
    dialogue[order] = np.cumsum(np.concatenate([[0], ~together]))
    return dialogue


def _linked(prompts: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Whether a row at or before each gap between neighbours has its whole prompt in common with the row after it.

    Of the prompts that reach a gap only the shortest matters: where it does not go on, no longer one does.
    """
    linked = np.zeros(len(shared), bool)
    shortest = np.iinfo(np.int64).max
    for gap, length in enumerate(shared):
        shortest = min(shortest, prompts[gap])
        linked[gap] = shortest <= length
        if not linked[gap]:
            shortest = np.iinfo(np.int64).max
    return linked
