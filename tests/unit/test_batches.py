"""Which rows meet in which batch."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.dataset.batches import GlobalBatches

PROPERTY = settings(deadline=None, database=None)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=60)  # rows of each dialogue
BATCH = st.integers(1, 20)
SEED = st.integers(0, 2**32)


def made(sizes, batch_size, seed=1) -> tuple[GlobalBatches, np.ndarray]:
    """Batches of dialogues with these sizes, whose rows stand anywhere in the file."""
    shuffle = np.random.default_rng(len(sizes)).permutation(sum(sizes))
    dialogue = np.repeat(np.arange(len(sizes)) * 7, sizes)[shuffle]
    return GlobalBatches(dialogue, np.argsort(shuffle), batch_size, seed), dialogue


@PROPERTY
@given(SIZES, BATCH, SEED, st.integers(0, 3))
def test_every_row_stands_in_exactly_one_batch_of_each_epoch(sizes, batch_size, seed, epoch):
    batches, _ = made(sizes, batch_size, seed)
    laid = batches.epoch(epoch)
    assert sorted(np.concatenate(laid)) == list(range(sum(sizes)))
    assert all(1 <= len(batch) <= batch_size for batch in laid)
    assert {batch.dtype for batch in laid} == {np.dtype(np.int64)}


@PROPERTY
@given(SIZES, BATCH, SEED)
def test_a_dialogue_is_whole_or_in_as_few_batches_as_it_needs(sizes, batch_size, seed):
    batches, dialogue = made(sizes, batch_size, seed)
    laid = batches.epoch(0)
    for number, size in enumerate(sizes):
        shares = [int((dialogue[batch] == number * 7).sum()) for batch in laid]
        assert sum(share > 0 for share in shares) == math.ceil(size / batch_size)


def test_a_dialogue_larger_than_a_batch_is_split_along_the_order():
    order = np.array([3, 1, 4, 0, 2])
    laid = GlobalBatches(np.zeros(5, np.int64), order, 2, seed=0).epoch(0)
    assert [sorted(order[batch]) for batch in laid] == [[0, 1], [2, 3], [4]]


@PROPERTY
@given(SIZES, BATCH, SEED)
def test_steps_are_numbered_through_the_epochs(sizes, batch_size, seed):
    batches, _ = made(sizes, batch_size, seed)
    step = 0
    for epoch in range(3):
        assert batches.first_step(epoch) == step
        for index, rows in enumerate(batches.epoch(epoch)):
            assert batches[step].tolist() == rows.tolist()
            assert batches.epochs_after(step) == epoch + index / len(batches.epoch(epoch))
            step += 1
    assert batches.first_step(3) == step


@PROPERTY
@given(SIZES, BATCH, SEED)
def test_epochs_are_whole_exactly_at_their_ends(sizes, batch_size, seed):
    batches, _ = made(sizes, batch_size, seed)
    ends = [batches.first_step(epoch) for epoch in range(4)]
    whole = [step for step in range(ends[-1] + 1) if batches.epochs_after(step) == int(batches.epochs_after(step))]
    assert whole == ends
    assert [batches.epochs_after(step) for step in ends] == [0.0, 1.0, 2.0, 3.0]


@PROPERTY
@given(SIZES, BATCH, SEED, st.integers(0, 30))
def test_a_resumed_run_that_asks_for_one_step_gets_the_same_rows(sizes, batch_size, seed, step):
    first, second = made(sizes, batch_size, seed)[0], made(sizes, batch_size, seed)[0]
    for before in range(step):
        first[before]
    assert first[step].tolist() == second[step].tolist()


def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else():
    def order(seed, epoch):
        return np.concatenate(made([1, 2, 3] * 30, 8, seed)[0].epoch(epoch)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 2) != order(2, 1)


@PROPERTY
@given(st.integers(1, 200), st.integers(1, 70), SEED, st.integers(0, 3))
def test_plain_rows_are_a_permutation_cut_into_batches(rows, batch_size, seed, epoch):
    """What `--fold off` does, as before there was folding."""
    batches = GlobalBatches(np.arange(rows), np.random.default_rng(0).permutation(rows), batch_size, seed)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    expected = [order[start : start + batch_size].tolist() for start in range(0, rows, batch_size)]
    assert [batch.tolist() for batch in batches.epoch(epoch)] == expected
    assert batches.first_step(epoch + 1) == (epoch + 1) * math.ceil(rows / batch_size)


@PROPERTY
@given(st.lists(st.integers(1, 9), min_size=40, max_size=200), st.integers(20, 60), SEED)
def test_few_steps_are_added_where_dialogues_are_small(sizes, batch_size, seed):
    """A batch is opened only where none has room for the dialogue, so all but one lack less than a dialogue."""
    steps = len(made(sizes, batch_size, seed)[0].epoch(0))
    fewest = math.ceil(Fraction(sum(sizes), batch_size))
    assert fewest <= steps <= math.ceil(sum(sizes) / (batch_size - max(sizes) + 1)) + 1


@pytest.mark.parametrize(("batch_size", "more"), [(16, 1.15), (64, 1.03), (128, 1.02)])
def test_dialogues_like_those_of_the_medical_set_take_hardly_more_steps_than_rows_would(batch_size, more):
    sizes = np.random.default_rng(0).integers(5, 9, 600).tolist()
    batches, _ = made(sizes, batch_size)
    fewest = math.ceil(sum(sizes) / batch_size)
    assert max(len(batches.epoch(epoch)) for epoch in range(5)) <= fewest * more + 1
