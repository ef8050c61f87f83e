"""What stands in the training rows and in the validation rows, counted in more than one way."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config import GenerateConfig, TrainConfig
from dsft.config.flags import RowFlags
from dsft.dataset.leaks import find_leaks, separate
from dsft.dataset.tokens import load_dataset
from dsft.envs.expert_data import generate
from tests.helpers import MEDICAL, ROOT, SAMPLE_TRAIN, SAMPLE_VAL, message, token_dataset, write_parquet

PROPERTY = settings(deadline=None, database=None)
END = 9
IDS = st.lists(st.integers(1, 2), max_size=3)
ROW = st.tuples(IDS.map(lambda ids: [*ids, 7]), IDS.map(lambda ids: [*ids, END]), st.integers(0, 3))
ROWS = st.lists(ROW, min_size=1, max_size=9)
KINDS = ("rows", "prompts", "dialogues", "levels")


def dataset(rows):
    """Of (prompt, answer) or (prompt, answer, level)."""
    made = [([*row[0], *row[1]], [False] * len(row[0]) + [True] * len(row[1])) for row in rows]
    return token_dataset(made, levels=[row[2] if len(row) > 2 else 0 for row in rows])


def found(train, val) -> dict[str, list[int]]:
    """Validation rows of each kind of leak."""
    leaks = find_leaks(dataset(train), dataset(val))
    return {kind: getattr(leaks, kind).val.tolist() for kind in KINDS}


def pairs(matches) -> list[tuple[int, int]]:
    """(validation row, training row)."""
    return list(zip(matches.val.tolist(), matches.train.tolist(), strict=True))


NOTHING: dict[str, list[int]] = {kind: [] for kind in KINDS}
OTHERS = [([1, 1, 7], [3, END]), ([1, 2, 7], [3, END])]


def test_sets_that_only_share_a_beginning_do_not_leak():
    assert found(OTHERS, [([1, 3, 7], [3, END]), ([1, 4, 7], [3, END])]) == NOTHING
    assert not find_leaks(dataset(OTHERS), dataset([([1, 3, 7], [3, END])]))


def test_a_copied_row_leaks_in_every_way_that_tokens_can():
    val = [([5, 7], [3, END]), ([1, 2, 7], [3, END])]
    assert found(OTHERS, val) == {"rows": [1], "prompts": [1], "dialogues": [1], "levels": []}
    leaks = find_leaks(dataset(OTHERS), dataset(val))
    assert pairs(leaks.rows) == pairs(leaks.prompts) == pairs(leaks.dialogues) == [(1, 1)]
    assert (leaks.val_rows.tolist(), leaks.train_rows.tolist()) == ([1], [1])


def test_the_same_tokens_with_other_targets_are_no_copy():
    train = token_dataset([([1, 7, 3, END], [False, False, True, True])])
    val = token_dataset([([1, 7, 3, END], [False, False, False, True])])
    leaks = find_leaks(train, val)
    assert [len(getattr(leaks, kind)) for kind in KINDS] == [0, 0, 1, 0]


def test_another_answer_to_the_same_prompt():
    assert found(OTHERS, [([1, 2, 7], [4, END])]) == {"rows": [], "prompts": [0], "dialogues": [0], "levels": []}


@pytest.mark.parametrize("later_in", ["train", "val"])
def test_an_earlier_or_a_later_turn_of_a_dialogue(later_in):
    first, later = ([1, 5, 7], [3, END]), ([1, 5, 7, 3, END, 6, 7], [4, END])
    train, val = ([later, *OTHERS], [first]) if later_in == "train" else ([*OTHERS, first], [later])
    assert found(train, val) == {"rows": [], "prompts": [], "dialogues": [0], "levels": []}


def test_one_short_prompt_joins_several_dialogues_of_the_other_set():
    """[1 7] is the beginning of both validation dialogues, though none of these is of the other."""
    val = [([1, 7, 5, 7], [3, END]), ([1, 7, 6, 7], [3, END]), ([1, 7, 6, 7, 3, 7], [3, END]), ([2, 7], [3, END])]
    leaks = find_leaks(dataset([([4, 7], [3, END]), ([1, 7], [3, END])]), dataset(val))
    assert leaks.dialogues.val.tolist() == [0, 1, 2]
    assert leaks.dialogues.train.tolist() == [1, 1, 1]
    assert leaks.dialogues.distinct == 1
    leaks = find_leaks(dataset(val), dataset([([4, 7], [3, END]), ([1, 7], [3, END])]))
    assert leaks.dialogues.val.tolist() == [1]
    assert leaks.train_rows.tolist() == [0, 1, 2]


def test_a_level_leaks_whatever_its_prompt_is():
    train = [([1, 7], [3, END], 11), ([2, 7], [3, END], 12)]
    val = [([3, 7], [3, END], 13), ([4, 7], [3, END], 12), ([5, 7], [3, END], 12), ([6, 7], [3, END])]
    leaks = find_leaks(dataset(train), dataset(val))
    assert (leaks.levels.val.tolist(), leaks.levels.train.tolist(), leaks.levels.distinct) == ([1, 2], [1, 1], 1)
    assert not leaks.rows
    assert not leaks.dialogues


def test_what_leaks_takes_its_dialogue_and_its_level_along():
    """Row 0 is a copy; 1 continues its dialogue; 2 is of 1's level; 3 is of 2's dialogue; 4 is of none of these."""
    val = [
        ([1, 7], [3, END]),
        ([1, 7, 3, 7], [3, END], 20),
        ([2, 7, 3, 7], [3, END], 20),
        ([2, 7], [3, END]),
        ([4, 7], [3, END], 21),
    ]
    leaks = find_leaks(dataset([([1, 7], [3, END]), ([5, 7], [3, END])]), dataset(val))
    assert leaks.val_rows.tolist() == [0, 1, 2, 3]
    assert leaks.train_rows.tolist() == [0]


def slowly(train, val) -> dict[str, list[int]]:
    """By the definitions, each row with each."""
    rows = [*train, *val]
    whole = [[*prompt, *answer] for prompt, answer, _ in rows]
    linked = [{i} for i in range(len(rows))]
    for i, (prompt, *_) in enumerate(rows):
        for j, ids in enumerate(whole):
            if ids[: len(prompt)] == prompt:
                both = linked[i] | linked[j]
                for k in both:
                    linked[k] = both
    first = len(train)
    leaking = {
        "rows": lambda v: any((t[0], t[1]) == (v[0], v[1]) for t in train),
        "prompts": lambda v: any(t[0] == v[0] for t in train),
        "levels": lambda v: any(t[2] == v[2] != 0 for t in train),
    }
    made = {kind: [i for i, row in enumerate(val) if test(row)] for kind, test in leaking.items()}
    made["dialogues"] = [i for i in range(len(val)) if min(linked[first + i]) < first]
    return made


@PROPERTY
@given(ROWS, ROWS)
def test_every_pair_compared_gives_the_same_and_what_is_named_is_found_in_both_rows(train, val):
    leaks = find_leaks(dataset(train), dataset(val))
    assert {kind: getattr(leaks, kind).val.tolist() for kind in KINDS} == slowly(train, val)
    for val_row, train_row in pairs(leaks.rows):
        assert val[val_row][:2] == train[train_row][:2]
        assert train_row == min(i for i, row in enumerate(train) if row[:2] == val[val_row][:2])
    for val_row, train_row in pairs(leaks.prompts):
        assert val[val_row][0] == train[train_row][0]
    for val_row, train_row in pairs(leaks.levels):
        assert val[val_row][2] == train[train_row][2]
    assert leaks.levels.distinct == len({row[2] for row in train} & {row[2] for row in val} - {0})
    assert leaks.prompts.distinct == len({(*row[0],) for row in train} & {(*row[0],) for row in val})


@PROPERTY
@given(ROWS, ROWS)
def test_without_the_rows_of_either_side_nothing_leaks(train, val):
    data, judged = dataset(train), dataset(val)
    leaks = find_leaks(data, judged)
    for kind in KINDS:
        assert set(getattr(leaks, kind).val) <= set(leaks.val_rows)
        assert set(getattr(leaks, kind).train) <= set(leaks.train_rows)
    assert bool(leaks) == any(len(getattr(leaks, kind)) for kind in KINDS)
    if len(leaks.val_rows) < len(val):
        assert not find_leaks(data, judged.without(leaks.val_rows))
    if len(leaks.train_rows) < len(train):
        assert not find_leaks(data.without(leaks.train_rows), judged)


# --on_leak

TRAIN = [*OTHERS, ([6, 7], [3, END])]
LEAKING = [([5, 7], [3, END]), ([1, 2, 7], [4, END]), ([1, 2, 7, 4, END, 5, 7], [3, END])]


def acted(on_leak, train=TRAIN, val=LEAKING):
    warnings: list[str] = []
    flags = TrainConfig(model="m", train_files=["t"], output_dir="o", on_leak=on_leak)
    found = separate(dataset(train), dataset(val), flags, warnings.append)
    assert (found.leaks is None) == (on_leak == "ignore")
    return found.drop_train.tolist(), found.drop_val.tolist(), found.text, warnings


COUNTS = "2 of 3 validation rows leak from the training rows (1 by prompt, 2 by dialogue), e.g. row 1 from row 1"


def test_a_warning_says_how_many_rows_where_and_what_to_do():
    remedy = "drop the rows with --on_leak drop_val or drop_train, or silence this with --on_leak ignore"
    assert acted("warn") == ([], [], "", [f"{COUNTS}; {remedy}"])


def test_an_error_says_the_same():
    told = message(acted, "error")
    assert told == f"{COUNTS}; choose other --val_files, or drop the rows with --on_leak drop_val or drop_train"


def test_dropping_names_the_rows_of_one_side():
    assert acted("drop_val") == ([], [1, 2], f"--on_leak drop_val drops 2 of 3 validation rows: {COUNTS}", [])
    assert acted("drop_train") == ([1], [], f"--on_leak drop_train drops 1 of 3 training rows: {COUNTS}", [])


def test_no_warning_without_leaks_or_with_ignore():
    assert acted("ignore") == ([], [], "", [])
    for on_leak in ("warn", "error", "drop_val", "drop_train"):
        assert acted(on_leak, val=LEAKING[:1]) == ([], [], "", [])


def test_a_side_of_which_nothing_would_be_left():
    told = message(acted, "drop_val", val=LEAKING[1:])
    assert told.startswith("--on_leak drop_val would leave no validation row: 2 of 2 ")
    told = message(acted, "drop_train", train=OTHERS[1:])
    assert told.startswith("--on_leak drop_train would leave no training row: 2 of 3 ")
    assert told.endswith("; choose other --val_files")


# Rows from files


@pytest.fixture
def load(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))

    def load(name, rows, **options):
        file = write_parquet(tmp_path / f"{name}.parquet", rows) if isinstance(rows, list) else rows
        return load_dataset([str(file)], "train_files", tokenizer, RowFlags(**options))

    return load


def turns(topic: str, count: int, answer: str = "hm") -> list[dict]:
    """The rows of a dialogue."""
    messages, rows = [], []
    for turn in range(count):
        messages.append({"role": "user", "content": f"{topic} {turn} " + "and so on " * 9})
        rows.append({"prompt": list(messages), "response": f"{answer} {turn}"})
        messages.append({"role": "assistant", "content": f"{answer} {turn}"})
    return rows


def test_both_places_are_named_by_file_and_row_though_rows_were_dropped(load, tmp_path):
    long = turns("word " * 99, 1)
    train = load("train", long + turns("a", 2) + long + turns("b", 1), max_length=110, truncation="drop")
    val = load("val", long + turns("b", 1), max_length=110, truncation="drop")
    assert len(train) == 3
    told = find_leaks(train, val).summary(train, val)
    assert told == (
        "1 of 1 validation rows leak from the training rows (1 by row, 1 by prompt, 1 by dialogue), "
        f"e.g. {tmp_path}/val.parquet, row 1 from {tmp_path}/train.parquet, row 4"
    )


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_dialogue_is_known_by_what_truncation_cut_off(load, truncation):
    """Cut on the left, a later turn's tokens begin elsewhere than those of an earlier one, or with another answer."""
    options = {"max_length": 80, "truncation": truncation}
    train = load("train", [*turns("a", 3), *turns("b", 3)], **options)
    val = load("val", [*turns("c", 3), *turns("b", 4)[-1:], *turns("a", 3, "well well")[-1:]], **options)
    leaks = find_leaks(train, val)
    if truncation == "left":
        assert val.counts.rows_cut == 4
        assert leaks.dialogues.val.tolist() == [3, 4]
        assert leaks.dialogues.train.tolist() == [3, 0]
        assert not leaks.rows
    else:  # all but the first turn of a dialogue is dropped
        assert not leaks
    again = load("again", [row | {"response": "and another one"} for row in turns("b", 3)], **options)
    assert len(find_leaks(train, again).prompts) == len(again)


def test_a_difficulty_is_no_level(load):
    """Sets of exercises have a level there that says how hard they are."""
    rows = [{"prompt": f"{i} + {i}", "response": "?", "extra_info": {"level": "Level 5", "n": i}} for i in range(4)]
    assert not find_leaks(load("train", rows[:2]), load("val", rows[2:]))
    for wrong in ({"level": 5}, {"n": 1}, 7, None):
        mixed = [{"prompt": row["prompt"], "response": "?", "extra_info": wrong} for row in rows]
        assert load("mixed", mixed).level.tolist() == [0] * 4


def test_a_damaged_column_of_levels_is_told(load, tmp_path):
    rows = [{"prompt": f"{i}", "response": "?", "extra_info": {"level": f"{i:016x}"}} for i in range(4)]
    file = write_parquet(tmp_path / "damaged.parquet", rows)
    column = pq.ParquetFile(file).metadata.row_group(0).column(2)
    content = bytearray(file.read_bytes())
    start = column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    assert message(load, "damaged", file).startswith(f"{file} is damaged after row 0: ")


def test_levels_of_games_are_known_under_other_seeds_and_in_another_style(tokenizer, tmp_path, monkeypatch):
    """Independently: the first boards that stand in the prompts' text."""
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    usual = {"env": "frozenlake", "size": 3, "num_processes": 1, "test_size": 0, "history_turns": 0}
    made = {"train": {"seed": 0, "style": "plain"}, "val": {"seed": 5000, "style": "messages"}}
    tables, data = {}, {}
    for name, changed in made.items():
        generate(GenerateConfig(output_dir=str(tmp_path / name), train_size=12, **usual | changed))
        file = tmp_path / name / "train.parquet"
        tables[name] = pd.read_parquet(file)
        data[name] = load_dataset([str(file)], "train_files", tokenizer, RowFlags())
    seeds = {name: {info["seed"] for info in table.extra_info} for name, table in tables.items()}
    assert seeds["train"].isdisjoint(seeds["val"])

    def boards(table, text) -> list[str]:
        first = {info["index"]: text(prompt) for info, prompt in zip(table.extra_info, table.prompt, strict=True)
                 if info["turn"] == 0}  # fmt: skip
        return [first[info["index"]] for info in table.extra_info]

    train_boards = boards(tables["train"], lambda prompt: prompt.rpartition("\n\n")[2])
    val_boards = boards(tables["val"], lambda prompt: prompt[-1]["content"])
    expected = [row for row, board in enumerate(val_boards) if board in set(train_boards)]
    leaks = find_leaks(data["train"], data["val"])
    assert 0 < len(expected) < len(val_boards)
    assert leaks.levels.val.tolist() == leaks.val_rows.tolist() == expected
    assert leaks.levels.distinct == len(set(train_boards) & set(val_boards))
    assert all(val_boards[v] == train_boards[t] for v, t in pairs(leaks.levels))
    assert [len(leaks.rows), len(leaks.prompts), len(leaks.dialogues)] == [0, 0, 0]


def test_the_sample_does_not_leak(load):
    assert not find_leaks(load("train", SAMPLE_TRAIN), load("val", SAMPLE_VAL))


# The real set


def counted(train: pd.DataFrame, val: pd.DataFrame) -> dict[str, int]:
    """Validation rows that leak, by the columns' text. A dialogue is known by its instruction and first question."""

    def as_text(table: pd.DataFrame) -> pd.DataFrame:
        prompts = [[(m["role"], m["content"]) for m in prompt] for prompt in table.prompt]
        opening = [json.dumps(prompt[:2]) for prompt in prompts]
        return pd.DataFrame({"prompt": map(json.dumps, prompts), "response": table.response, "opening": opening})

    t, v = as_text(train), as_text(val)
    return {
        "rows": len(v.merge(t.drop_duplicates(["prompt", "response"]), on=["prompt", "response"])),
        "prompts": int(v.prompt.isin(t.prompt).sum()),
        "dialogues": int(v.opening.isin(t.opening).sum()),
        "distinct dialogues": len(set(v.opening) & set(t.opening)),
        "levels": 0,
    }


@pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is not here")
@pytest.mark.parametrize("case", ["training half", "every fifth row", "half of the turns", "other dialogues"])
def test_on_the_medical_set_the_counts_are_those_of_its_text(case, tmp_path, tokenizer, monkeypatch):
    """The training half holds the whole validation file among ten times as many rows. Here: among changed copies."""
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    table = pd.read_parquet(MEDICAL)[["prompt", "response"]]
    other = table.copy()
    other["prompt"] = [[dict(prompt[0]), *({**m, "content": "Indeed. " + m["content"]} for m in prompt[1:])]
                       for prompt in table.prompt]  # fmt: skip
    number = np.arange(len(table))
    if case == "training half":
        train, val = pd.concat([other, table]).sample(frac=1, random_state=0), table
    elif case == "every fifth row":
        train, val = table[number % 5 > 0], table[number % 5 == 0]
    elif case == "half of the turns":
        turn = table.prompt.map(len)
        train, val = pd.concat([table[turn > 6], other]), table[turn <= 6]
    else:
        openings = [prompt[1]["content"] for prompt in table.prompt]
        is_val = np.isin(openings, sorted(set(openings))[:20])
        train, val = table[~is_val], pd.concat([table[is_val], other])
    data = []
    for name, rows in (("train", train), ("val", val)):
        rows.to_parquet(tmp_path / f"{name}.parquet")
        data.append(load_dataset([str(tmp_path / f"{name}.parquet")], "train_files", tokenizer, RowFlags()))
    leaks, expected = find_leaks(*data), counted(train, val)
    got = {kind: len(getattr(leaks, kind)) for kind in KINDS} | {"distinct dialogues": leaks.dialogues.distinct}
    assert got == expected
    assert len(leaks.val_rows) == expected["dialogues"]
    if case == "training half":
        assert got == {"rows": 549, "prompts": 549, "dialogues": 549, "distinct dialogues": 100, "levels": 0}
    assert bool(leaks) == (case != "other dialogues")


TRAINING_HALF = MEDICAL.with_name("MTMedDialog_sft_train.parquet")


@pytest.mark.skipif(not (MEDICAL.exists() and TRAINING_HALF.exists()), reason="the medical training half is not here")
def test_all_validation_rows_of_the_medical_set_stand_in_its_training_half(tokenizer):
    train, val = (load_dataset([str(f)], "train_files", tokenizer, RowFlags()) for f in (TRAINING_HALF, MEDICAL))
    leaks = find_leaks(train, val)
    assert len(leaks.rows) == len(leaks.val_rows) == len(val) == 549


def test_the_search_loads_no_torch():
    code = "import dsft.dataset.leaks, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
