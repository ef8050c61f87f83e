"""Folding: every row can be read back, and each token sees its own row's beginning and nothing else."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.dataset.folding import attention_mask, fold

PROPERTY = settings(deadline=None, database=None, max_examples=300)
ROWS = st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=8)


def made(rows):
    return [(np.array([t for t, _ in row], np.int32), np.array([m for _, m in row], bool)) for row in rows]


def test_the_example_of_the_module():
    folded = fold(made([[(1, 0), (2, 0), (3, 1)], [(1, 0), (2, 0), (4, 1)], [(1, 0), (5, 1)]]))
    assert folded.tokens.tolist() == [1, 2, 3, 4, 5]
    assert folded.depth.tolist() == [0, 1, 2, 2, 1]
    assert folded.parent.tolist() == [-1, 0, 1, 1, 0]
    assert folded.subtree_end.tolist() == [5, 4, 3, 4, 5]
    assert folded.weight.tolist() == [0, 0, 1, 1, 1]
    assert not folded.is_chain


@PROPERTY
@given(ROWS)
def test_a_token_sees_exactly_the_beginning_of_its_rows(rows):
    folded, mask = fold(made(rows)), attention_mask(fold(made(rows)))
    seen = set()
    for i in range(len(folded)):
        visible = np.flatnonzero(mask[i])
        assert visible[-1] == i
        assert folded.depth[visible].tolist() == list(range(folded.depth[i] + 1))
        assert ([-1, *visible.tolist()])[-2] == folded.parent[i]
        seen.add(tuple(folded.tokens[visible].tolist()))
    prefixes = {tuple(t for t, _ in row[: n + 1]) for row in rows for n in range(len(row))}
    assert seen == prefixes
    assert len(folded) == len(prefixes)  # each beginning once


@PROPERTY
@given(ROWS)
def test_weights_count_the_rows_in_which_a_token_is_a_target(rows):
    folded, mask = fold(made(rows)), attention_mask(fold(made(rows)))
    for i in range(len(folded)):
        beginning = folded.tokens[np.flatnonzero(mask[i])].tolist()
        n = len(beginning)
        count = sum([t for t, _ in row[:n]] == beginning and row[n - 1][1] for row in rows if len(row) >= n)
        assert folded.weight[i] == (count if n > 1 else 0)


@PROPERTY
@given(ROWS)
def test_rows_in_another_order_fold_alike(rows):
    one, other = fold(made(rows)), fold(made(rows[::-1]))
    assert all((getattr(one, name) == getattr(other, name)).all() for name in vars(one))


def test_rows_that_continue_each_other_are_a_chain():
    chain = [[(1, 0), (2, 1)], [(1, 0), (2, 0), (3, 1)], [(1, 0), (2, 0), (3, 0), (4, 1)], [(1, 0), (2, 1)]]
    folded = fold(made(chain))
    assert folded.is_chain
    assert folded.weight.tolist() == [0, 2, 1, 1]
