"""A validation set split off by whole dialogues, and subsets of rows."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsft.config.flags import RowFlags
from dsft.dataset.leaks import find_leaks
from dsft.dataset.splitting import choose_sizes, join_rows, rows_to_split_off, split_off
from dsft.dataset.token_files import Counts, Row, save_rows
from dsft.dataset.tokens import TokenDataset, load_dataset
from dsft.errors import UserError
from tests.helpers import SAMPLE_TRAIN, message, outputs_elsewhere, token_dataset, write_parquet

PROPERTY = settings(deadline=None, database=None)
END = 9
IDS = st.lists(st.integers(1, 3), max_size=3)
ROW = st.tuples(IDS.map(lambda ids: [*ids, 7]), IDS.map(lambda ids: [*ids, END]), st.integers(0, 5))
ROWS = st.lists(ROW, min_size=2, max_size=30)
FRACTION = st.floats(0.001, 0.999)
SEED = st.integers(0, 2**32)


def divide(data, fraction, seed):
    """(training rows, validation rows)."""
    return split_off(data, rows_to_split_off(data, fraction, seed))


def dataset(rows):
    made = [([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)) for prompt, answer, _ in rows]
    return token_dataset(made, levels=[level for *_, level in rows])


def row_lists(data) -> list:
    return [tuple(part.tolist() for part in data[row]) for row in range(len(data))]


def dialogues(sizes) -> "object":
    """A dataset of dialogues with so many rows."""
    return dataset([([number + 10, 7], [turn, END], 0) for number, size in enumerate(sizes) for turn in range(size)])


@pytest.fixture(scope="module")
def sample(tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_dataset([str(SAMPLE_TRAIN)], "train_files", tokenizer, RowFlags())


def test_the_rows_of_a_conversation_stay_together_whatever_its_template_makes_of_them(tmp_path):
    """The rows of a conversation need not begin alike: a template may put the date before everything."""
    made = [
        Row(np.array([i + 5, 7, i + 50, END], np.int32), np.array([0, 0, 1, 1], bool), source=(0, i // 3))
        for i in range(30)
    ]
    save_rows(tmp_path, made, Counts())
    data = TokenDataset(tmp_path)
    for seed in range(5):
        val = rows_to_split_off(data, 0.3, seed)
        assert val.tolist() == [3 * first + i for first in sorted({row // 3 for row in val.tolist()}) for i in range(3)]


@PROPERTY
@given(ROWS, FRACTION, SEED)
def test_after_a_split_every_row_is_on_one_side_and_nothing_leaks(rows, fraction, seed):
    data = dataset(rows)
    try:
        train, val = divide(data, fraction, seed)
    except UserError:
        assert len(set(join_rows([data.dialogue + 1, data.level, data.row_hash]))) == 1
        return
    assert len(train) > 0
    assert len(val) > 0
    assert sorted(row_lists(train) + row_lists(val)) == sorted(row_lists(data))
    assert not find_leaks(train, val)
    assert not find_leaks(val, train)
    assert set(train.dialogue).isdisjoint(val.dialogue)
    again = divide(data, fraction, seed)
    assert [part.fingerprint for part in again] == [train.fingerprint, val.fingerprint]
    assert len({data.fingerprint, train.fingerprint, val.fingerprint}) == 3


@PROPERTY
@given(st.lists(st.integers(1, 12), min_size=2, max_size=9), FRACTION)
def test_no_other_choice_comes_nearer(sizes, fraction):
    wanted = fraction * sum(sizes)
    chosen = choose_sizes(sizes, wanted)
    assert len(set(chosen)) == len(chosen)
    possible = {sum(part) for n in range(1, len(sizes)) for part in combinations(sizes, n)}
    got = sum(sizes[index] for index in chosen)
    assert got in possible
    assert abs(got - wanted) == min(abs(total - wanted) for total in possible)


@PROPERTY
@given(st.lists(st.integers(1, 700), min_size=50, max_size=400), FRACTION)
def test_many_rows_come_as_near(sizes, fraction):
    """More rows than are searched through; the small ones that come last can make up any difference."""
    wanted = fraction * sum(sizes)
    assume(700 < wanted < sum(sizes) - 700)
    all_sizes = [*sizes, *range(1, 40)]
    chosen = choose_sizes(all_sizes, wanted)
    assert len(set(chosen)) == len(chosen)
    assert abs(sum(all_sizes[index] for index in chosen) - wanted) <= 0.5 + 1e-9


def test_the_first_ones_are_taken_where_they_do():
    assert choose_sizes([1] * 10, 3) == [2, 1, 0]
    assert choose_sizes([2, 3, 5, 1], 5) == [1, 0]
    assert choose_sizes([5, 7], 0.1) == [0]
    assert choose_sizes([5, 7], 11.9) == [1]
    assert choose_sizes([1, 1, 1], 1.5) == [0]


def test_the_share_is_met_and_the_seed_decides():
    data = dialogues([4, 3, 2, 1] * 25)
    parts = {seed: divide(data, 0.1, seed) for seed in range(5)}
    assert {(len(train), len(val)) for train, val in parts.values()} == {(225, 25)}
    assert len({val.fingerprint for _, val in parts.values()}) == 5
    drawn = {int(number) for _, val in parts.values() for number in val.dialogue}
    assert len(drawn) > 25  # of a hundred dialogues, about ten a seed


def test_levels_and_copies_stay_together_too():
    """Six rows of six dialogues; a level joins the first two, another the last two."""
    data = dataset([([10 + i, 7], [1, END], level) for i, level in enumerate([5, 5, 0, 0, 6, 6])])
    for seed in range(8):
        _, val = divide(data, 0.34, seed)
        assert len(val) == 2
        levels = val.level.tolist()
        assert levels in ([5, 5], [0, 0], [6, 6])


def test_one_dialogue_cannot_be_split():
    told = message(rows_to_split_off, dialogues([3]), 0.5, 1)
    assert told.startswith("--val_fraction 0.5 splits off whole dialogues, but all 3 rows of --train_files belong to")
    assert told.endswith("use --val_files instead")


def test_another_process_draws_the_same(sample):
    code = (
        "import numpy as np\n"
        "from dsft.dataset.splitting import choose_sizes, join_rows\n"
        "order = np.random.default_rng(np.random.SeedSequence(3).spawn(1)[0]).permutation(50)\n"
        "print(choose_sizes((order % 7 + 1).tolist(), 20.3), join_rows([order % 9, order % 4]).tolist())"
    )
    assert len(outputs_elsewhere(code)) == 1


# Groups


def test_rows_are_joined_by_chains_of_equal_keys():
    keys = [np.array([1, 1, 2, 3, 0, 0]), np.array([0, 5, 5, 0, 0, 6])]
    assert join_rows(keys).tolist() == [0, 0, 0, 3, 4, 5]


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=15))
def test_groups_are_those_of_comparing_all_pairs(pairs):
    groups = [{i} for i in range(len(pairs))]
    for i, a in enumerate(pairs):
        for j, b in enumerate(pairs):
            if any(x == y != 0 for x, y in zip(a, b, strict=True)):
                both = groups[i] | groups[j]
                for k in both:
                    groups[k] = both
    joined = join_rows([np.array(key) for key in zip(*pairs, strict=True)])
    assert joined.tolist() == [min(group) for group in groups]


# Subsets


def test_a_subset_has_the_rows_counts_and_fingerprint_of_its_own(sample):
    numbers = np.unique(sample.dialogue)[[1, 4, 9]]
    rows = np.flatnonzero(np.isin(sample.dialogue, numbers))
    part = sample.subset(rows)
    assert row_lists(part) == [row_lists(sample)[row] for row in rows]
    assert part.counts.rows == len(part) == len(rows)
    assert part.counts.tokens == sum(len(sample[row][0]) for row in rows) == part.lengths.sum()
    assert part.counts.targets == part.targets.sum() == sum(sample[row][1][1:].sum() for row in rows)
    assert part.fingerprint != sample.fingerprint
    assert [part.place(i) for i in range(3)] == [f"{SAMPLE_TRAIN}, row {row}" for row in rows[:3]]
    tokens = [part[row][0].tolist() for row in np.argsort(part.sorted_place)]
    assert tokens == sorted(tokens)
    assert sample.without(np.setdiff1d(np.arange(len(sample)), rows)).fingerprint == part.fingerprint


def test_the_tokens_of_a_subset_stay_mapped(sample):
    part = sample.subset(np.flatnonzero(sample.dialogue == sample.dialogue[0]))
    assert part.tokens is sample.tokens
    assert isinstance(part.tokens.base, np.memmap)


def test_all_rows_are_the_same_data(sample):
    assert sample.subset(np.arange(len(sample))).fingerprint == sample.fingerprint
    assert sample.without(np.empty(0, np.int64)).fingerprint == sample.fingerprint


def test_what_truncation_cost_is_told_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{i} " + "the " * (5 + 10 * (i % 6)), "response": "a b c"} for i in range(30)]
    file = write_parquet(tmp_path / "rows.parquet", [*rows, {"prompt": "x", "response": "the " * 99}])
    data = load_dataset([str(file)], "train_files", tokenizer, RowFlags(max_length=80, truncation="left"))
    assert (data.counts.rows_cut, data.counts.rows_dropped) == (10, 1)
    train, val = divide(data, 0.3, 1)
    for name in ("rows", "tokens", "targets", "rows_cut", "tokens_cut", "rows_dropped", "tokens_dropped"):
        assert getattr(train.counts, name) + getattr(val.counts, name) == getattr(data.counts, name), name
    assert val.counts.rows_dropped == 0
