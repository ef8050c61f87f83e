"""Tokens and masks of a row, against a reference that is written here."""

import copy

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsft.config.flags import RowFlags
from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.readers import Cell
from dsft.dataset.tokens import load_dataset
from dsft.errors import UserError
from tests.helpers import MEDICAL, SAMPLE_TRAIN, SAMPLE_VAL

CELL = Cell("f.parquet", 7)
USER = {"role": "user", "content": "Hello there"}
ANSWER = {"role": "assistant", "content": "Hi!"}
START, END = "<|im_start|>", "<|im_end|>"
MEDICAL_SET = pytest.param(MEDICAL, marks=pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is absent"))


def reference(tokenizer, prompt: list[dict], response: str) -> tuple[list[int], list[bool]]:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(END)]
    return before + after, [False] * len(before) + [True] * len(after)


@pytest.fixture(scope="module")
def plain(tokenizer):
    """The same tokenizer without a chat template."""
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    return without


def with_template(tokenizer, template: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def encode(chat_format: ChatFormat, segments) -> tuple[list[int], list[bool]]:
    [[(tokens, mask, weight, _)]] = chat_format.tokenize([segments])
    assert weight == 1
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    return tokens.tolist(), mask.tolist()


def one_row(tokenizer, prompt, response, **options) -> tuple[list[int], list[bool]]:
    chat_format = ChatFormat(tokenizer, **options)
    return encode(chat_format, chat_format.prompt_and_response(prompt, response, CELL))


def text_of(tokenizer, row) -> str:
    return tokenizer.decode(row[0])


def target_text(tokenizer, row) -> str:
    return tokenizer.decode([token for token, is_target in zip(*row, strict=True) if is_target])


def message(work, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", [SAMPLE_TRAIN, SAMPLE_VAL, MEDICAL_SET])
def test_every_row_is_template_then_response_then_end_of_turn(tokenizer, tmp_path, monkeypatch, file):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    data = load_dataset([str(file)], "train_files", tokenizer, RowFlags(max_length=10**6))
    rows = pq.read_table(file, columns=["prompt", "response"]).to_pylist()
    assert len(data) == len(rows) > 0
    for index, row in enumerate(rows):
        prompt = [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
        tokens, mask = data[index]
        assert (tokens.tolist(), mask.tolist()) == reference(tokenizer, prompt, row["response"]), f"row {index}"


def test_the_end_of_turn_is_a_target_although_it_is_the_pad_token_too(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    tokens, mask = one_row(tokenizer, [USER], "Hi!")
    ends = [i for i, token in enumerate(tokens) if token == tokenizer.pad_token_id]
    assert len(ends) == 3  # the system turn's, the user's and the answer's
    assert [mask[i] for i in ends] == [False, False, True]
    assert ends[-1] == len(tokens) - 1


def test_the_boundary_is_exact_where_tokens_would_merge_over_it(plain):
    together = plain("unbelievable", add_special_tokens=False)["input_ids"]
    before, after = (plain(text, add_special_tokens=False)["input_ids"] for text in ("unbel", "ievable"))
    assert before + after != together
    tokens, mask = one_row(plain, "unbel", "ievable")
    assert tokens == [*before, *after, plain.eos_token_id]
    assert mask == [False] * len(before) + [True] * (len(after) + 1)


def test_a_string_prompt_becomes_a_user_turn(tokenizer):
    assert one_row(tokenizer, "Hello there", "Hi!") == reference(tokenizer, [USER], "Hi!")


def test_a_string_formatted_already_is_taken_as_it_is(tokenizer):
    formatted = f"{START}user\nHello there{END}\n{START}assistant\n"
    row = one_row(tokenizer, formatted, "Hi!")
    assert text_of(tokenizer, row) == f"{formatted}Hi!{END}"
    assert target_text(tokenizer, row) == f"Hi!{END}"


def test_a_string_that_only_shares_blanks_with_the_template_is_not_formatted(tokenizer):
    with_blanks = copy.deepcopy(tokenizer)
    with_blanks.add_tokens(["  "])
    with_blanks.chat_template = f"{{% for m in messages %}}{START}  {{{{ m.content }}}}{END}{{% endfor %}}"
    row = one_row(with_blanks, "two  blanks", "Hi!")
    assert text_of(with_blanks, row) == f"{START}  two  blanks{END}Hi!{END}"


def test_a_template_without_special_tokens_is_recognised_by_its_words(tokenizer):
    words = with_template(
        tokenizer,
        "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}",
    )
    assert text_of(words, one_row(words, "Hello", "Hi!")) == f"### user: Hello\n### assistant: Hi!{END}"
    formatted = "### user: Hello\n### assistant: "
    assert text_of(words, one_row(words, formatted, "Hi!")) == f"{formatted}Hi!{END}"


def test_without_a_template_prompt_and_response_are_put_together_plainly(plain):
    row = one_row(plain, "Once upon", " a time")
    assert text_of(plain, row) == f"Once upon a time{END}"
    assert target_text(plain, row) == f" a time{END}"


def test_without_a_template_the_start_token_that_the_tokenizer_puts_comes_first():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}
    base = Tokenizer(models.WordLevel(words, unk_token="?"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    starting = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="</s>")
    assert one_row(starting, "a b", "b") == ([0, 2, 3, 3, 1], [False, False, False, True, True])


def test_without_a_template_messages_are_refused_with_file_and_row(plain):
    chat_format = ChatFormat(plain)
    told = message(chat_format.prompt_and_response, [USER], "Hi!", CELL)
    assert told.startswith("f.parquet, row 7: the prompt is a list of messages, but the tokenizer has no chat template")
    told = message(chat_format.conversation, [USER, ANSWER], CELL)
    assert told.startswith("f.parquet, row 7: --messages_key needs a tokenizer with a chat template")


def test_an_empty_prompt_without_a_template_is_refused(plain):
    told = message(ChatFormat(plain).prompt_and_response, "", "Hi!", CELL)
    assert told.startswith("f.parquet, row 7: the prompt is empty")


def test_an_empty_response_teaches_the_end_of_turn(tokenizer):
    assert target_text(tokenizer, one_row(tokenizer, [USER], "")) == END


@pytest.mark.parametrize("response", [ANSWER, [ANSWER], "Hi!"])
def test_a_response_may_be_one_message(tokenizer, response):
    assert one_row(tokenizer, [USER], response) == reference(tokenizer, [USER], "Hi!")


def test_a_template_that_refuses_the_messages_is_one_line(tokenizer):
    strict = with_template(
        tokenizer, "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    )
    told = message(ChatFormat(strict).prompt_and_response, [ANSWER], "Hi!", CELL)
    assert told.startswith("f.parquet, row 7: the chat template refuses the messages: user first")


def test_a_tokenizer_without_an_end_token_is_refused(plain):
    endless = copy.deepcopy(plain)
    endless.eos_token = None
    assert "has no end-of-sequence token" in message(ChatFormat, endless)


def test_the_end_of_turn_is_the_templates_own_where_it_differs_from_the_end_of_sequence(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    assert one_row(other, [USER], "Hi!") == reference(tokenizer, [USER], "Hi!")


@pytest.mark.parametrize("response", ["<think>why</think>so", " \n<think>why</think>so", "why</think>so"])
def test_thinking_ends_the_prompt_and_is_not_doubled(tokenizer, response):
    row = one_row(tokenizer, [USER], response, with_thinking=True)
    assert text_of(tokenizer, row).endswith(f"{START}assistant\n<think>why</think>so{END}")
    assert target_text(tokenizer, row) == f"why</think>so{END}"


def test_thinking_is_not_added_to_a_prompt_that_ends_with_it(tokenizer):
    formatted = f"{START}user\nHello{END}\n{START}assistant\n<think>\n"
    row = one_row(tokenizer, formatted, "why</think>so", with_thinking=True)
    assert text_of(tokenizer, row) == f"{formatted}why</think>so{END}"


def test_without_the_flag_thinking_belongs_to_the_response(tokenizer):
    assert target_text(tokenizer, one_row(tokenizer, [USER], "<think>a</think>b")) == f"<think>a</think>b{END}"


def conversation(tokenizer, messages) -> tuple[list[int], list[bool]]:
    chat_format = ChatFormat(tokenizer)
    return encode(chat_format, chat_format.conversation(messages, CELL))


LONG = [
    {"role": "system", "content": "Be brief."},
    USER,
    ANSWER,
    {"role": "user", "content": "And <|im_end|> now?"},
    {"role": "assistant", "content": " Bye.\n\nSee you"},
]


@pytest.mark.parametrize("messages", [LONG, LONG[:3], [USER, ANSWER, ANSWER], [*LONG, USER]])
def test_every_assistant_turn_with_its_end_is_a_target_and_nothing_else(tokenizer, messages):
    row = conversation(tokenizer, messages)
    assistants = [m["content"] for m in messages if m["role"] == "assistant"]
    assert target_text(tokenizer, row) == "".join(content + END for content in assistants)
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    rendered = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
    assert text_of(tokenizer, row) == rendered.removesuffix("\n")
    expected_tokens, expected_mask, cursor = [], [], 0
    for content in assistants:
        start = rendered.index(f"{START}assistant\n{content}{END}", cursor) + len(f"{START}assistant\n")
        before, answer = (
            tokenizer(s, add_special_tokens=False)["input_ids"] for s in (rendered[cursor:start], content)
        )
        expected_tokens += [*before, *answer, tokenizer.convert_tokens_to_ids(END)]
        expected_mask += [False] * len(before) + [True] * (len(answer) + 1)
        cursor = start + len(content) + len(END)
    assert row == (expected_tokens, expected_mask)


def test_a_conversation_of_one_answer_equals_prompt_and_response(tokenizer):
    assert conversation(tokenizer, [USER, ANSWER]) == reference(tokenizer, [USER], "Hi!")


def test_a_template_that_rewrites_history_makes_a_row_of_each_answer(tokenizer):
    forgetting = with_template(
        tokenizer,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    thinking = [USER, {"role": "assistant", "content": "<think>a</think>b"}, USER, ANSWER]
    chat_format = ChatFormat(forgetting)
    [rows] = chat_format.tokenize([chat_format.conversation(thinking, CELL)])
    first, second = [(row.tokens.tolist(), row.is_target.tolist()) for row in rows]
    assert first == reference(forgetting, [USER], "<think>a</think>b")
    assert second == reference(forgetting, [USER, {"role": "assistant", "content": "b"}, USER], "Hi!")
    assert conversation(forgetting, [USER, ANSWER, USER, ANSWER])


def test_a_conversation_that_starts_with_the_assistant_is_refused(tokenizer):
    told = message(conversation, tokenizer, [ANSWER, USER])
    assert told.startswith("f.parquet, row 7: turn 0 is an answer to no question; give it weight 0")
    greeting = [{**ANSWER, "weight": 0}, USER, ANSWER]
    assert target_text(tokenizer, conversation(tokenizer, greeting)) == f"Hi!{END}"


def test_a_template_that_starts_answers_otherwise_is_refused(tokenizer):
    other = with_template(
        tokenizer,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    )
    told = message(conversation, other, [USER, ANSWER])
    assert told.startswith(
        "f.parquet, row 7: the chat template does not render turn 1 as a continuation of its generation prompt"
    )
    assert r"im_start|>assistant\n<think>\n'" in told
    assert "--chat_template or --template_arguments" in told


def test_a_conversation_without_an_assistant_turn_is_refused(tokenizer):
    told = message(conversation, tokenizer, [USER])
    assert told.startswith("f.parquet, row 7: the conversation has no assistant turn")


@pytest.mark.parametrize(
    ("value", "end"),
    [
        (None, "the conversation must be a list of messages, got null"),
        ("text", "the conversation must be a list of messages, got str 'text'"),
        ([], "the conversation must be a list of messages, got a list of 0"),
        ([USER, {"content": "x"}], "message 1 of the conversation must have a role and a content, got a dict of 1"),
        ([USER, {"role": "assistant"}], "message 1 of the conversation has no content and no tool_calls"),
        ([{**USER, "content": [{"type": "image"}]}], "message 0 of the conversation must have text as its content"),
        ([{**ANSWER, "tool_calls": 3}], "message 0 of the conversation must have a list of objects as its tool_calls"),
        (
            [{**ANSWER, "tool_calls": [{"function": {"name": "find", "arguments": "{city"}}]}],
            "message 0 of the conversation: the arguments of find are not valid JSON: Expecting property name",
        ),
    ],
    ids=["null", "text", "empty", "no role", "no content", "image", "calls", "arguments"],
)
def test_what_is_no_conversation_is_refused_with_file_and_row(tokenizer, value, end):
    assert message(conversation, tokenizer, value).startswith(f"f.parquet, row 7: {end}")


def test_tools_of_another_kind(tokenizer):
    chat_format = ChatFormat(tokenizer)
    told = message(chat_format.conversation, [USER, ANSWER], CELL, 3)
    assert told.startswith("f.parquet, row 7: the tools must be a list of schemas, or JSON text of one, got int 3")
    told = message(chat_format.conversation, [USER, ANSWER], CELL, "[{")
    assert told.startswith("f.parquet, row 7: tools are not valid JSON: ")


def test_a_weight_or_flag_of_another_kind(tokenizer):
    for weight in (-1, "heavy", True, float("nan")):
        told = message(conversation, tokenizer, [USER, {**ANSWER, "weight": weight}])
        assert told == f"f.parquet, row 7: turn 1 has the weight {weight!r}; weights must be numbers, 0 or more"
    flagged = ChatFormat(tokenizer, learn="flagged")
    told = message(flagged.conversation, [USER, {**ANSWER, "train": "yes"}], CELL)
    assert told == "f.parquet, row 7: turn 1 has train 'yes'; write true or false"


def test_a_response_with_keys_needs_a_template(tokenizer):
    thinking = ChatFormat(tokenizer, with_thinking=True)
    told = message(thinking.prompt_and_response, [USER], {**ANSWER, "reasoning_content": "x"}, CELL)
    assert told.startswith("f.parquet, row 7: the response has reasoning_content, which the chat template renders only")


def test_rows_are_tokenized_as_if_each_were_alone(tokenizer):
    chat_format = ChatFormat(tokenizer)
    rows = [chat_format.prompt_and_response(p, r, CELL) for p, r in (("a", "b"), ("c c c", ""), ([USER], "Hi!"))]
    rows.append(chat_format.conversation(LONG, CELL))
    together = [(row.tokens.tolist(), row.is_target.tolist()) for [row] in chat_format.tokenize(rows)]
    assert together == [encode(chat_format, row) for row in rows]
