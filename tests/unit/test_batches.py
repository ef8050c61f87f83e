"""Which rows meet in which batch, and how a batch is spread."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.dataset.batches import epoch_order, global_batch, spread, steps_per_epoch

PROPERTY = settings(deadline=None, database=None)
row_lengths = st.lists(st.integers(1, 4000), min_size=1, max_size=60).map(np.array)
few = st.integers(1, 9)


@PROPERTY
@given(rows=st.integers(1, 200), batch_size=st.integers(1, 70), seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_every_row_stands_in_exactly_one_batch_of_each_epoch(rows, batch_size, seed, epoch):
    steps = steps_per_epoch(rows, batch_size)
    batches = [global_batch(rows, batch_size, seed, epoch * steps + i) for i in range(steps)]
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
    assert 1 <= len(batches[-1]) <= batch_size


def test_steps_per_epoch_counts_the_smaller_last_batch():
    assert [steps_per_epoch(rows, 4) for rows in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else():
    def order(seed, epoch):
        return epoch_order(100, seed, epoch).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 2) != order(2, 1)


def test_the_order_of_rows_is_the_same_in_every_version():
    assert epoch_order(10, 1, 0).tolist() == np.random.default_rng([1, 0]).permutation(10).tolist()
    assert global_batch(10, 4, 1, 4).tolist() == np.random.default_rng([1, 1]).permutation(10)[4:8].tolist()


@PROPERTY
@given(row_lengths, few, few)
def test_spreading_uses_every_row_exactly_once(lengths, ranks, micro_batch_size):
    parts = spread(lengths, ranks, micro_batch_size)
    assert sorted(np.concatenate([part for rank in parts for part in rank])) == list(range(len(lengths)))


@PROPERTY
@given(row_lengths, few, few)
def test_every_rank_runs_as_few_micro_batches_as_the_rows_allow_and_all_the_same_number(
    lengths, ranks, micro_batch_size
):
    parts = spread(lengths, ranks, micro_batch_size)
    needed = -(-len(lengths) // (ranks * micro_batch_size))
    assert [len(rank) for rank in parts] == [needed] * ranks


@PROPERTY
@given(row_lengths, few, few)
def test_no_micro_batch_holds_more_than_micro_batch_size_rows(lengths, ranks, micro_batch_size):
    parts = spread(lengths, ranks, micro_batch_size)
    assert max(len(part) for rank in parts for part in rank) <= micro_batch_size


@PROPERTY
@given(row_lengths, few, few)
def test_every_rank_computes_the_same_spread(lengths, ranks, micro_batch_size):
    first, second = (spread(lengths.copy(), ranks, micro_batch_size) for _ in range(2))
    assert [[part.tolist() for part in rank] for rank in first] == [[part.tolist() for part in rank] for rank in second]


@PROPERTY
@given(row_lengths, few)
def test_rows_of_like_length_share_a_micro_batch(lengths, micro_batch_size):
    [parts] = spread(lengths, 1, micro_batch_size)
    for longer, shorter in pairwise(part for part in parts if len(part)):
        assert lengths[longer].min() >= lengths[shorter].max()


@PROPERTY
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=60).map(np.array), few)
def test_ranks_differ_by_at_most_the_longest_row_where_rows_are_not_limited(lengths, ranks):
    load = [sum(int(lengths[part].sum()) for part in rank) for rank in spread(lengths, ranks, 60)]
    assert max(load) - min(load) <= lengths.max()


def test_a_batch_without_rows_still_has_one_micro_batch_on_each_rank():
    parts = spread(np.array([], dtype=np.int64), 3, 2)
    assert [[part.tolist() for part in rank] for rank in parts] == [[[]], [[]], [[]]]


def test_tokens_are_balanced_not_rows():
    parts = spread(np.array([1000, 10, 10, 10, 10]), 2, 4)
    assert [sum(len(part) for part in rank) for rank in parts] == [1, 4]
