"""Conversations under the chat templates that TRL ships, against what the templates themselves render."""

import copy
import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config.flags import RowFlags
from dsft.dataset.chat_format import RENDER_ERRORS, ChatFormat
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions
from dsft.dataset.piece_tokenizer import PieceTokenizer
from dsft.dataset.readers import Cell
from dsft.dataset.tokens import load_dataset
from dsft.errors import UserError
from dsft.model.flops import Cost
from tests.helpers import trl_templates

CELL = Cell("f.parquet", 7)
FOLDER = trl_templates()
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SPECIAL = re.compile(r"<[|｜][^<>'\"{}\s]+?[|｜]?>|<[a-z_]+\|>|<(?:start|end)_of_\w+>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks something up",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "population")
]
texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="<>") | st.just("\n"), max_size=12
)
words = texts.map(lambda text: f"w{text}w")


@st.composite
def conversations(draw) -> list[dict[str, Any]]:
    """Messages as users write them: null contents, parts, arguments as objects or JSON text, parallel calls."""

    def content(text: str) -> Any:
        return draw(st.sampled_from([text, [{"type": "text", "text": text}], [text]]))

    def thinking() -> dict[str, Any]:
        return {"reasoning_content": draw(words)} if draw(st.booleans()) else {}

    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": content(draw(words))})
        if draw(st.booleans()):
            calls = []
            for number in range(draw(st.integers(1, 2))):
                arguments: Any = {"city": draw(words)}
                if draw(st.booleans()):
                    arguments = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
                function = {"name": TOOLS[number]["function"]["name"], "arguments": arguments}
                calls.append({"type": "function", "id": f"abcdefgh{number}", "function": function})
            text = draw(st.sampled_from([None, "", "looking"]))
            messages.append({"role": "assistant", "content": text, "tool_calls": calls, **thinking()})
            for call in calls:
                result = {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"]}
                messages.append({**result, "content": draw(words)})
        messages.append({"role": "assistant", "content": content(draw(texts)), **thinking()})
    return messages


@cache
def with_all_tokens(tokenizer):
    """A tokenizer with the special tokens of all templates."""
    own = copy.deepcopy(tokenizer)
    texts = "".join((FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in TEMPLATES)
    own.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(texts)))})
    return own


@cache
def chat_format(tokenizer, name: str) -> ChatFormat:
    """A tokenizer with that template."""
    own = copy.copy(with_all_tokens(tokenizer))
    if name:
        own.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatFormat(own)


def variants(messages: list[dict[str, Any]]):
    """The same messages in the forms that templates want, the usual first."""
    for as_text in (False, True):
        for null in (True, False):
            for parts in (False, True):
                changed = []
                for message in copy.deepcopy(messages):
                    content = message["content"]
                    if isinstance(content, list):
                        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
                    message["content"] = [{"type": "text", "text": content or ""}] if parts else content or ""
                    if message.get("tool_calls") and not content and null:
                        message["content"] = None
                    for call in message.get("tool_calls", []):
                        given = call["function"]["arguments"]
                        given = json.loads(given) if isinstance(given, str) else given
                        call["function"]["arguments"] = json.dumps(given, ensure_ascii=False) if as_text else given
                    changed.append(message)
                yield changed


def render(tokenizer, messages, *, generation: bool) -> str | None:
    """By the tokenizer itself, in the first form whose texts all appear; None where it has none."""
    for changed in variants(messages):
        try:
            text = tokenizer.apply_chat_template(changed, tools=TOOLS, tokenize=False, add_generation_prompt=generation)
        except RENDER_ERRORS:
            continue
        if all(w in text for m in changed if m["role"] == "user" for w in [texts_of(m["content"]).strip()]):
            return text
    return None


def texts_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@pytest.mark.parametrize("name", ["", *TEMPLATES])
@settings(deadline=None, database=None, max_examples=12)
@given(messages=conversations())
def test_every_answer_is_what_the_template_adds_to_its_prompt(tokenizer, name, messages):
    form = chat_format(tokenizer, name)
    own = form.tokenizer
    asked = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked.append([render(own, messages[: index + add], generation=not add) for add in (0, 1)])
    if any(text is None for pair in asked for text in pair):
        with pytest.raises(UserError, match=r"row 7: the chat template (refuses the messages|does not render turn)"):
            form.conversation(messages, CELL, TOOLS)
        return
    if not all(whole.startswith(prompt) for prompt, whole in asked):
        with pytest.raises(UserError, match="row 7: the chat template does not render turn"):
            form.conversation(messages, CELL, TOOLS)
        return
    [rows] = form.tokenize([form.conversation(messages, CELL, TOOLS)])
    answers = []
    for tokens, is_target, _, _ in rows:
        starts = np.flatnonzero(np.diff(is_target.astype(int)) == 1) + 1
        ends = [*(np.flatnonzero(np.diff(is_target.astype(int)) == -1) + 1), len(tokens)]
        answers += [
            (tokens[:start].tolist(), tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)
        ]
    assert len(answers) == len(asked)
    special = {*own.all_special_ids}
    for (prompt, targets), (prompt_text, whole_text) in zip(answers, asked, strict=True):
        assert prompt == own(prompt_text, add_special_tokens=False)["input_ids"]
        assert targets[-1] in special
        whole = own(whole_text, add_special_tokens=False)["input_ids"]
        text = own.decode(targets, skip_special_tokens=False)
        if not whole_text[len(prompt_text) :].startswith(text):  # the template does not end answers: the end is ours
            assert targets[-1] == form.end_of_turn
            text, targets = own.decode(targets[:-1], skip_special_tokens=False), targets[:-1]
        rest = whole_text[len(prompt_text) :].removeprefix(text)
        assert not [token for token in own(rest.strip(), add_special_tokens=False)["input_ids"] if token not in special]
        if whole[: len(prompt)] == prompt:  # no token lies across the boundary
            assert whole[len(prompt) : len(prompt) + len(targets)] == targets


def test_most_templates_can_be_learned_from(tokenizer):
    """So that the test above does not pass by refusals alone."""
    tool_call = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
    plain = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    plain += [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    calls = [plain[0], {"role": "assistant", "content": None, "tool_calls": [tool_call]}]
    calls += [{"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"}, plain[3]]
    refused: dict[str, list[str]] = {"plain": [], "calls": []}
    for kind, messages in (("plain", plain), ("calls", calls)):
        for name in TEMPLATES:
            try:
                rendered = chat_format(tokenizer, name).conversation(messages, CELL, TOOLS)
            except UserError:
                refused[kind].append(name)
                continue
            assert "sunny" in rendered.answers[-1].prompt or kind == "plain" or "tools" in rendered.ignored, name
    # These open a thinking block in the prompt and render an answer without thinking without one, or otherwise.
    assert {name.split("_")[0] for name in refused["plain"]} <= {"deepseek", "deepseekv3", "nemotron"}
    alternating = {"cohere", "cohere2", "gemma", "gemma3", "llava"}  # no tool turns
    assert {name.split("_")[0] for name in refused["calls"]} <= {"deepseek", "deepseekv3", "nemotron", *alternating}


def test_thinking_that_the_template_strips_makes_a_row_of_each_answer(tokenizer):
    form = chat_format(tokenizer, "qwen3")
    messages = []
    for turn in range(3):
        messages += [
            {"role": "user", "content": f"Q{turn}"},
            {"role": "assistant", "content": f"A{turn}", "reasoning_content": f"T{turn}"},
        ]
    rendered = form.conversation(messages, CELL)
    [rows] = form.tokenize([rendered])
    learned = [form.tokenizer.decode(row.tokens[row.is_target]) for row in rows]
    assert learned == [f"<think>\nT{turn}\n</think>\n\nA{turn}<|im_end|>" for turn in range(3)]
    contexts = [form.tokenizer.decode(row.tokens[~row.is_target]) for row in rows]
    assert [re.findall(r"T\d", context) for context in contexts] == [[], [], []]
    assert [re.findall(r"A\d", context) for context in contexts] == [[], ["A0"], ["A0", "A1"]]
    assert rendered.ignored == []


@pytest.mark.parametrize(("learn", "learned"), [("all", ["A0", "A1", "A2"]), ("last", ["A2"]), ("flagged", ["A1"])])
def test_which_answers_are_learned(tokenizer, learn, learned):
    form = ChatFormat(tokenizer, learn=learn)
    messages = []
    for turn in range(3):
        messages += [{"role": "user", "content": f"Q{turn}"}]
        messages += [{"role": "assistant", "content": f"A{turn}", "train": turn == 1}]
    rendered = form.conversation(messages, CELL)
    assert [answer.text.removesuffix("<|im_end|>") for answer in rendered.answers] == learned
    assert rendered.ignored == ([] if learn == "flagged" else ["train"])
    [[row]] = form.tokenize([rendered])
    assert form.tokenizer.decode(row.tokens[row.is_target]) == "".join(f"{text}<|im_end|>" for text in learned)


def test_weights_of_messages_and_rows_are_multiplied_and_those_of_nothing_are_context(tokenizer):
    form = ChatFormat(tokenizer)
    messages = []
    for turn, weight in enumerate((1, 0, 0.5, 0.5)):
        messages += [{"role": "user", "content": f"Q{turn}"}]
        messages += [{"role": "assistant", "content": f"A{turn}", "weight": weight}]
    rendered = form.conversation(messages, CELL, weight=4)
    assert [(answer.text, answer.weight) for answer in rendered.answers] == [
        ("A0<|im_end|>", 4), ("A2<|im_end|>", 2), ("A3<|im_end|>", 2),
    ]  # fmt: skip
    [rows] = form.tokenize([rendered])
    assert [(form.tokenizer.decode(row.tokens[row.is_target]), row.weight) for row in rows] == [
        ("A0<|im_end|>", 4), ("A2<|im_end|>A3<|im_end|>", 2),
    ]  # fmt: skip


def test_keys_that_change_nothing_are_named(tokenizer):
    messages = [
        {"role": "user", "content": "Q", "name": "Ann"},
        {"role": "assistant", "content": "A", "reasoning_content": "T", "mood": None},
    ]
    assert chat_format(tokenizer, "qwen3").conversation(messages, CELL).ignored == ["name"]
    assert ChatFormat(tokenizer).conversation(messages, CELL, TOOLS).ignored == ["name", "reasoning_content", "tools"]
    assert ChatFormat(tokenizer).prompt_and_response(messages[:1], "A", CELL).ignored == ["name"]
    formatted = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert ChatFormat(tokenizer).prompt_and_response(formatted, "A", CELL, TOOLS).ignored == ["tools"]
    with_system = ChatFormat(tokenizer, system_prompt="Be brief.")
    assert with_system.prompt_and_response(formatted, "A", CELL).ignored == ["system_prompt"]
    unlearned = {"content": "A", "reasoning_content": "T", "weight": 0}
    assert chat_format(tokenizer, "qwen3").prompt_and_response("Q", unlearned, CELL).ignored == []


def test_a_system_prompt_is_for_rows_that_have_none(tokenizer):
    form = ChatFormat(tokenizer, system_prompt="Be brief.")
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    for prompt in (
        form.conversation(messages, CELL).answers[0].prompt,
        form.prompt_and_response("Q", "A", CELL).answers[0].prompt,
    ):
        assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ")
    own = [{"role": "system", "content": "Mine."}, *messages]
    assert "Be brief." not in form.conversation(own, CELL).answers[0].prompt


def test_template_arguments_reach_the_template(tokenizer):
    own = chat_format(tokenizer, "qwen3").tokenizer
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    silent = ChatFormat(own, template_arguments={"enable_thinking": False}).conversation(messages, CELL)
    assert silent.answers[0].prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert silent.answers[0].text == "A<|im_end|>"
    assert ChatFormat(own).conversation(messages, CELL).answers[0].text == "<think>\n\n</think>\n\nA<|im_end|>"
    with pytest.raises(UserError, match=r"no argument 'enable_thinkin' \(did you mean 'enable_thinking'\?\)"):
        ChatFormat(own, template_arguments={"enable_thinkin": False})


def test_a_response_may_be_a_message_with_tool_calls(tokenizer):
    form = chat_format(tokenizer, "qwen2_5")
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
    rendered = form.prompt_and_response("Q", {"content": None, "tool_calls": [call]}, CELL, json.dumps(TOOLS))
    assert rendered.answers[0].text == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call><|im_end|>'
    )
    assert '"name": "population"' in rendered.answers[0].prompt
    assert rendered.ignored == []


@pytest.mark.parametrize("name", ["", "qwen3", "llama3_1", "gemma3"])
@settings(deadline=None, database=None, max_examples=60)
@given(parts=st.lists(texts | st.sampled_from(["<|im_start|>", "<|im_end|>", " ", "<|eot_id|>", "<think>", "\n\n"])))
def test_tokens_of_pieces_are_those_of_the_whole(tokenizer, name, parts):
    own = chat_format(tokenizer, name).tokenizer
    pieces, text = PieceTokenizer(own), "".join(parts)
    assert pieces([text])[0].tolist() == own(text, add_special_tokens=False)["input_ids"]
    assert pieces([text, text])[1].tolist() == own(text, add_special_tokens=False)["input_ids"]  # remembered


@pytest.mark.parametrize("kind", ["lstrip", "first piece"])
def test_a_tokenizer_that_looks_around_is_given_whole_texts(kind):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"▁a": 0, "a": 1, "▁": 2, "</s>": 3, "?": 4}
    base = Tokenizer(models.BPE(words, [], unk_token="?"))
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "first piece" else "always")
    base.add_special_tokens([AddedToken("</s>", lstrip=kind == "lstrip")])
    own = PreTrainedTokenizerFast(tokenizer_object=base, eos_token=AddedToken("</s>", lstrip=kind == "lstrip"))
    for text in ("a</s>a", "a </s>a</s> a"):
        assert PieceTokenizer(own)([text])[0].tolist() == own(text, add_special_tokens=False)["input_ids"]


def test_reasoning_conversations_fold_to_little_more_than_each_once(tokenizer, tmp_path, monkeypatch):
    """64 conversations of 8 turns whose thinking is stripped from the history: 512 rows."""
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    own, random = chat_format(tokenizer, "qwen3").tokenizer, np.random.default_rng(0)

    def some_words(count: int) -> str:
        return " ".join(random.choice(["alpha", "beta", "gamma", "delta", "rho", "tau"], count))

    rows, once = [], 0
    for _ in range(64):
        messages = []
        for _ in range(8):
            messages.append({"role": "user", "content": some_words(80)})
            answer = {"role": "assistant", "content": some_words(15), "reasoning_content": some_words(25)}
            messages.append(answer)
            once += len(own(own.apply_chat_template(messages[-2:], tokenize=False))["input_ids"])
        rows.append({"messages": messages})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = load_dataset([str(file)], "train_files", own, RowFlags(max_length=10**5))
    assert (len(data), data.counts.split_conversations) == (512, 64)
    plan = MicroBatches(data, MicroBatchOptions(1, 10**6, True, True), Cost(1, 0, 0), 0).plan(np.arange(512))
    assert plan.tokens < 1.35 * once
    assert plan.row_tokens > 3 * plan.tokens
