"""Shared-prefix (tree) packing: rows that begin alike become one sequence in which each shared prefix stands once.

The rows of a global batch form a prefix tree. Written depth first, it is one sequence of tokens in which a token's
ancestors precede it and its descendants directly follow it:

    rows  a b c     tokens       a b c d e      depth        0 1 2 2 1
          a b d     subtree_end  5 4 3 4 5      parent      -1 0 1 1 0
          a e

Token i attends to token j if j <= i < subtree_end[j]: exactly its ancestors and itself. The same rule keeps several
trees apart in one packed sequence. Without branches it is the causal mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

ROWS_AT_ONCE = 2**16  # as Python's numbers


@dataclass(frozen=True)
class Folded:
    """Rows as one sequence. Each array has one entry per token."""

    tokens: np.ndarray  # int32
    depth: np.ndarray  # int64, the token's position in every row that contains it
    parent: np.ndarray  # int64, index of the preceding token in those rows; -1 for a first token
    subtree_end: np.ndarray  # int64, index after its last descendant
    weight: np.ndarray
    """float64 [tokens] or [tokens, sources], summed over the rows (of each source) in which the token is a target. It
    is predicted from its parent."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether there is no branch, so that plain causal attention will do."""
        return bool((self.subtree_end == len(self)).all())


def fold(rows: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray | None = None) -> Folded:
    """Fold rows of (token ids int32 [length], is-target bool [length]) into one sequence.

    `weights` are those of the rows' targets, float64 [rows], or [rows, sources] with one column that is not 0; all 1 by
    default.
    """
    if weights is None:
        weights = np.ones(len(rows))
    order = sort_rows([tokens for tokens, _ in rows])
    total = sum(len(tokens) for tokens, _ in rows)
    tokens = np.zeros(total, np.int32)
    depth, parent, subtree_end = (np.zeros(total, np.int64) for _ in range(3))
    weight = np.zeros((total, *weights.shape[1:]))
    path = np.empty(0, np.int64)  # indices of the previous row's tokens
    previous = np.empty(0, np.int32)
    used = 0
    for row in order:
        own, is_target = rows[row]
        shared = common_prefix(previous, own)
        subtree_end[path[shared:]] = used
        new = np.arange(used, used + len(own) - shared)
        path = np.concatenate([path[:shared], new])
        tokens[new], depth[new] = own[shared:], np.arange(shared, len(own))
        if len(new):
            parent[new] = np.concatenate([path[shared - 1 : shared] if shared else [-1], new[:-1]])
        weight[path[1:]] += np.multiply.outer(is_target[1:], weights[row])  # nothing predicts a row's first token
        used += len(new)
        previous = own
    subtree_end[path] = used
    return Folded(tokens[:used], depth[:used], parent[:used], subtree_end[:used], weight[:used])


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common prefix of two rows of token ids."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def shared_prefixes(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Length of the prefix that each row of token ids shares with the row before it, int64 [rows]; 0 for the first."""
    return np.array([0, *map(common_prefix, rows[:-1], rows[1:])], np.int64)


def attention_mask(folded: Folded) -> np.ndarray:
    """Bool [tokens, tokens]: whether token i attends to token j."""
    index = np.arange(len(folded))
    return (index[None, :] <= index[:, None]) & (index[:, None] < folded.subtree_end[None, :])


def pack(sequences: Sequence[Folded]) -> Folded:
    """Concatenate sequences; tokens of different ones do not attend to each other."""
    lengths = list(map(len, sequences))
    start = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    tokens, depth, parent, subtree_end, weight = (
        np.concatenate([getattr(sequence, field.name) for sequence in sequences]) for field in fields(Folded)
    )
    return Folded(tokens, depth, np.where(parent < 0, -1, parent + start), subtree_end + start, weight)


def sort_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Indices (int64 [rows]) that sort rows of token ids (int32 [length]), so that shared prefixes become neighbours.

    Takes four bytes of memory per token, excluding the rows.
    """
    keys = [sort_key(row) for row in rows]
    return np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)


def sort_key(tokens: np.ndarray) -> bytes:
    """Sorts like the token ids (int32 [length]), and is a prefix of another key if they are of the other ids."""
    return tokens.astype(">u4").tobytes()


def find_dialogues(prompt_lengths: np.ndarray, order: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Number the dialogues: two rows belong to one if the prompt of either is a prefix of the other row.

    This joins the turns of a dialogue, and several answers to one prompt, but not dialogues that share a system prompt.
    The numbers, int64 [rows], have no meaning of their own.

    Args:
        prompt_lengths: tokens before a row's first target, int64 [rows].
        order: the indices that sort the rows by their tokens, int64 [rows].
        shared: length of the prefix that each row, in this order, shares with the one before it, int64 [rows].
    """
    shared = shared[1:]
    prompts = prompt_lengths[order]
    joined = _joined(prompts, shared) | _joined(prompts[::-1], shared[::-1])[::-1]
    dialogue = np.empty(len(order), np.int64)
    dialogue[order] = np.cumsum(np.concatenate([[0], ~joined]))
    return dialogue


def _joined(prompts: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """For each gap between neighbours, whether the row after it begins with the whole prompt of some row before it.

    Among the prompts that reach a gap only the shortest matters: if it does not continue, no longer one does.
    """
    joined = np.zeros(len(shared), bool)
    shortest = np.iinfo(np.int64).max
    for start in range(0, len(shared), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        for gap, (length, prompt) in enumerate(zip(shared[part].tolist(), prompts[:-1][part].tolist(), strict=True)):
            shortest = min(shortest, prompt)
            joined[start + gap] = shortest <= length
            if not joined[start + gap]:
                shortest = np.iinfo(np.int64).max
    return joined
