"""Folding: every row can be read back, each token sees its own row's beginning and nothing else."""

import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.dataset import token_files
from dsft.dataset.folding import attention_mask, common_prefix, find_dialogues, fold, pack, shared_prefixes, sort_rows

PROPERTY = settings(deadline=None, database=None, max_examples=300)
ROWS = st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=8)


def made(rows):
    return [(np.array([t for t, _ in row], np.int32), np.array([m for _, m in row], bool)) for row in rows]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=30), st.integers(1, 40))
@settings(deadline=None, database=None)
def test_rows_of_a_file_are_sorted_as_those_in_memory(rows, at_once):
    tokens = [np.array(row, np.int32) for row in rows]
    lengths = np.array(list(map(len, rows)))
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "RUN_TOKENS", at_once)  # several runs, which are merged
        np.concatenate(tokens).tofile(file)
        file.flush()
        order, shared = token_files.sort_rows_of_file(file, np.cumsum(lengths) - lengths, lengths)
    assert order.tolist() == sort_rows(tokens).tolist()
    assert shared.tolist() == shared_prefixes([tokens[row] for row in order]).tolist()


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


# Side by side


@PROPERTY
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_packed_sequences_stay_as_they_were_and_apart(groups):
    parts = [fold(made(rows)) for rows in groups]
    whole = pack(parts)
    starts = np.cumsum([0, *map(len, parts)])
    assert len(whole) == starts[-1]
    mask = attention_mask(whole)
    for part, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
        own = slice(start, end)
        for name in ("tokens", "depth", "weight"):
            assert (getattr(whole, name)[own] == getattr(part, name)).all()
        assert (whole.parent[own] == np.where(part.parent < 0, -1, part.parent + start)).all()
        assert (mask[own, own] == attention_mask(part)).all()
        mask[own, own] = False
    assert not mask.any()


def test_one_packed_sequence_is_itself_and_two_are_no_chain():
    chain = fold(made([[(1, 0), (2, 1)]]))
    assert pack([chain]).is_chain
    assert not pack([chain, chain]).is_chain


# Sorting, and what belongs together

ROW = st.lists(st.integers(0, 3), min_size=1, max_size=7)
WITH_PROMPTS = st.lists(
    ROW.flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, len(tokens)))), min_size=1, max_size=9
)


@PROPERTY
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 255, 256, 65_536, 128_000]), max_size=6), min_size=1, max_size=9))
def test_rows_are_sorted_by_their_tokens_whatever_their_size(rows):
    order = sort_rows([np.array(row, np.int32) for row in rows])
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(rows)))
    assert [rows[i] for i in order] == sorted(rows)


def test_equal_rows_keep_their_order():
    assert sort_rows([np.array(row, np.int32) for row in ([2], [1], [2], [1])]).tolist() == [1, 3, 0, 2]


def linked_by_definition(rows: list[tuple[list[int], int]]) -> list[int]:
    """Rows are linked where the prompt of one is a beginning of the other; the number of a row's component."""
    number = list(range(len(rows)))
    for i, (tokens, length) in enumerate(rows):
        for j, (other, _) in enumerate(rows):
            if other[:length] == tokens[:length]:
                merged, gone = sorted((number[i], number[j]))
                number = [merged if n == gone else n for n in number]
    return number


def found_dialogues(rows: list[tuple[list[int], int]]) -> np.ndarray:
    tokens = [np.array(row, np.int32) for row, _ in rows]
    order = sort_rows(tokens)
    shared = shared_prefixes([tokens[row] for row in order])
    return find_dialogues(np.array([length for _, length in rows], np.int64), order, shared)


@PROPERTY
@given(WITH_PROMPTS)
def test_dialogues_are_rows_linked_by_their_prompts(rows):
    expected, found = linked_by_definition(rows), found_dialogues(rows)
    pairs = range(len(rows))
    assert [[found[i] == found[j] for j in pairs] for i in pairs] == [
        [expected[i] == expected[j] for j in pairs] for i in pairs
    ]


def test_turns_and_answers_of_one_prompt_belong_together_and_a_system_prompt_links_nothing():
    system = [9, 9, 9]
    rows = [
        ([*system, 1, 2], 4),
        ([*system, 1, 2, 3, 4], 6),  # the next turn
        ([*system, 1, 5], 4),  # another answer to the first
        ([*system, 2, 2], 4),  # another dialogue
    ]
    numbers = found_dialogues(rows).tolist()
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


def test_a_dialogue_whose_thinking_is_stripped_from_the_history_is_one():
    first = ([1, 2, 70, 71, 5], 2)  # thinking 70 71, answer 5
    second = ([1, 2, 5, 3, 80, 6], 4)
    third = ([1, 2, 5, 3, 6, 4, 90, 7], 6)
    other = ([1, 3, 60, 5], 2)
    numbers = found_dialogues([first, other, third, second]).tolist()
    assert numbers[0] == numbers[2] == numbers[3] != numbers[1]


@PROPERTY
@given(ROW, ROW)
def test_a_common_prefix_is_counted_to_the_first_difference(first, second):
    length = common_prefix(np.array(first, np.int32), np.array(second, np.int32))
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]
