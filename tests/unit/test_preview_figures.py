"""Statistics against hand computation, and against the Trainer's own micro-batches."""

import math
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config import PreviewConfig
from dsft.config.flags import RowFlags
from dsft.dataset.batches import GlobalBatches
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions
from dsft.dataset.tokens import load_dataset
from dsft.errors import UserError
from dsft.model.flops import Cost
from dsft.planning.plan import RunPlan
from dsft.previewing.render import histogram_lines
from dsft.previewing.statistics import (
    MAX_PLANNED,
    Bin,
    SetStatistics,
    batches_and_folding,
    fold_ratios,
    histogram,
    set_statistics,
)
from tests.helpers import SAMPLE_TRAIN, token_dataset

PROPERTY = settings(deadline=None, database=None)
COST = Cost(1.0, 0.01, 2.0)
# Two dialogues: a row is the beginning of the next one, or parts ways with it after three tokens.
ROWS = [
    ([1, 2, 3, 4], [0, 0, 0, 1]),
    ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 1]),
    ([1, 2, 3, 7, 8], [0, 0, 0, 1, 1]),
    ([9, 9, 9], [0, 1, 1]),
]


def plan(tree_unsupported_reason=None, **changes) -> RunPlan:
    options = {"ranks": 1, "token_budget": 100, "fold": True, "trees": tree_unsupported_reason is None} | changes
    return RunPlan(MicroBatchOptions(**options), COST, 0, 10, 10, tree_unsupported_reason)


def statistics(data, whole_lengths, batch_size=4, seed=1) -> SetStatistics:
    config = PreviewConfig(model="m", train_files=["t"], train_batch_size=batch_size, max_length=10, seed=seed)
    return set_statistics(data, whole_lengths, config)


def test_the_statistics_of_a_small_set_by_hand():
    found = statistics(token_dataset(ROWS), np.array([4, 6, 5, 30]))
    assert (found.rows, found.tokens, found.targets) == (4, 18, 7)
    assert found.target_share == 7 / 18
    assert (found.shortest, found.longest, found.mean, found.median) == (3, 6, 4.5, 4.5)
    assert found.padding == 1 - 18 / (4 * 6)
    assert found.padding_to_max_length == 1 - 18 / 40
    assert (found.lengths[0].low, found.lengths[-1].high) == (0, 34)
    assert found.duplicates == 0


def test_padding_is_counted_batch_by_batch_in_an_order_without_folding():
    data = token_dataset(ROWS)
    for seed in range(5):
        batches = GlobalBatches(np.arange(4), data.sorted_place, 2, seed).epoch(0)
        slots = sum(2 * max(len(ROWS[row][0]) for row in batch) for batch in batches)
        assert statistics(data, data.lengths, 2, seed).padding == 1 - 18 / slots


# Folding and batches


@pytest.mark.parametrize(
    ("rows", "trees", "chains"),
    [
        # trees: 1 2 3 4 5 6, 7 8, 9 9 9; chains: 1 2 3 4 5 6, 1 2 3 7 8, 9 9 9
        ([0, 1, 2, 3], 18 / 11, 18 / 14),
        ([0, 1], 10 / 6, 10 / 6),
        ([0, 2], 9 / 6, 1),
        ([3], 1, 1),
    ],
)
def test_the_fold_ratio_by_hand(rows, trees, chains):
    found, [planned] = fold_ratios(token_dataset(ROWS), [np.array(rows)], plan())
    assert (found.trees, found.chains, len(planned.parts[0])) == (trees, chains, 1)
    assert (found.used, found.why) == ("trees", "")


def test_which_ratio_training_has():
    data, batches = token_dataset(ROWS), [np.arange(4)]
    found, _ = fold_ratios(data, batches, plan(tree_unsupported_reason="it has a window"))
    assert (found.used, found.chains, found.why) == ("chains", 18 / 14, "it has a window")
    found, _ = fold_ratios(data, batches, plan(fold=False))
    assert (found.used, found.why) == ("off", "--fold off")
    assert (found.trees, found.chains) == (18 / 11, 18 / 14)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("budget", [350, 4096])
@pytest.mark.parametrize("why", [None, "a reason"])
@pytest.mark.parametrize("fold", [True, False])
def test_folding_and_batches_are_those_of_the_trainers_micro_batches(
    tokenizer, tmp_path, monkeypatch, ranks, budget, why, fold
):
    """Built here as the Trainer builds them, step by step over the first epoch."""
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    data = load_dataset([str(SAMPLE_TRAIN)], "train_files", tokenizer, RowFlags())
    given = plan(ranks=ranks, token_budget=budget, fold=fold, tree_unsupported_reason=why)
    order = GlobalBatches(data.dialogue if fold else np.arange(len(data)), data.sorted_place, 16, 1)
    batches, folding = batches_and_folding(data, order, given, order.first_step(3))
    micro_batches = MicroBatches(data, MicroBatchOptions(ranks, budget, fold=fold, trees=why is None), COST, 0)
    plans = [micro_batches.plan(order[step]) for step in range(order.first_step(1))]
    assert batches.steps_first_epoch == batches.planned == len(plans)
    assert batches.steps == order.first_step(3)
    ratio = sum(p.row_tokens for p in plans) / sum(p.tokens for p in plans)
    assert asdict(folding).get(folding.used, 1) == pytest.approx(ratio, rel=1e-12)
    assert batches.micro_batches == sum(len(plan.parts[0]) for plan in plans) / len(plans)
    assert batches.rows == len(data) / len(plans)
    assert batches.tokens == pytest.approx(sum(plan.row_tokens for plan in plans) / len(plans))
    assert batches.targets == pytest.approx(sum(plan.targets for plan in plans) / len(plans))


def test_of_a_long_epoch_some_steps_are_laid_out():
    data = token_dataset([([i, 1, 2], [0, 1, 1]) for i in range(3, 203)])
    order = GlobalBatches(np.arange(200), data.sorted_place, 1, 1)
    batches, folding = batches_and_folding(data, order, plan(), 200)
    assert (batches.steps_first_epoch, batches.planned) == (200, MAX_PLANNED)
    assert (batches.micro_batches, folding.trees) == (1, 1)


def test_a_row_longer_than_the_token_budget_is_refused():
    data = token_dataset(ROWS)
    order = GlobalBatches(np.arange(len(data)), data.sorted_place, 2, 1)
    with pytest.raises(UserError, match="max_tokens_per_micro_batch is 5, but the longest row has 6 tokens"):
        batches_and_folding(data, order, plan(token_budget=5), 2)


# Duplicates


def test_duplicates_by_hand():
    other_targets = ([1, 2, 3, 4], [0, 0, 1, 1])
    for rows, duplicates in (
        (ROWS, 0),
        ([*ROWS, ROWS[0], ROWS[3], ROWS[0]], 3),
        ([*ROWS, other_targets], 0),
        ([*ROWS, other_targets, ROWS[0], other_targets], 2),
    ):
        data = token_dataset(rows)
        assert statistics(data, data.lengths).duplicates == duplicates


@PROPERTY
@given(st.lists(st.lists(st.tuples(st.integers(1, 2), st.booleans()), min_size=2, max_size=3), min_size=1, max_size=12))
def test_duplicates_are_what_a_set_would_not_hold_twice(rows):
    rows = [[*row, (3, True)] for row in rows]
    data = token_dataset([([token for token, _ in row], [mask for _, mask in row]) for row in rows])
    assert statistics(data, data.lengths).duplicates == len(rows) - len(set(map(tuple, rows)))


# Histogram


def test_the_histogram_by_hand():
    lengths = np.array([3, 7, 10, 12, 19, 20, 35])
    assert histogram(lengths, 5) == [Bin(0, 9, 2), Bin(10, 19, 3), Bin(20, 29, 1), Bin(30, 39, 1)]
    assert histogram(lengths, 2) == [Bin(0, 19, 5), Bin(20, 39, 2)]
    assert histogram(np.array([5, 5])) == [Bin(5, 5, 2)]
    assert histogram(np.array([1480, 1520]), 5) == [
        Bin(1480, 1489, 1), Bin(1490, 1499, 0), Bin(1500, 1509, 0), Bin(1510, 1519, 0), Bin(1520, 1529, 1),
    ]  # fmt: skip


def test_the_histograms_bars_by_hand():
    bins = [Bin(0, 499, 1), Bin(500, 999, 2000), Bin(1000, 1499, 0), Bin(1500, 1999, 1000)]
    assert histogram_lines(bins) == [
        "      0 to 499      1  █",
        "    500 to 999  2,000  " + "█" * 40,
        "1,000 to 1,499      0",
        "1,500 to 1,999  1,000  " + "█" * 20,
    ]
    assert histogram_lines([Bin(5, 5, 2)]) == ["5  2  " + "█" * 40]


@PROPERTY
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(2, 20))
def test_a_histogram_has_every_row_in_its_bin(lengths, most):
    bins = histogram(np.array(lengths), most)
    assert len(bins) <= most
    assert bins[0].rows > 0 < bins[-1].rows
    for b, after in pairwise(bins):
        assert after.low == b.high + 1
    for b in bins:
        assert b.rows == sum(b.low <= length <= b.high for length in lengths)
    width = bins[0].high - bins[0].low + 1
    assert math.log10(width) % 1 == pytest.approx(math.log10(int(str(width)[0])) % 1)
    assert str(width)[0] in "125"
