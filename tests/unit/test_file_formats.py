"""Every format gives the same tokens for the same rows, and faults name file and line or row."""

import copy
import csv
import gzip
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsft.config.flags import RowFlags
from dsft.dataset.readers import Cell, find_files, first_row
from dsft.dataset.row_format import resolve_format
from dsft.dataset.tokens import TokenDataset, load_dataset
from tests.helpers import ROOT, SAMPLE_TRAIN, message, trl_templates
from tests.hub import Hub

KINDS = ["parquet", "arrow", "arrows", "jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "csv", "csv.gz", "tsv"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return pq.read_table(SAMPLE_TRAIN, columns=["prompt", "response"]).to_pylist()[:9]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the name's end says; "arrows" is Arrow's stream."""
    kind = file.name.partition(".")[2]
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "arrow":
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif kind == "arrows":
        file = file.with_suffix(".arrow")
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif kind.startswith("json"):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
        text = lines if kind.startswith("jsonl") else json.dumps(rows, indent=1)
        _write_text(file, text)
    else:
        texts = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        with open(file.with_suffix("") if file.suffix == ".gz" else file, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t" if kind.startswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(texts)
        if file.suffix == ".gz":
            file.write_bytes(gzip.compress(file.with_suffix("").read_bytes()))
            file.with_suffix("").unlink()
    return file


def _write_text(file: Path, text: str) -> None:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    with pa.output_stream(str(file), compression=codec) as stream:
        stream.write(text.encode())


def load(file: Path | str, tokenizer, **options) -> TokenDataset:
    return load_dataset([str(file)], "train_files", tokenizer, RowFlags(**options))


def as_lists(data: TokenDataset) -> list:
    return [(tokens.tolist(), is_target.tolist()) for tokens, is_target in map(data.__getitem__, range(len(data)))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_tokens(kind, rows, tokenizer, tmp_path):
    expected = as_lists(load(write(tmp_path / "expected.parquet", rows), tokenizer))
    conversations = [{"messages": [*row["prompt"], {"role": "assistant", "content": row["response"]}]} for row in rows]
    if "sv" not in kind:  # prompts of messages, which CSV has no type for
        assert as_lists(load(write(tmp_path / f"rows.{kind}", rows), tokenizer)) == expected
    found = load(write(tmp_path / f"chat.{kind}", conversations), tokenizer, learn="last")
    assert as_lists(found) == expected
    assert found.counts.format == "conversations in column messages"


def test_text_with_quotes_and_line_breaks_survives_csv(tokenizer, tmp_path):
    rows = [{"prompt": 'a "quoted", text\nand a line', "response": "1"}, {"prompt": "007", "response": ""}]
    expected = as_lists(load(write(tmp_path / "a.parquet", rows), tokenizer))
    assert as_lists(load(write(tmp_path / "a.csv", rows), tokenizer)) == expected
    weighted = [row | {"w": "0.5"} for row in rows]
    assert load(write(tmp_path / "b.csv", weighted), tokenizer, weight_key="w").weight.tolist() == [0.5, 0.5]


def test_arguments_of_other_calls_are_not_null_in_parquet(tokenizer, tmp_path):
    """In a struct column every tool call has the fields of all others."""
    template = (trl_templates() / "qwen2_5.jinja").read_text(encoding="utf-8")
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Go on."},
                {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            ]
        }
        for name, arguments in (("weather", {"city": "Rome"}), ("clock", {"zone": {"hours": 1}}))
    ]
    expected = as_lists(load(write(tmp_path / "rows.jsonl", rows), own))
    assert as_lists(load(write(tmp_path / "rows.parquet", rows), own)) == expected
    assert "null" not in own.decode(expected[0][0])


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rom"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {"city": "Rom"}}]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]


@pytest.mark.parametrize("key", ["conversations", "chats"])
def test_sharegpt_is_recognized(key, tokenizer, tmp_path):
    expected = as_lists(load(write(tmp_path / "a.jsonl", [{"messages": MESSAGES}]), tokenizer))
    options = {} if key == "conversations" else {"messages_key": key}
    found = load(write(tmp_path / "b.jsonl", [{key: SHAREGPT["conversations"]}]), tokenizer, **options)
    assert as_lists(found) == expected
    assert found.counts.format == f"ShareGPT conversations in column {key}"


@pytest.mark.parametrize("given", ["text", "", None])
def test_alpaca_is_recognized(given, tokenizer, tmp_path):
    rows = [{"instruction": "Translate", "input": given, "output": "Text"}]
    if given is None:
        del rows[0]["input"]
    prompt = "Translate\ntext" if given else "Translate"
    expected = as_lists(load(write(tmp_path / "a.jsonl", [{"prompt": prompt, "response": "Text"}]), tokenizer))
    found = load(write(tmp_path / "b.jsonl", rows), tokenizer)
    assert as_lists(found) == expected
    assert found.counts.format.startswith("Alpaca rows")


def test_a_format_that_is_given_is_not_guessed(tmp_path):
    row = {"prompt": "p", "response": "r", "instruction": "i", "output": "o", "messages": MESSAGES}
    file = write(tmp_path / "a.jsonl", [row])
    found = {name: resolve_format([file], RowFlags(format=name)) for name in ("auto", "messages", "alpaca")}
    assert {name: flags.columns()[0] for name, flags in found.items()} == {
        "auto": ["prompt", "response"], "messages": ["messages"], "alpaca": ["instruction", "input", "output"],
    }  # fmt: skip
    named = resolve_format([file], RowFlags(messages_key="messages"))
    assert (named.format, named.columns()[0]) == ("messages", ["messages"])


@pytest.mark.parametrize(
    ("row", "options", "text"),
    [
        ({"prompt": "p", "response": "r"}, {"learn": "last"}, "messages_key and learn are for conversations"),
        ({"messages": MESSAGES}, {"with_thinking": True}, "with_thinking needs prompt and response columns"),
    ],
)
def test_flags_that_do_not_go_with_the_recognized_format(row, options, text, tokenizer, tmp_path):
    assert message(load, write(tmp_path / "a.jsonl", [row]), tokenizer, **options).startswith(text)


def test_a_damaged_line_is_named(tokenizer, tmp_path):
    good = json.dumps({"prompt": "p", "response": "r"})
    for lines, text in (
        ([good, "{"], "is not a valid jsonl file: line 2: Expecting property name"),
        ([good, "3"], "is not a valid jsonl file: line 2: expected an object with the columns of a row, got int"),
        ([good, "", good], "is not a valid jsonl file: line 2: Expecting value"),
        ([good] * 2000 + ["{"], "is damaged after row 1024: line 2001: Expecting property name"),
    ):
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        assert message(load, file, tokenizer).startswith(f"{file} {text}")
    file.write_text(f"{good}\n" + json.dumps({"prompt": "p", "response": 3}), encoding="utf-8")
    assert message(load, file, tokenizer).startswith(f"{file}, line 2: the response must be a string")
    assert str(Cell("a.jsonl.gz", 6)) == "a.jsonl.gz, line 7"


@pytest.mark.parametrize("name", ["rows.csv", "rows.arrow", "rows.json", "rows.jsonl.gz"])
def test_files_of_another_format_than_their_name_says(name, tokenizer, tmp_path):
    file = tmp_path / name
    file.write_bytes(b'a,b\n"1,2,3\n1,2,3\n' if name == "rows.csv" else b"\x00\x01")
    told = message(load, file, tokenizer)
    assert told.startswith(f"{file} is ")
    assert told.endswith("; correct it, or download it again")


def test_a_folder_is_read_in_its_first_format(rows, tmp_path):
    for name in ("a.json", "b.jsonl", "d.arrow", "c.arrow"):
        write(tmp_path / name, rows[:1])
    assert find_files([str(tmp_path)], "train_files") == [tmp_path / "c.arrow", tmp_path / "d.arrow"]
    below = tmp_path / "outer"
    (below / "data").mkdir(parents=True)
    write(below / "data" / "x.jsonl.gz", rows[:1])
    assert find_files([str(below)], "train_files") == [below / "data" / "x.jsonl.gz"]
    assert set(first_row([below / "data" / "x.jsonl.gz"])) == {"prompt", "response"}


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    hub.close()


def test_a_dataset_of_the_hub(hub, rows, tokenizer, tmp_path):
    file = write(tmp_path / "rows.jsonl", rows)
    hub.datasets["me/chat"] = {
        "README.md": b"# Chat", "data/train.jsonl": file.read_bytes(), "other/x.jsonl": b"{}\n",
    }  # fmt: skip
    expected = as_lists(load(file, tokenizer))
    for name in ("me/chat/data", "me/chat/data/train.jsonl", "me/chat/data@main"):
        assert as_lists(load(f"hf://datasets/{name}", tokenizer)) == expected


def test_a_dataset_with_several_splits(hub, rows, tokenizer, tmp_path):
    lines = write(tmp_path / "rows.jsonl", rows).read_bytes()
    hub.datasets["me/chat"] = {"data/train-0.jsonl": lines, "data/train-1.jsonl": lines, "data/test-0.jsonl": lines}
    told = message(load, "hf://datasets/me/chat", tokenizer)
    assert told.startswith("--train_files hf://datasets/me/chat has files of several splits (test, train); add a glob")
    assert len(load("hf://datasets/me/chat/data/train-*", tokenizer)) == 2 * len(rows)


def test_a_dataset_that_the_hub_does_not_have(hub, tokenizer):
    hub.datasets["me/chat"] = {"data/train.jsonl": b"{}\n"}
    told = message(load, "hf://datasets/me/none", tokenizer)
    assert told.startswith("--train_files hf://datasets/me/none cannot be downloaded: ")
    assert told.endswith("; check the name, the network, and HF_TOKEN")
    told = message(load, "hf://datasets/me/chat/none", tokenizer)
    assert told.startswith("--train_files hf://datasets/me/chat/none: me/chat has no none;")
    assert "expected hf://datasets/OWNER/NAME" in message(load, "hf://me/chat", tokenizer)


# The guide


def json_blocks(page: str) -> list[dict[str, Any]]:
    """The objects of the indented blocks of a page that are JSON."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"(?<=\n\n)(?:    .*\n)+", text):
        rest = textwrap.dedent(block).strip()
        while rest.startswith("{"):
            value, end = json.JSONDecoder().raw_decode(rest)
            found.append(value)
            rest = rest[end:].strip()
    return found


def test_the_examples_of_the_guide(tokenizer, tmp_path):
    blocks = json_blocks("data.md")
    assert len(blocks) == 6
    *simple, agent = blocks
    rows = []
    for number, block in enumerate(simple):
        [row] = as_lists(load(write(tmp_path / f"{number}.jsonl", [block]), tokenizer))
        rows.append(row)
    learned = [[token for token, target in zip(*row, strict=True) if target] for row in rows]
    assert [tokenizer.decode(tokens) for tokens in learned] == ["42<|im_end|>"] * 5
    assert rows[0] == rows[1] == rows[2] == rows[3]
    own = copy.deepcopy(tokenizer)
    own.chat_template = (trl_templates() / "qwen3.jinja").read_text(encoding="utf-8")
    for block in (agent, *json_blocks("agents.md")):
        data = load(write(tmp_path / "agent.jsonl", [block]), own, tools_key="tools")
        assert len(data) == 1  # thinking within one question stays
        assert set(data.counts.ignored) <= {"name", "tool_call_id"}


def test_the_sample_of_agents(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (trl_templates() / "qwen3.jinja").read_text(encoding="utf-8")
    data = load(ROOT / "data" / "sample_agents.jsonl", own, tools_key="tools")
    assert data.counts.conversations == 16
    text = data.counts.conversations_text()
    assert text.split(", because")[0] in " ".join((ROOT / "docs" / "agents.md").read_text(encoding="utf-8").split())
