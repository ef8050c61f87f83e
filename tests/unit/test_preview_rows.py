"""Rows as they are shown: which ones, and that what is marked is exactly the response and its end."""

import html
import io
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dsft.config.flags import RowFlags
from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.readers import Cell
from dsft.dataset.tokens import load_dataset
from dsft.previewing.preview import Preview
from dsft.previewing.render import as_page, coloured, show
from dsft.previewing.rows import RowView, Span, choose_rows, make_spans, plain_text, view_row
from dsft.text import visible_text
from tests.helpers import MEDICAL, SAMPLE_TRAIN, SAMPLE_VAL, message, write_parquet

CELL = Cell("f.parquet", 7)
END = "<|im_end|>"
PROPERTY = settings(deadline=None, database=None)
MEDICAL_SET = pytest.param(MEDICAL, marks=pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is absent"))


@pytest.fixture(autouse=True)
def own_cache(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))


def learned(view: RowView) -> str:
    return "".join(span.text for span in view.spans if span.is_target)


def page_of(view: RowView) -> str:
    return as_page(Preview("p", rows=[view])).split("<pre>\n")[1].split("</pre>")[0]


def terminal_of(view: RowView) -> list[tuple[str, bool]]:
    """The runs of text that a terminal gets, and whether each is in the colours of targets."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", soft_wrap=True, highlight=False)
    console.print(coloured(view), end="")
    runs, style = [], ""
    for part in re.split(r"(\x1b\[[0-9;]*m)", stream.getvalue()):
        if part.startswith("\x1b"):
            style = part
        elif part:  # a line's end has no colour of its own
            runs.append((part, runs[-1][1] if part == "\n" else "32" in style))
    return runs


@pytest.mark.parametrize("file", [SAMPLE_TRAIN, SAMPLE_VAL, MEDICAL_SET])
def test_what_is_marked_is_exactly_the_response_and_its_end_in_every_row(tokenizer, file):
    """In the spans, between the marks of plain text, in the colour of a terminal, and in the page of HTML."""
    data = load_dataset([str(file)], "train_files", tokenizer, RowFlags())
    rows = pq.read_table(file, columns=["prompt", "response"]).to_pylist()
    assert len(data) == len(rows) > 0
    for number, row in enumerate(rows):
        view = view_row(number, Cell(str(file), number), data[number], tokenizer, RowFlags())
        expected = row["response"] + END
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert learned(view) == expected, number
        assert "".join(span.text for span in view.spans) == prompt + expected
        assert plain_text(view) == f"{prompt}⟦{expected}⟧"
        [marked] = re.findall("<mark>(.*?)</mark>", page_of(view), re.DOTALL)
        assert html.unescape(marked.replace("<b>", "").replace("</b>", "")) == expected
        assert (view.tokens, view.targets) == (len(data[number][0]), int(data.targets[number]))
        assert view.cut == ""


@pytest.mark.parametrize("file", [SAMPLE_VAL, MEDICAL_SET])
def test_the_colour_of_targets_is_on_exactly_the_response_and_its_end(tokenizer, file):
    data = load_dataset([str(file)], "train_files", tokenizer, RowFlags())
    rows = pq.read_table(file, columns=["prompt", "response"]).to_pylist()
    for number, row in enumerate(rows):
        if number % 5:
            continue
        view = view_row(number, CELL, data[number], tokenizer, RowFlags())
        runs = terminal_of(view)
        assert "".join(text for text, is_target in runs if is_target) == f"⟦{row['response']}{END}⟧"
        assert "".join(text for text, _ in runs) == plain_text(view)


def test_every_assistant_turn_of_a_conversation_is_marked(tokenizer):
    chat_format = ChatFormat(tokenizer)
    turns = [("user", "Hello"), ("assistant", "Hi!"), ("user", "And now?"), ("assistant", "Bye")]
    rendered = chat_format.conversation([{"role": r, "content": c} for r, c in turns], CELL)
    [[row]] = chat_format.tokenize([rendered])
    text = plain_text(view_row(0, CELL, row[:2], tokenizer, RowFlags()))
    assert re.findall("⟦(.*?)⟧", text) == [f"Hi!{END}", f"Bye{END}"]


@pytest.mark.parametrize("text", ["naïve 我头疼 👩‍⚕️ \u0301", " leading", "a\n\nb\t", "<|im_end|> inside", ""])
def test_characters_of_several_tokens_stay_whole(tokenizer, text):
    chat_format = ChatFormat(tokenizer)
    [[row]] = chat_format.tokenize([chat_format.prompt_and_response("Hello 你好", text, CELL)])
    assert learned(view_row(0, CELL, row[:2], tokenizer, RowFlags())) == text + END


def test_special_tokens_are_spans_of_their_own(tokenizer):
    ids = tokenizer("<|im_start|>user\nHi<|im_end|>", add_special_tokens=False)["input_ids"]
    spans = make_spans(np.array(ids, np.int32), np.zeros(len(ids), bool), tokenizer)
    assert [(s.text, s.is_special) for s in spans] == [("<|im_start|>", True), ("user\nHi", False), (END, True)]


# What truncation does


@pytest.fixture(scope="module")
def row(tokenizer):
    """Ten tokens of prompt, five of response."""
    words = tokenizer(" the" * 10 + " cat" * 5, add_special_tokens=False)["input_ids"]
    assert len(words) == 15
    return np.array(words, np.int32), np.arange(15) >= 10


@pytest.mark.parametrize(
    ("how", "length", "text", "cut"),
    [
        ("error", 15, " the" * 10 + "⟦" + " cat" * 5 + "⟧", ""),
        (
            "left",
            12,
            " the" * 7 + "⟦" + " cat" * 5 + "⟧",
            "3 tokens at the start of the prompt are cut: ' the the the'",
        ),
        ("right", 12, " the" * 10 + "⟦ cat cat⟧", "3 tokens at the end, including 3 targets, are cut: ' cat cat cat'"),
        ("right", 10, " the" * 10 + "⟦" + " cat" * 5 + "⟧", "dropped: 15 tokens leave no target within max_length"),
        ("drop", 12, " the" * 10 + "⟦" + " cat" * 5 + "⟧", "dropped: 15 tokens exceed max_length 12"),
        ("error", 12, " the" * 10 + "⟦" + " cat" * 5 + "⟧", "refused: 15 tokens exceed max_length 12"),
    ],
)
def test_what_is_truncated_is_said(tokenizer, row, how, length, text, cut):
    view = view_row(0, CELL, row, tokenizer, RowFlags(max_length=length, truncation=how))
    assert plain_text(view) == text
    assert view.cut == cut


@pytest.mark.parametrize("how", ["left", "right", "drop"])
def test_a_row_is_shown_as_it_is_trained_on(tokenizer, tmp_path, how):
    file = write_parquet(tmp_path / "f.parquet", pq.read_table(SAMPLE_TRAIN).to_pylist())
    cut = RowFlags(max_length=180, truncation=how)
    trained = load_dataset([str(file)], "train_files", tokenizer, cut)
    whole = load_dataset([str(file)], "train_files", tokenizer, RowFlags())
    views = [view_row(i, CELL, whole[i], tokenizer, cut) for i in range(len(whole))]
    kept = [view for view in views if not view.cut.startswith("dropped")]
    assert len(kept) == len(trained) < len(whole) or (how == "left" and len(kept) == len(trained))
    for view, (tokens, is_target) in zip(kept, (trained[i] for i in range(len(trained))), strict=True):
        assert view.spans == make_spans(tokens, is_target, tokenizer)


# Which rows


@pytest.mark.parametrize(
    ("lengths", "count", "rows"),
    [
        ([5] * 100, 0, []),
        ([5] * 100, 1, [0]),
        ([5] * 70 + [9] + [5] * 29, 2, [0, 70]),
        ([5] * 70 + [9] + [5] * 29, 3, [0, 70, 50]),
        ([5] * 70 + [9] + [5] * 29, 5, [0, 70, 25, 50, 75]),
        ([9, 5, 5], 3, [0, 1, 2]),
        ([9, 5], 5, [0, 1]),
        ([4], 3, [0]),
    ],
)
def test_the_first_the_longest_and_evenly_spread_ones(lengths, count, rows):
    assert sorted(choose_rows(np.array(lengths), count)) == sorted(rows)


@PROPERTY
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 45))
def test_as_many_different_rows_as_asked_for(lengths, count):
    rows = choose_rows(np.array(lengths), count)
    assert len(rows) == len(set(rows)) == min(count, len(lengths))
    assert all(0 <= row < len(lengths) for row in rows)
    assert count < 1 or 0 in rows
    assert count < 2 or max(lengths[row] for row in rows) == max(lengths)


def test_rows_by_their_numbers():
    lengths = np.array([1, 2, 3])
    assert choose_rows(lengths, 3, [2, 0, 2]) == [2, 0]
    assert (
        message(choose_rows, lengths, 3, [1, 3])
        == "--row_numbers 3: there are 3 training rows; use numbers from 0 to 2"
    )


# Safe to show


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\u001b[2Jb"),
        ("a\r\nb\tc", "a\\u000d\nb\tc"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800\ufeff\uffff\u2028", "\\ud800\\ufeff\\uffff\\u2028"),
        ("我 é 👩‍⚕️\u00a0x", "我 é 👩‍⚕️\u00a0x"),
    ],
)
def test_nothing_moves_the_cursor(text, shown):
    assert visible_text(text) == shown


def test_a_page_escapes_everything_and_asks_for_nothing(tokenizer):
    evil = "</pre><script>alert(1)</script><img src=x onerror=y>&amp;"
    spans = [Span(evil, False, False), Span(evil, True, True)]
    page = as_page(Preview(evil, rows=[RowView(0, evil, spans, 3, 2, evil)]))
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(r"(src|href|url)\s*[=(]", page.replace(html.escape(evil), ""))
    assert page.count(html.escape(evil)) == 6  # the title twice, the head's place and cut, the two spans


def test_a_pipe_gets_no_colours_and_no_wrapped_lines():
    stream = io.StringIO()
    spans = [Span("word " * 100, False, False), Span("[bold]answer[/bold] :smile:", True, False)]
    show(Preview("p", rows=[RowView(0, "f.parquet, row 0", spans, 3, 2)]), stream)
    assert stream.getvalue() == (
        "row 0 (f.parquet, row 0): 3 tokens, 2 targets, from ⟦ to ⟧\n"
        + "word " * 100
        + "⟦[bold]answer[/bold] :smile:⟧\n\n\n"
    )
