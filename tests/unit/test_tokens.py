"""Tokenized rows: truncation with its counts, nested columns, and the cache."""

import copy
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config.flags import RowFlags
from dsft.dataset import tokens as module
from dsft.dataset.readers import Cell
from dsft.dataset.token_files import Counts
from dsft.dataset.tokens import load_dataset, tokenizer_fingerprint
from dsft.errors import UserError
from tests.helpers import write_parquet

PROPERTY = settings(deadline=None, database=None)
WORDS = "one two three four five six seven eight nine ten"


@pytest.fixture(autouse=True)
def own_cache(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def plain(tokenizer):
    """Without a template: a row's tokens are its words, a target each, and the end."""
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    return without


@pytest.fixture
def load(tmp_path, plain):
    def load(rows: list[dict] | None = None, tokenizer=plain, max_rows=None, **options):
        file = tmp_path / "rows.parquet"
        if rows is not None:
            write_parquet(file, rows)
        return load_dataset([str(file)], "train_files", tokenizer, RowFlags(**options), max_rows=max_rows)

    return load


def message(work, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def row(prompt_words: int, response_words: int) -> dict:
    """That many tokens of prompt and of response; the end-of-turn comes on top."""
    return {"prompt": " the" * prompt_words, "response": " cat" * response_words}


def shape(data) -> list[tuple[int, int]]:
    """Prompt tokens and targets of each row."""
    return [(int((~mask).sum()), int(mask.sum())) for _, mask in (data[i] for i in range(len(data)))]


def test_rows_within_max_length_stay_whole(load):
    data = load([row(3, 2), row(1, 1)], max_length=6)
    assert shape(data) == [(3, 3), (1, 2)]
    assert data.counts == Counts(rows=2, tokens=9, targets=5)
    assert data.counts.losses() == ""
    assert data.lengths.tolist() == [6, 3]


def test_error_stops_with_file_row_lengths_and_remedy(load, tmp_path):
    told = message(load, [row(1, 1), row(5, 2)], max_length=7)
    assert told.startswith(f"{tmp_path}/rows.parquet, row 1 has 8 tokens, max_length is 7; raise --max_length")
    assert "--truncation left, right or drop" in told


def test_left_cuts_the_front_of_the_prompt(load, plain):
    data = load([{"prompt": WORDS, "response": " eleven"}, row(1, 1)], max_length=5, truncation="left")
    whole = plain(WORDS)["input_ids"]
    answer = [*plain(" eleven")["input_ids"], plain.eos_token_id]
    assert data[0][0].tolist() == (whole + answer)[-5:]
    cut = len(whole) + len(answer) - 5
    assert (data.counts.rows_cut, data.counts.tokens_cut, data.counts.rows_dropped) == (1, cut, 0)
    assert data.counts.losses() == f"1 rows cut by {cut} tokens"


def test_left_keeps_one_token_before_the_first_target_or_drops_the_row(load):
    data = load([row(4, 3), row(4, 4), row(1, 1)], max_length=5, truncation="left")
    assert shape(data) == [(1, 4), (1, 2)]
    assert (data.counts.rows, data.counts.rows_cut, data.counts.tokens_cut) == (2, 1, 3)
    assert (data.counts.rows_dropped, data.counts.tokens_dropped) == (1, 9)


def test_right_cuts_the_end_and_drops_a_row_left_without_target(load):
    data = load([row(3, 4), row(5, 4), row(6, 1)], max_length=5, truncation="right")
    assert shape(data) == [(3, 2)]
    assert data.counts == Counts(
        rows=1, tokens=5, targets=2, rows_cut=1, tokens_cut=3, rows_dropped=2, tokens_dropped=10 + 8
    )


def test_drop_leaves_longer_rows_out(load):
    data = load([row(3, 4), row(2, 2), row(5, 4)], max_length=5, truncation="drop")
    assert shape(data) == [(2, 3)]
    assert (data.counts.rows, data.counts.rows_dropped, data.counts.tokens_dropped) == (1, 2, 18)
    assert data.counts.losses() == "2 rows dropped with 18 tokens"


def test_no_row_left_is_told_with_what_to_change(load, tmp_path):
    told = message(load, [row(9, 9)], max_length=5, truncation="drop")
    assert told.startswith(f"no row of {tmp_path}/rows.parquet is left: 1 rows dropped with 19 tokens; ")
    assert "max_length" in told
    assert "truncation" in told


def test_weights_that_are_all_0(load, tmp_path):
    told = message(load, [row(1, 1) | {"w": 0.0}] * 2, weight_key="w")
    assert told.startswith(f"no row of {tmp_path}/rows.parquet is left: 2 rows with nothing to learn; give some")
    data = load([row(1, 1) | {"w": 0.0}, row(2, 2) | {"w": 0.5}], weight_key="w")
    assert (len(data), data.weight.tolist(), data.counts.rows_without_weight) == (1, [0.5], 1)
    assert data.counts.losses() == "1 rows with nothing to learn"
    assert "row 1 has the weight None" in message(load, [row(1, 1) | {"w": w} for w in (1.0, None)], weight_key="w")


def test_a_system_prompt_from_a_file(load, tokenizer, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Be brief.\n", encoding="utf-8")
    rows = [{"prompt": "Hello", "response": "Hi"}]
    from_file = load(rows, tokenizer, system_prompt=str(file))
    given = load(rows, tokenizer, system_prompt="Be brief.")
    assert from_file[0][0].tolist() == given[0][0].tolist()
    assert from_file.fingerprint == given.fingerprint
    file.write_text("Be long.", encoding="utf-8")
    assert "Be long." in tokenizer.decode(load(rows, tokenizer, system_prompt=str(file))[0][0])
    file.write_bytes(b"\xff")
    told = message(load, rows, tokenizer, system_prompt=str(file))
    assert told.startswith(f"--system_prompt {file} cannot be read: 'utf-8' codec")


THINKING = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>{% endif %}"""


def thinking_rows(turns: int, number: int) -> dict:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn} of {number}"})
        messages.append({"role": "assistant", "content": f"<think>T{turn}</think>A{turn}"})
    return {"m": messages}


def test_the_rows_of_a_conversation_are_one_dialogue_and_are_not_split(load, tokenizer):
    """Here the generation prompt begins a thinking block, so no prompt is a prefix of the next row."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = THINKING
    data = load([thinking_rows(turns, number) for number, turns in enumerate((3, 1, 2))], own, messages_key="m")
    assert len(data) == 6
    assert data.rows["row_in_file"].tolist() == [0, 0, 0, 1, 2, 2]
    assert len(np.unique(data.dialogue)) == 3
    for row_in_file in range(3):
        assert len(np.unique(data.dialogue[data.rows["row_in_file"] == row_in_file])) == 1
    counts = data.counts
    assert (counts.conversations, counts.split_conversations, counts.split_rows) == (3, 2, 5)
    assert counts.conversations_text().startswith("2 of 3 conversations became 5 rows, because the chat template")
    last = load(None, own, messages_key="m", learn="last")
    assert (len(last), last.counts.split_conversations) == (3, 0)
    assert last.counts.conversations_text().startswith("each conversation is one sequence")


@PROPERTY
@given(
    prompt=st.integers(0, 30),
    targets=st.integers(1, 30),
    max_length=st.integers(1, 70),
    truncation=st.sampled_from(["left", "right", "drop"]),
)
def test_a_row_is_kept_whole_or_cut_to_max_length_with_a_target_or_counted_as_dropped(
    prompt, targets, max_length, truncation
):
    ids = np.arange(prompt + targets, dtype=np.int32)
    mask = ids >= prompt
    counts = Counts()
    kept = module.truncate_row(ids, mask, Cell("f", 0), RowFlags(max_length=max_length, truncation=truncation), counts)
    if len(ids) <= max_length:
        assert kept is not None
        assert (kept[0].tolist(), counts) == (ids.tolist(), Counts())
    elif kept is None:
        assert counts == Counts(rows_dropped=1, tokens_dropped=len(ids))
        assert truncation == "drop" or (
            targets >= max_length if truncation == "left" else prompt >= max_length or (prompt == 0 and max_length == 1)
        )
    else:
        assert truncation != "drop"
        assert counts == Counts(rows_cut=1, tokens_cut=len(ids) - max_length)
        expected = ids[-max_length:] if truncation == "left" else ids[:max_length]
        assert kept[0].tolist() == expected.tolist()
        assert kept[1].tolist() == (expected >= prompt).tolist()
        assert kept[1][1:].any()
        assert truncation == "right" or not kept[1][0]


def test_max_rows_takes_the_first_rows(load):
    assert shape(load([row(1, 1), row(2, 1), row(3, 1)], max_rows=2)) == [(1, 2), (2, 2)]


def test_keys_lead_to_prompt_and_response(load):
    rows = [{"prompt": {"turns": ["x", " the"]}, "response": {"best": {"content": " cat cat"}}}]
    assert shape(load(rows, prompt_dict_keys=("turns", "1"), response_dict_keys=("best",))) == [(1, 3)]


def test_a_key_that_is_not_there_names_file_row_and_column(load, tmp_path):
    rows = [{"prompt": {"a": "x"}, "response": "y"}]
    told = message(load, rows, prompt_dict_keys=("b",))
    assert told.startswith(f"{tmp_path}/rows.parquet, row 0: column 'prompt' has no key 'b' at this depth (keys: a)")


def test_other_columns_may_hold_prompt_and_response(load):
    rows = [{"question": " the the", "answer": " cat", "prompt": 3}]
    assert shape(load(rows, prompt_key="question", response_key="answer")) == [(2, 2)]


def test_messages_key_replaces_prompt_and_response(load, tokenizer):
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    data = load([{"chat": turns}], tokenizer=tokenizer, messages_key="chat")
    tokens, mask = data[0]
    assert tokenizer.decode(tokens[mask]) == "b<|im_end|>d<|im_end|>"
    nested = load([{"chat": {"turns": turns}}], tokenizer=tokenizer, messages_key="chat", prompt_dict_keys=("turns",))
    assert nested[0][0].tolist() == tokens.tolist()


def test_the_second_load_reads_the_cache(load, monkeypatch):
    first = load([row(3, 2), row(1, 1)])
    monkeypatch.setattr(module, "TokenWriter", lambda *_: pytest.fail("tokenized again"))
    second = load()
    assert second.fingerprint == first.fingerprint
    assert second.counts == first.counts
    for i in range(2):
        assert [part.tolist() for part in second[i]] == [part.tolist() for part in first[i]]


def test_the_same_content_under_another_name_reads_the_same_cache(load, tmp_path, plain, monkeypatch):
    first = load([row(3, 2)])
    (tmp_path / "rows.parquet").rename(tmp_path / "other.parquet")
    monkeypatch.setattr(module, "TokenWriter", lambda *_: pytest.fail("tokenized again"))
    second = load_dataset([str(tmp_path / "other.parquet")], "val_files", plain, RowFlags())
    assert second.fingerprint == first.fingerprint


def test_the_rows_are_mapped_read_only(load):
    tokens, mask = load([row(3, 2)])[0]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = True


def test_what_changes_the_tokens_changes_the_cache_key(load, tokenizer, plain):
    rows = [{"prompt": " the the the", "response": " cat", "other": " dog"}]
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = templated.chat_template.replace("You are a helpful AI assistant", "You are brief")
    bigger = copy.deepcopy(plain)
    bigger.add_tokens(["cat"])
    variants = [
        load(rows),
        load(max_length=100),
        load(truncation="left"),
        load(with_thinking=True),
        load(prompt_key="other"),
        load(response_key="other"),
        load(max_rows=1),
        load(tokenizer=tokenizer),
        load(tokenizer=templated),
        load(tokenizer=bigger),
        load([*rows, *rows]),
    ]
    assert len({data.fingerprint for data in variants}) == len(variants)


def test_files_and_their_order_change_the_cache_key(tmp_path, plain):
    names = [str(write_parquet(tmp_path / f"{i}.parquet", [row(i, 1)])) for i in (1, 2)]
    forward, backward = (load_dataset(order, "train_files", plain, RowFlags()) for order in (names, names[::-1]))
    assert (shape(forward), shape(backward)) == ([(1, 2), (2, 2)], [(2, 2), (1, 2)])
    assert forward.fingerprint != backward.fingerprint


def test_the_tokenizers_fingerprint_stays_where_nothing_changed(tokenizer):
    assert tokenizer_fingerprint(copy.deepcopy(tokenizer)) == tokenizer_fingerprint(tokenizer)


def test_a_load_that_fails_leaves_nothing_in_the_cache(load, tmp_path):
    message(load, [row(1, 1), {"prompt": "p", "response": None}])
    left = [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if not path.name.endswith(".lock")]
    assert left == []
    assert shape(load([row(1, 1)])) == [(1, 2)]


# Several processes


def many_rows(count: int) -> list[dict]:
    return [row(1 + n % 7, 1 + n % 3) | {"w": float(1 + n % 2)} for n in range(count)]


def contents(folder) -> dict[str, bytes]:
    [made] = [path for path in (folder / "tokens").iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in made.iterdir()}


def test_several_processes_write_the_same_bytes_as_one(load, tmp_path, monkeypatch):
    rows, found = many_rows(7000), []
    for processes in (1, 2, 3):
        monkeypatch.setenv("DSFT_CACHE", str(tmp_path / f"{processes} processes"))
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, n=processes: range(n))
        data = load(rows, max_length=8, truncation="left", weight_key="w")
        assert (data.counts.rows_cut > 0, len(data)) == (True, 7000)
        found.append(contents(tmp_path / f"{processes} processes"))
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {
        "tokens.bin", "is_target.bin", "rows.bin", "sorted_place.npy", "dialogue.npy", "counts.json",
    }  # fmt: skip


def test_a_fault_beyond_the_first_rows_is_told_as_in_one_process(load, tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(2))
    rows = many_rows(6000)
    rows[5500] = {"prompt": " the", "response": None, "w": 1.0}
    rows[5800] = {"prompt": None, "response": " cat", "w": 1.0}
    told = message(load, rows)
    assert told.startswith(f"{tmp_path}/rows.parquet, row 5500: the response must be a string")
    assert multiprocessing.active_children() == []
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()] == []


def test_a_killed_process_ends_the_preparation_with_one_line(load, tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(2))
    add = module.TokenWriter.add

    def kill_one(self, packed):
        add(self, packed)
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(module.TokenWriter, "add", kill_one)
    told = message(load, many_rows(60_000))
    assert told.startswith("a tokenizing process was killed, possibly for lack of memory; free some")
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()] == []


def test_a_row_costs_a_rank_at_most_100_bytes_beside_the_mapped_files(load):
    data = load(many_rows(3000))
    some = data.subset(np.flatnonzero(np.isin(data.dialogue, data.dialogue[:10])))
    held = sum(getattr(some, name).nbytes for name in ("rows", "sorted_place", "dialogue"))
    assert held <= 100 * len(some)
