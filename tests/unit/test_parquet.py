"""Parquet files to rows, and what is said about files that are not as they should be."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsft.config.flags import RowFlags
from dsft.dataset.file_formats import ROWS_AT_ONCE
from dsft.dataset.readers import Cell, find_files, read_columns, walk
from dsft.dataset.tokens import load_dataset
from dsft.errors import UserError
from tests.helpers import write_parquet

KEYS, FLAGS = ["prompt", "response"], ["prompt_key", "response_key"]


def rows_of(*names: str) -> list[dict]:
    return [{"prompt": f"p{name}", "response": f"r{name}"} for name in names]


@pytest.fixture
def folder(tmp_path):
    """Two parquet files and one file of another kind."""
    write_parquet(tmp_path / "b.parquet", rows_of("b0", "b1"))
    write_parquet(tmp_path / "a.parquet", rows_of("a0", "a1", "a2"))
    (tmp_path / "notes.txt").write_text("no parquet")
    return tmp_path


def prompts(files, max_rows=None) -> list[str]:
    return [cells[0] for rows in read_columns(files, KEYS, FLAGS, max_rows) for _, cells in rows]


def message(work, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        list(work(*arguments, **options))  # a generator says nothing until it is read
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_stands_for_itself(folder):
    assert find_files([f"{folder}/a.parquet"], "train_files") == [folder / "a.parquet"]


def test_a_list_keeps_its_order(folder):
    names = [f"{folder}/b.parquet", f"{folder}/a.parquet"]
    assert find_files(names, "train_files") == [folder / "b.parquet", folder / "a.parquet"]
    assert prompts(find_files(names, "train_files")) == ["pb0", "pb1", "pa0", "pa1", "pa2"]


@pytest.mark.parametrize("name", ["", "/*.parquet", "/?.parquet", "/[ab].parquet"])
def test_a_folder_and_a_glob_stand_for_their_parquet_files_sorted(folder, name):
    assert find_files([f"{folder}{name}"], "train_files") == [folder / "a.parquet", folder / "b.parquet"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
    file = write_parquet(tmp_path / "[1].parquet", rows_of("x"))
    assert find_files([str(file)], "train_files") == [file]


def test_a_name_starting_with_a_tilde_is_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert find_files(["~/a.parquet"], "train_files") == [folder / "a.parquet"]


def test_a_missing_file_is_named_with_its_flag_and_the_closest_name(folder):
    told = message(find_files, [f"{folder}/a.parqet"], "val_files")
    assert told.startswith(f"--val_files {folder}/a.parqet: no such file (did you mean '")
    assert "a.parquet'?)" in told


def test_a_missing_file_in_a_missing_folder_is_named():
    told = message(find_files, ["/no/such/x.parquet"], "train_files")
    assert told.startswith("--train_files /no/such/x.parquet: no such file")
    assert "did you mean" not in told


def test_a_folder_without_parquet_is_named(tmp_path):
    told = message(find_files, [str(tmp_path)], "train_files")
    assert told.startswith(f"--train_files {tmp_path}: the folder contains no *.parquet, *.arrow,")


def test_no_name_at_all_is_told():
    assert message(find_files, [], "train_files").startswith("--train_files is empty")


def test_rows_know_the_file_and_the_row_that_they_came_from(folder):
    files = find_files([str(folder)], "train_files")
    cells = [str(cell) for rows in read_columns(files, KEYS, FLAGS, None) for cell, _ in rows]
    assert cells == [f"{folder}/a.parquet, row {i}" for i in range(3)] + [
        f"{folder}/b.parquet, row {i}" for i in (0, 1)
    ]


def test_row_numbers_go_on_over_batches_of_rows(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", rows_of(*map(str, range(ROWS_AT_ONCE + 5))))
    batches = list(read_columns([file], KEYS, FLAGS, None))
    assert [len(rows) for rows in batches] == [ROWS_AT_ONCE, 5]
    assert next((cell.row, cells[0]) for cell, cells in batches[1]) == (ROWS_AT_ONCE, f"p{ROWS_AT_ONCE}")


@pytest.mark.parametrize(("max_rows", "expected"), [(1, ["pa0"]), (4, ["pa0", "pa1", "pa2", "pb0"]), (99, None)])
def test_max_rows_counts_over_all_files(folder, max_rows, expected):
    files = find_files([str(folder)], "train_files")
    assert prompts(files, max_rows) == (expected or ["pa0", "pa1", "pa2", "pb0", "pb1"])


def test_a_missing_column_lists_those_that_exist_and_its_flag(folder):
    told = message(read_columns, [folder / "a.parquet"], ["promt", "response"], FLAGS, None)
    assert told == (
        f"{folder}/a.parquet has no column 'promt' (--prompt_key) (did you mean 'prompt'?); "
        "its columns: prompt, response"
    )


def test_a_file_without_rows_is_refused_unless_another_has_some(folder, tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), empty)
    assert message(read_columns, [empty], KEYS, FLAGS, None).startswith(f"no rows in {empty}")
    assert prompts([empty, folder / "b.parquet"]) == ["pb0", "pb1"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"this is no parquet file at all"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    file = tmp_path / "x.parquet"
    file.write_bytes(content)
    assert message(read_columns, [file], KEYS, FLAGS, None).startswith(f"{file} is not a valid parquet file: ")


def test_a_file_cut_short_is_named(folder):
    file = folder / "a.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert message(read_columns, [file], KEYS, FLAGS, None).startswith(f"{file} is not a valid parquet file: ")


def with_damaged(path, column: str):
    """A parquet file whose schema reads well, and one column of which is overwritten."""
    names = ["prompt", "unused", "response"]
    pq.write_table(pa.table({name: [f"{name} {i}" for i in range(50)] for name in names}), path)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(names.index(column))
    start, size = chunk.dictionary_page_offset, chunk.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    return path


def test_a_damaged_column_is_one_line_with_the_file_and_the_place(tmp_path):
    file = with_damaged(tmp_path / "x.parquet", "prompt")
    assert message(read_columns, [file], KEYS, FLAGS, None).startswith(f"{file} is damaged after row 0: ")


def test_columns_that_are_not_used_are_not_read(tmp_path):
    file = with_damaged(tmp_path / "x.parquet", "unused")
    assert prompts([file]) == [f"prompt {i}" for i in range(50)]
    assert message(read_columns, [file], ["unused"], ["prompt_key"], None).startswith(
        f"{file} is damaged after row 0: "
    )


def test_one_column_may_serve_twice(folder):
    [rows] = read_columns([folder / "b.parquet"], ["prompt", "prompt"], FLAGS, None)
    assert [cells for _, cells in rows] == [("pb0", "pb0"), ("pb1", "pb1")]


@pytest.mark.parametrize(
    ("row", "message_end"),
    [
        ({"prompt": None, "response": "r"}, "the prompt must be a string or a list of messages, got null"),
        ({"prompt": "p", "response": None}, "the response must be a string or one {role, content} message, got null"),
    ],
    ids=["prompt", "response"],
)
def test_a_null_cell_names_file_and_row(tmp_path, tokenizer, monkeypatch, row, message_end):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    file = write_parquet(tmp_path / "x.parquet", [*rows_of("0", "1"), row])
    told = message(load_dataset, [str(file)], "train_files", tokenizer, RowFlags())
    assert told.startswith(f"{file}, row 2: {message_end}")


@pytest.mark.parametrize(
    ("rows", "message_end"),
    [
        ([{"prompt": 3, "response": "r"}], "the prompt must be a string or a list of messages, got int 3"),
        (
            [{"prompt": "p", "response": 2.5}],
            "the response must be a string or one {role, content} message, got float 2.5",
        ),
        (
            [{"prompt": [], "response": "r"}],
            "the prompt must be a string or a list of messages, got a list of 0",
        ),
        (
            [{"prompt": [{"role": "user", "text": "x"}], "response": "r"}],
            "message 0 of the prompt has no content and no tool_calls",
        ),
        (
            [{"prompt": "p", "response": [{"role": "assistant", "content": "a"}] * 2}],
            "the response must be a string or one {role, content} message, got a list of 2",
        ),
    ],
)
def test_a_cell_of_another_kind_names_file_and_row(tmp_path, tokenizer, monkeypatch, rows, message_end):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    file = write_parquet(tmp_path / "x.parquet", rows)
    told = message(load_dataset, [str(file)], "train_files", tokenizer, RowFlags())
    assert told.startswith(f"{file}, row 0: {message_end}")


CELL = Cell("f.parquet", 7)


def test_keys_lead_into_nested_values():
    value = {"turns": [{"text": "first"}, {"text": "last"}]}
    assert walk(value, None, CELL, "prompt") is value
    assert walk(value, ["turns", "0", "text"], CELL, "prompt") == "first"
    assert walk(value, ["turns", "-1", "text"], CELL, "prompt") == "last"


@pytest.mark.parametrize(
    ("value", "keys", "end"),
    [
        ({"a": 1, "b": 2}, ["c"], "has no key 'c' at this depth (keys: a, b)"),
        ({"a": [1]}, ["a", "1"], "has no key '1' at this depth (a list)"),
        ({"a": [1]}, ["a", "x"], "has no key 'x' at this depth (a list)"),
        ("text", ["a"], "has no key 'a' at this depth (a str)"),
    ],
)
def test_a_key_that_is_not_there_tells_what_is(value, keys, end):
    with pytest.raises(UserError) as caught:
        walk(value, keys, CELL, "prompt")
    assert str(caught.value).startswith(f"f.parquet, row 7: column 'prompt' {end}")
