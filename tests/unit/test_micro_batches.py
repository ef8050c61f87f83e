"""How a global batch is cut to the token budget and spread over ranks and micro-batches."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.dataset.batches import GlobalBatches
from dsft.dataset.cutting import Chunk, assign_to_ranks, costs_of, cut, makespan, pack_sequences
from dsft.dataset.folding import attention_mask, fold, shared_prefixes, sort_rows
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions
from dsft.dataset.tokens import RowFlags, load_dataset
from dsft.errors import UserError
from dsft.model.flops import Cost
from tests.helpers import MEDICAL, token_dataset

PROPERTY = settings(deadline=None, database=None, max_examples=60)
TOKEN = st.integers(1, 3)
LAST = st.tuples(st.integers(1, 4), st.just(True))
ROWS = st.lists(
    st.tuples(st.lists(st.tuples(TOKEN, st.booleans()), min_size=1, max_size=12), LAST).map(lambda r: [*r[0], r[1]]),
    min_size=1,
    max_size=14,
)
RANKS = st.integers(1, 4)
SLACK = st.integers(0, 30)  # tokens of the budget beyond the longest row
COSTS = st.builds(Cost, st.integers(0, 9), st.integers(0, 5), st.integers(0, 9)).filter(lambda c: c.token + c.pair > 0)
FOLD_AND_TREES = st.sampled_from([(True, True), (True, False), (False, False), (False, True)])  # fold, trees


def dataset(rows):
    return token_dataset([([t for t, _ in row], [m for _, m in row]) for row in rows])


def made(rows, ranks, slack, fold_and_trees, cost) -> tuple[MicroBatches, MicroBatchOptions]:
    budget = max(map(len, rows)) + slack
    options = MicroBatchOptions(ranks, budget, *fold_and_trees)
    return MicroBatches(dataset(rows), options, cost, 0), options


# Plans


@PROPERTY
@given(ROWS, RANKS, SLACK, FOLD_AND_TREES, COSTS)
def test_every_row_is_in_exactly_one_part_and_all_ranks_have_as_many_parts(rows, ranks, slack, how, cost):
    batches, _ = made(rows, ranks, slack, how, cost)
    chosen = np.random.default_rng(0).permutation(len(rows))[: max(1, len(rows) - 2)]
    plan = batches.plan(chosen)
    assert sorted(int(row) for rank in plan.parts for part in rank for one in part for row in one) == sorted(chosen)
    assert len(plan.parts) == ranks
    assert len({len(parts) for parts in plan.parts}) == 1


@PROPERTY
@given(ROWS, RANKS, SLACK, FOLD_AND_TREES, COSTS)
def test_no_micro_batch_exceeds_the_budget_padding_included(rows, ranks, slack, how, cost):
    batches, options = made(rows, ranks, slack, how, cost)
    for parts in batches.plan(np.arange(len(rows))).parts:
        for part in parts:
            assert batches.make(part).input_ids.numel() <= options.token_budget


@PROPERTY
@given(ROWS, RANKS, SLACK, FOLD_AND_TREES, COSTS)
def test_the_plan_counts_what_is_computed_and_learned(rows, ranks, slack, how, cost):
    batches, _ = made(rows, ranks, slack, how, cost)
    plan = batches.plan(np.arange(len(rows)))
    tokens = pairs = targets = 0
    weights = 0.0
    for part in itertools.chain.from_iterable(plan.parts):
        for one in part:
            folded = fold([batches._data[row] for row in one])
            tokens += len(folded)
            pairs += int(attention_mask(folded).sum())
            targets += sum(int(batches._data.targets[row]) for row in one)
        weights += batches.make(part).loss_weights.sum().item()
    assert plan.tokens == tokens
    assert plan.row_tokens == sum(map(len, rows)) >= tokens
    assert plan.targets == targets == weights
    assert plan.flops == pytest.approx(float(cost.of(tokens, pairs, targets)))


@PROPERTY
@given(ROWS, RANKS, SLACK, FOLD_AND_TREES, COSTS)
def test_the_imbalance_is_what_waiting_for_the_slowest_rank_adds(rows, ranks, slack, how, cost):
    batches, _ = made(rows, ranks, slack, how, cost)
    plan = batches.plan(np.arange(len(rows)))

    def work(part) -> float:
        folded = [fold([batches._data[row] for row in one]) for one in part]
        tokens, pairs = sum(map(len, folded)), sum(int(attention_mask(one).sum()) for one in folded)
        return float(cost.of(tokens, pairs, sum(batches._data.targets[row] for one in part for row in one)))

    waited = sum(max(map(work, at_once)) for at_once in zip(*plan.parts, strict=True))
    mean = sum(work(part) for parts in plan.parts for part in parts) / ranks
    assert plan.imbalance == pytest.approx(waited / mean - 1)
    assert plan.imbalance >= -1e-9


@PROPERTY
@given(ROWS, RANKS, SLACK, FOLD_AND_TREES, COSTS)
def test_a_plan_depends_on_the_rows_alone_not_on_their_order_or_the_process(rows, ranks, slack, how, cost):
    plans = [
        made(rows, ranks, slack, how, cost)[0].plan(np.random.default_rng(seed).permutation(len(rows)))
        for seed in (0, 1)
    ]
    first, second = (
        ([[[one.tolist() for one in part] for part in parts] for parts in plan.parts], plan.flops, plan.imbalance)
        for plan in plans
    )
    assert first == second


@PROPERTY
@given(ROWS, SLACK, COSTS)
def test_folding_never_computes_more(rows, slack, cost):
    everything = np.arange(len(rows))
    off, chains, trees = (
        made(rows, 1, slack, how, cost)[0].plan(everything) for how in ((False, False), (True, False), (True, True))
    )
    assert off.tokens == off.row_tokens == chains.row_tokens == trees.row_tokens
    assert chains.tokens <= off.tokens
    assert trees.tokens <= off.tokens


def test_where_one_micro_batch_holds_all_rows_each_beginning_is_computed_once():
    rows = [[(1, 0), (2, 0), (t, 1)] for t in (3, 4, 3)] + [[(1, 0), (2, 0), (3, 0), (5, 1)]]
    batches, _ = made(rows, 1, 100, (True, True), Cost(1, 1, 1))
    plan = batches.plan(np.arange(4))
    assert (plan.tokens, plan.row_tokens, plan.targets) == (5, 13, 4)
    [[[one]]] = plan.parts
    assert sorted(one) == [0, 1, 2, 3]


def test_rows_that_part_at_the_last_token_are_no_chain():
    rows = [[(1, 0), (2, 0), (3, 1)], [(1, 0), (2, 0), (4, 1)], [(1, 0), (2, 0), (4, 1), (5, 1)]]
    plan = made(rows, 1, 100, (True, False), Cost(1, 1, 1))[0].plan(np.arange(3))
    [[part]] = plan.parts
    assert sorted(sorted(one.tolist()) for one in part) == [[0], [1, 2]]


def test_chains_fold_rows_that_continue_each_other_and_no_others():
    rows = [[(1, 0), (2, 1)], [(1, 0), (2, 0), (3, 1)], [(1, 0), (4, 1)]]
    plan = made(rows, 1, 100, (True, False), Cost(1, 1, 1))[0].plan(np.arange(3))
    assert plan.tokens == 5
    [[part]] = plan.parts
    assert sorted(sorted(one.tolist()) for one in part) == [[0, 1], [2]]


def test_a_row_longer_than_the_budget_is_refused_in_one_line():
    data = dataset([[(1, 0), (2, 1)], [(1, 0), (2, 0), (3, 1)]])
    with pytest.raises(UserError) as caught:
        MicroBatches(data, MicroBatchOptions(2, 2, True, True), Cost(1, 1, 1), 0)
    assert str(caught.value) == (
        "max_tokens_per_micro_batch is 2, but the longest row has 3 tokens; "
        "raise it, or shorten rows with --max_length and --truncation"
    )
    MicroBatches(data, MicroBatchOptions(2, 3, True, True), Cost(1, 1, 1), 0)


# Empty parts


@pytest.fixture
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.mark.parametrize("trees", [True, False])
def test_an_empty_part_gives_loss_zero_and_zero_gradients(model, trees):
    from dsft.loss import TargetHead, summed_loss
    from dsft.model import tree_attention

    if trees:
        model.set_attn_implementation(tree_attention.NAME)
    batches = MicroBatches(dataset([[(1, 0), (2, 1)]]), MicroBatchOptions(3, 2, True, trees), Cost(1, 1, 1), 0)
    parts = batches.plan(np.arange(1)).parts
    assert sorted(len(part) for [part] in parts) == [0, 0, 1]
    batch = batches.make([]).to(torch.device("cpu"))
    assert len(batch.logit_positions) == len(batch.labels) == len(batch.loss_weights) == 0
    loss = summed_loss(model, TargetHead(model), batch)
    loss.backward()
    assert loss.item() == 0.0
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(model.named_parameters()).keys()  # none is missing: every backward is collective
    assert all(not gradient.any() for gradient in gradients.values())


# Cutting


def measured(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    """Sorted rows, with their lengths, what they share with the one before, and their targets."""
    tokens = [np.array([t for t, _ in row], np.int32) for row in rows]
    order = sort_rows(tokens)
    in_order = [(tokens[i], np.array([m for _, m in rows[i]], bool)) for i in order]
    shared = shared_prefixes([row for row, _ in in_order])
    lengths = np.array([len(row) for row, _ in in_order], np.int64)
    targets = np.array([np.count_nonzero(mask[1:]) for _, mask in in_order], np.int64)
    return lengths, shared, targets, in_order


@PROPERTY
@given(ROWS, RANKS, SLACK, COSTS, st.integers(0, 2**32 - 1))
def test_pieces_hold_every_row_once_within_the_budget_and_are_counted_right(rows, ranks, slack, cost, seed):
    lengths, shared, targets, in_order = measured(rows)
    budget = int(lengths.max()) + slack
    dialogue = np.random.default_rng(seed).integers(4, size=len(rows))
    chunks = cut(lengths, shared, targets, dialogue, cost, ranks, budget)
    assert len(chunks) % ranks == 0
    filled = [chunk for chunk in chunks if chunk.tokens]
    assert sorted(i for chunk in filled for i in chunk.rows) == list(range(len(rows)))
    assert all((len(chunk.rows), chunk.cost) == (0, 0.0) for chunk in chunks if not chunk.tokens)
    for chunk in filled:
        assert chunk.rows.tolist() == sorted(chunk.rows)
        folded = fold([in_order[row] for row in chunk.rows])
        assert chunk.tokens == len(folded) <= budget
        expected = cost.of(len(folded), int(attention_mask(folded).sum()), targets[chunk.rows].sum())
        assert chunk.cost == pytest.approx(float(expected))


def every_cut(rows: int, chunks: int):
    """Ways to cut rows into at most so many chunks."""
    for count in range(chunks):
        for ends in itertools.combinations(range(1, rows), count):
            yield list(itertools.pairwise([0, *ends, rows]))


@PROPERTY
@given(
    st.lists(st.lists(st.tuples(TOKEN, st.booleans()), min_size=1, max_size=8), min_size=1, max_size=7), RANKS, SLACK
)
def test_ranks_are_done_no_later_than_with_the_most_even_cut_and_one_rank_as_soon_as_can_be(rows, ranks, slack):
    cost = Cost(5, 1, 2)
    lengths, shared, targets, in_order = measured(rows)
    budget = int(lengths.max()) + slack

    def price(start, end) -> tuple[int, float]:
        folded = fold(in_order[start:end])
        return len(folded), float(cost.of(len(folded), int(attention_mask(folded).sum()), targets[start:end].sum()))

    prices = {(a, b): price(a, b) for a in range(len(rows)) for b in range(a + 1, len(rows) + 1)}
    ways = [way for way in every_cut(len(rows), len(rows)) if all(prices[one][0] <= budget for one in way)]
    wanted = ranks * math.ceil(min(map(len, ways)) / ranks)
    even = min(max(prices[one][1] for one in way) for way in ways if len(way) <= wanted)
    chunks = cut(lengths, shared, targets, np.arange(len(rows)), cost, ranks, budget)
    assert len(chunks) in (wanted, wanted + ranks)
    assert makespan(costs_of(assign_to_ranks(chunks, ranks))) <= even * wanted / ranks * 1.001
    if ranks == 1:
        cheapest = min(sum(prices[one][1] for one in way) for way in ways if len(way) <= wanted + 1)
        assert sum(chunk.cost for chunk in chunks) == pytest.approx(cheapest)


def test_a_cut_falls_between_dialogues():
    rows = [[(d, False)] * 20 + [(9, False)] * n + [(d, True)] for d in (1, 2) for n in (1, 2, 3, 4)]
    lengths, shared, targets, _ = measured(rows)
    chunks = cut(lengths, shared, targets, np.repeat([0, 1], 4), Cost(1, 0, 0), 2, 40)
    assert [chunk.rows.tolist() for chunk in chunks] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_dialogues_that_make_a_share_together_stay_whole():
    """In the sorted order every even cut parts one."""
    sizes = [5, 4, 4, 2, 2, 1]
    rows = [[(d, False)] * 20 + [(9, False)] * n + [(d, True)] for d, size in enumerate(sizes, 1) for n in range(size)]
    lengths, shared, targets, _ = measured(rows)
    chunks = cut(lengths, shared, targets, np.repeat(np.arange(6), sizes), Cost(1, 0, 0), 3, 400)
    assert [chunk.tokens for chunk in chunks] == [50, 50, 50]
    assert (lengths - shared).sum() == 150


@pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is absent")
@pytest.mark.parametrize(
    ("batch", "ranks", "limit"),
    [
        (128, 16, 1.12),
        *((batch, ranks, 1.1) for batch, ranks in itertools.product((128, 549), (2, 8, 64))),
        (549, 16, 1.1),
    ],
)
def test_the_slowest_rank_is_near_what_it_cannot_fall_below(tokenizer, batch, ranks, limit):
    """On the medical set, as a mean of an epoch: an even share of each token once, and the longest row.

    What all rows begin with is computed in every micro-batch. 128 rows are 21 to 23 dialogues, too few to share out
    among 16 ranks without computing their beginnings twice.
    """
    data = load_dataset([str(MEDICAL)], "train_files", tokenizer, RowFlags())
    budget, batches = 4096, GlobalBatches(data.dialogue, data.sorted_place, batch, 42)
    cost = Cost(637_009_920, 207_360, 169_869_312)  # of the embedded model
    micro_batches, found = MicroBatches(data, MicroBatchOptions(ranks, budget, True, True), cost, 0), []
    for rows in batches.epoch(0):
        rows = rows[np.argsort(data.sorted_place[rows])]
        lengths, targets = data.lengths[rows], data.targets[rows]
        shared = shared_prefixes([data[row][0] for row in rows])
        pairs = lengths * (lengths + 1) / 2
        common, unique = int(shared[1:].min()), int((lengths - shared).sum())
        once = cost.of(lengths - shared, pairs - shared * (shared + 1) / 2, targets).sum()
        again = float(cost.of(common, common * (common + 1) / 2, 0)) * (max(ranks, math.ceil(unique / budget)) - 1)
        least = max((once + again) / ranks, cost.of(lengths, pairs, targets).max())
        plan = micro_batches.plan(rows)
        found.append(plan.flops * (1 + plan.imbalance) / ranks / least)
    assert 1 <= np.mean(found) < limit, found


# Dealing

COSTS_OF_CHUNKS = st.lists(st.integers(0, 50), min_size=1, max_size=6)


@PROPERTY
@given(COSTS_OF_CHUNKS, RANKS)
def test_every_piece_is_dealt_once_and_the_nth_of_all_ranks_are_neighbours_in_cost(costs, ranks):
    costs = [*costs, *[0] * (-len(costs) % ranks)]
    chunks = [Chunk(np.arange(i, i + 1), i + 1, float(cost)) for i, cost in enumerate(costs)]
    per_rank = assign_to_ranks(chunks, ranks)
    assert sorted(chunk.tokens for own in per_rank for chunk in own) == list(range(1, len(costs) + 1))
    assert {len(own) for own in per_rank} == {len(costs) // ranks}
    ordered = sorted(costs, reverse=True)
    for n, at_once in enumerate(zip(*per_rank, strict=True)):
        assert sorted((chunk.cost for chunk in at_once), reverse=True) == ordered[n * ranks : (n + 1) * ranks]
    sums = [sum(chunk.cost for chunk in own) for own in per_rank]
    assert max(sums) - min(sums) <= max(costs)


def test_the_rank_with_the_least_so_far_gets_the_most_of_what_comes_next():
    chunks = [Chunk(np.arange(i, i + 1), 1, float(cost)) for i, cost in enumerate((4, 3, 2, 1))]
    assert [[chunk.cost for chunk in own] for own in assign_to_ranks(chunks, 2)] == [[4, 1], [3, 2]]


# Spreading sequences that cannot be one tree

SEQUENCES = st.lists(st.integers(1, 40), min_size=1, max_size=40).map(lambda sizes: np.array(sizes, np.int64))


@PROPERTY
@given(SEQUENCES, RANKS, SLACK, st.booleans())
def test_every_sequence_is_spread_once_within_the_budget(sizes, ranks, slack, padded):
    budget = int(sizes.max()) + slack
    parts = pack_sequences(sizes, sizes.astype(float), ranks, budget, padded=padded)
    assert sorted(int(i) for rank in parts for part in rank for i in part) == list(range(len(sizes)))
    assert len(parts) == ranks
    assert len({len(rank) for rank in parts}) == 1
    for part in itertools.chain.from_iterable(parts):
        assert part.dtype == np.int64
        if len(part):
            used = sizes[part].max() * len(part) if padded else sizes[part].sum()
            assert used <= budget


@PROPERTY
@given(SEQUENCES, RANKS)
def test_ranks_differ_by_at_most_the_heaviest_sequence(sizes, ranks):
    cost = sizes * (sizes + 1) / 2
    parts = pack_sequences(sizes, cost, ranks, int(sizes.sum()), padded=False)
    loads = [sum(cost[part].sum() for part in rank) for rank in parts]
    assert max(loads) - min(loads) <= cost.max()


@PROPERTY
@given(SEQUENCES, SLACK)
def test_sequences_of_like_size_share_a_micro_batch(sizes, slack):
    [parts] = pack_sequences(sizes, sizes.astype(float), 1, int(sizes.max()) + slack, padded=True)
    for longer, shorter in itertools.pairwise(parts):
        assert sizes[longer].min() >= sizes[shorter].max()


@PROPERTY
@given(SEQUENCES, SLACK)
def test_a_micro_batch_ends_only_where_the_next_sequence_would_not_fit(sizes, slack):
    budget = int(sizes.max()) + slack
    [parts] = pack_sequences(sizes, sizes.astype(float), 1, budget, padded=False)
    for part, after in itertools.pairwise(parts):
        assert sizes[part].sum() + sizes[after[0]] > budget


def test_fewer_sequences_than_ranks_leave_empty_parts():
    parts = pack_sequences(np.array([5]), np.array([1.0]), 3, 5, padded=True)
    assert sorted(len(part) for [part] in parts) == [0, 0, 1]


def test_what_is_balanced_is_work_not_rows():
    parts = pack_sequences(np.array([1000, 10, 10, 10, 10]), np.array([1000.0, 10, 10, 10, 10]), 2, 5000, padded=False)
    assert [sum(len(part) for part in rank) for rank in parts] == [1, 4]
