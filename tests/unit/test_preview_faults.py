"""Every planted fault is named in one line with its count and an example, and sound rows have none."""

import copy
import io
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config import PreviewConfig
from dsft.config.flags import RowFlags
from dsft.dataset.readers import Cell
from dsft.previewing.preview import Preview, make_preview
from dsft.previewing.render import show, statistics_lines
from dsft.previewing.row_checks import Row, answer_text, truncation_finding
from tests.helpers import MEDICAL, SAMPLE_TRAIN, SAMPLE_VAL, token_dataset, trl_templates, write_parquet

MEDICAL_SET = pytest.param(MEDICAL, marks=pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is absent"))
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LAST_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role != 'user' else m.content | upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_START = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\nAnswer: {% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(one_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sound() -> list[dict]:
    """Rows of several turns, in a system turn, thinking in the responses and in their histories."""
    return pq.read_table(SAMPLE_TRAIN, columns=["prompt", "response"]).to_pylist()[:40]


@pytest.fixture
def rows(sound) -> list[dict]:
    return copy.deepcopy(sound)


def preview(model: Path | str, files: list[Path], **flags) -> Preview:
    config = PreviewConfig(model=str(model), train_files=[str(file) for file in files], **{"rows": 0} | flags)
    config.check()
    return make_preview(config)


@pytest.fixture
def look(tiny_model, tmp_path):
    """The findings on rows, those that are not ok by default, as (kind, name, text)."""

    def look(
        rows: list[dict], template: str | None = None, kinds=("warning", "refused"), **flags
    ) -> list[tuple[str, str, str]]:
        model = tiny_model
        if template is not None:
            model = tmp_path / "model"
            shutil.copytree(tiny_model, model)
            (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        found = preview(model, [write_parquet(tmp_path / "f.parquet", rows)], **flags).findings
        assert all("\n" not in finding.text for finding in found)
        return [(f.kind, f.name, f.text.replace(str(tmp_path), "")) for f in found if f.kind in kinds]

    return look


@pytest.mark.parametrize("file", [SAMPLE_TRAIN, SAMPLE_VAL, MEDICAL_SET])
def test_sound_rows_have_no_faults(tiny_model, file):
    other = SAMPLE_TRAIN if file == SAMPLE_VAL else SAMPLE_VAL
    found = preview(tiny_model, [file], val_files=[str(other)]).findings
    assert {finding.kind for finding in found} == {"ok"}
    assert {finding.name for finding in found} >= {"histories", "end of turn", "start of answers", "rows", "val: rows"}


@pytest.mark.parametrize("prompt", ["string", "chatml", "messages"])
def test_sound_rows_in_other_forms_have_no_faults(look, rows, prompt):
    if prompt == "messages":
        answers = [{"role": "assistant", "content": row["response"]} for row in rows]
        assert look([{"m": [*row["prompt"], a]} for row, a in zip(rows, answers, strict=True)], messages_key="m") == []
        return
    for row in rows:
        turns = [(m["role"], m["content"]) for m in row["prompt"]]
        if prompt == "string":
            row["prompt"] = "\n".join(f"{role}: {content}" for role, content in turns)
        else:
            chatml = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
            row["prompt"] = f"{chatml}<|im_start|>assistant\n"
    assert look(rows) == []


def test_without_a_template_sound_rows_have_no_faults(tmp_path, tiny_model):
    model = tmp_path / "plain"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").unlink()
    file = write_parquet(
        tmp_path / "f.parquet", [{"prompt": f"{i} plus 1 is ", "response": f"{i + 1}"} for i in range(9)]
    )
    found = preview(model, [file]).findings
    assert [(f.kind, f.name) for f in found] == [
        ("ok", "template"), ("ok", "end of turn"), ("ok", "start of answers"), ("ok", "rows"),
    ]  # fmt: skip


# Of the rows


def test_empty_answers(look, rows):
    rows[3]["response"] = " \n"
    rows[5]["response"] = "<think> I know it. </think>\n<answer> </answer>"
    rows[9]["response"] = ""
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("warning", "empty answers")
    assert text.startswith("3 of 40 rows have an answer without text, e.g. /f.parquet, row 3;")


def test_an_answer_that_is_missing_is_refused_in_the_same_line(look, rows):
    rows[3]["response"] = rows[7]["response"] = None
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("refused", "empty answers")
    assert text.startswith("2 of 40 rows have an answer without text, e.g. /f.parquet, row 3;")


def test_duplicates(look, rows):
    [(kind, name, text)] = look([*rows, rows[4], rows[4], rows[2]])
    assert (kind, name) == ("warning", "duplicates")
    assert text.startswith(
        "3 of 43 rows repeat an earlier row exactly, e.g. /f.parquet, row 40 that of /f.parquet, row 4;"
    )


def test_the_same_prompt_with_another_answer_is_no_duplicate(look, rows):
    other = rows[4] | {"response": "<think> Otherwise. </think>\n<answer> Question: What else? </answer>"}
    assert look([*rows, other]) == []


def test_swapped_columns_of_messages_and_strings(look, rows):
    swapped = [{"prompt": row["response"], "response": row["prompt"]} for row in rows]
    [(kind, name, text)] = look(swapped)
    assert (kind, name) == ("refused", "swapped columns")
    assert text == (
        "all 40 rows have what looks like a prompt in the response column, e.g. /f.parquet, row 0; "
        "try --prompt_key response --response_key prompt"
    )


def test_some_rows_are_swapped(look, rows):
    for row in rows[10:13]:
        text = "\n".join(m["content"] for m in row["prompt"])
        row["prompt"], row["response"] = [{"role": "user", "content": row["response"]}], text
    swapped = [row | {"response": [{"role": "user", "content": row["response"]}]} for row in rows[10:13]]
    good = [row | {"response": [{"role": "assistant", "content": row["response"]}]} for row in rows]
    [(kind, name, text)] = look([*good[:10], *swapped, *good[13:]])
    assert (kind, name) == ("warning", "swapped columns")
    assert text.startswith(
        "3 of 40 rows have what looks like a prompt in the response column, e.g. /f.parquet, row 10;"
    )


def test_swapped_flags_are_told_by_the_columns_names(look):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}."} for i in range(20)]
    assert look(rows, prompt_key="question", response_key="answer") == []
    [(kind, name, text)] = look(rows, prompt_key="answer", response_key="question")
    assert (kind, name) == ("warning", "swapped columns")
    assert text.endswith("try --prompt_key question --response_key answer")


def test_swapped_strings_are_told_by_the_templates_user_turns(look):
    rows = [
        {"prompt": f"move {i}", "response": f"<|im_start|>user\nroom {i}<|im_end|>\n<|im_start|>assistant\n"}
        for i in range(20)
    ]
    names = [name for _, name, _ in look(rows)]
    assert names[0] == "swapped columns"


def test_swapped_strings_are_told_by_what_grows(look):
    history, rows = "Patient: my head has been hurting for three days.\n", []
    for i in range(20):
        rows.append({"prompt": history, "response": f"Doctor: since when, {i}?"})
        history += f"Doctor: since when, {i}?\nPatient: since {i} o'clock.\n"
    assert look(rows) == []
    [(kind, name, text)] = look([{"prompt": row["response"], "response": row["prompt"]} for row in rows])
    assert (kind, name) == ("warning", "swapped columns")
    assert text.startswith("19 of 20 rows")


def test_roles_in_other_languages(look, rows):
    for row in rows[20:30]:
        names = {"user": "用户", "assistant": "助手"}
        row["prompt"] = [m | {"role": names.get(m["role"], m["role"])} for m in row["prompt"]]
    for template, kind in ((None, "warning"), (STRICT, "refused")):
        [found] = look(rows, template)
        assert found[:2] == (kind, "role names")
        assert found[2] == (
            "10 of 40 rows use the roles '用户', '助手' besides 'system', 'user', 'assistant', "
            "e.g. /f.parquet, row 20; use system, user and assistant throughout"
        )


def test_roles_of_another_convention_in_conversations(look, rows):
    names = {"user": "human", "assistant": "gpt"}
    turns = [[*row["prompt"], {"role": "assistant", "content": row["response"]}] for row in rows]
    renamed = [{"m": [m | {"role": names.get(m["role"], m["role"])} for m in t]} for t in turns]
    [(kind, name, text)] = look(renamed, messages_key="m")
    assert (kind, name) == ("refused", "role names")
    assert text.startswith("all 40 rows use the roles 'human', 'gpt' besides 'system', e.g. /f.parquet, row 0;")


def test_a_prompt_that_ends_with_the_assistant(look, rows):
    rows[6]["prompt"].append(
        {"role": "assistant", "content": "<think> So. </think>\n<answer> Question: Yes? </answer>"}
    )
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("warning", "last turn")
    assert text.startswith("1 of 40 rows have a prompt that ends with an assistant turn, e.g. /f.parquet, row 6;")


def without_thinking(text: str) -> str:
    return re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)


def with_history(rows: list[dict]) -> list[int]:
    return [i for i, row in enumerate(rows) if any(m["role"] == "assistant" for m in row["prompt"])]


def test_thinking_that_was_stripped_from_histories(look, rows):
    for row in rows:
        row["prompt"] = [
            m | {"content": without_thinking(m["content"])} if m["role"] == "assistant" else m for m in row["prompt"]
        ]
    have = with_history(rows)
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("warning", "thinking in histories")
    assert text.startswith(f"{len(have)} of 40 rows have thinking in the answer but not in every earlier")
    assert f"e.g. /f.parquet, row {have[0]};" in text


@pytest.mark.parametrize("stripped", [[8, 9], range(30), range(40)])
def test_thinking_that_was_stripped_from_answers(look, rows, stripped):
    for i in stripped:
        rows[i]["response"] = without_thinking(rows[i]["response"])
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("warning", "thinking in answers")
    count = "all 40 rows" if len(stripped) == 40 else f"{len(stripped)} of 40 rows"
    assert text.startswith(f"{count} have an answer without <think>, although ")
    assert f"e.g. /f.parquet, row {stripped[0]};" in text


def test_answers_that_never_think_are_sound(look):
    assert look([{"prompt": f"{i} + 1?", "response": f"{i + 1}"} for i in range(9)]) == []


def test_thinking_that_is_never_closed(look):
    rows = [{"prompt": f"{i} + 1?", "response": f"easy</think>{i + 1}"} for i in range(9)]
    assert look(rows, with_thinking=True) == []
    rows[4]["response"] = "5"
    [(kind, name, text)] = look(rows, with_thinking=True)
    assert (kind, name) == ("warning", "unclosed thinking")
    assert text.startswith("1 of 9 rows never close the <think> of --with_thinking, e.g. /f.parquet, row 4;")


def test_an_end_of_turn_in_the_answer_itself(look, rows):
    rows[3]["response"] += "<|im_end|>"
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("warning", "end-of-turn in answers")
    assert text.startswith("1 of 40 rows have <|im_end|> in the answer, e.g. /f.parquet, row 3;")


def test_a_row_that_training_refuses_is_told_with_how_many_there_are(look, rows):
    for i in (5, 6):
        rows[i]["prompt"] = [{"role": None, "content": "Hello"}]
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("refused", "rows")
    assert text == (
        "/f.parquet, row 5: message 0 of the prompt must have a role and a content, got a dict of 2 (2 of 40 rows)"
    )


def test_a_missing_column_is_told_and_the_template_is_looked_at(look, rows):
    [(kind, name, text)] = look(rows, response_key="respons")
    assert (kind, name) == ("refused", "load")
    assert "has no column 'respons' (--response_key) (did you mean 'response'?)" in text


# Of the length


def test_all_answers_are_cut(look, rows):
    for length, left_out in ((60, 40), (100, 29)):
        found = look(rows, truncation="right", max_length=length)
        [(kind, name, text)] = found
        assert name == "truncation"
        assert kind == ("refused" if left_out == 40 else "warning")
        assert f"rows lose the end of the answer, {left_out} of them all of it (these are dropped), e.g. " in text


def test_rows_that_are_too_long_are_refused_with_their_count(look, rows):
    rows[4]["response"] += " more" * 2100
    [(kind, name, text)] = look(rows)
    assert (kind, name) == ("refused", "truncation")
    assert re.match(
        r"1 of 40 rows have more tokens than --max_length 2048 \(the longest row has 2,\d\d\d tokens\), e\.g\. "
        r"/f\.parquet, row 4; raise it, or choose --truncation left, right or drop",
        text,
    )
    for how, start in (
        ("right", "1 of 40 rows lose the end of the answer, 0 of them all of it (these are dropped), e.g."),
        ("left", "1 of 40 rows are dropped by --truncation left, e.g. /f.parquet, row 4;"),
        ("drop", "1 of 40 rows are dropped by --truncation drop, e.g. /f.parquet, row 4;"),
    ):
        [(kind, name, text)] = look(rows, truncation=how)
        assert (kind, name) == ("warning", "truncation")
        assert text.startswith(start)


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=12), st.integers(1, 14),
    st.sampled_from(["error", "left", "right", "drop"]),
)  # fmt: skip
@settings(deadline=None, database=None)
def test_truncation_in_a_formula(rows, max_length, how):
    """Rows of so many prompt tokens and targets."""
    data = token_dataset([([*range(p + r)], [False] * p + [True] * r) for p, r in rows])
    found = truncation_finding(data, RowFlags(max_length=max_length, truncation=how))
    too_long = [(p, r) for p, r in rows if p + r > max_length]
    lost = [(p, r) for p, r in too_long if (r if how == "left" else p) >= max_length]
    affected = lost if how == "left" else too_long
    if not affected:
        assert found is None
        return
    total = len(rows)
    count = f"all {total} rows" if len(affected) == total > 1 else f"{len(affected)} of {total} rows"
    assert found.text.startswith(count)
    assert f"e.g. row {rows.index(affected[0])};" in found.text
    assert (found.kind == "refused") == (how == "error" or len(lost if how != "drop" else too_long) == total)
    if how == "right":
        assert f" the end of the answer, {len(lost)} of them all of it " in found.text


def test_a_prompt_that_is_cut_in_front_is_no_fault(look, rows):
    assert look(rows, truncation="left", max_length=200) == []


# Of conversations with tools and weights


CALL = {"type": "function", "id": "call0", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "call0", "name": "weather"}


def agent_rows(**changes) -> list[dict]:
    """Conversations with a tool call; `changes` are for the messages of row 2, by their index."""
    rows = []
    for number in range(4):
        messages = [
            {"role": "user", "content": f"What is the weather in town {number}?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            RESULT,
            {"role": "assistant", "content": f"Sunny in town {number}."},
        ]
        if number == 2:
            for index, message in changes.items():
                messages[int(index[1:])] = message
        rows.append({"m": [message for message in messages if message]})
    return rows


def test_sound_conversations_with_tools_have_no_faults(look):
    template = (trl_templates() / "qwen2_5.jinja").read_text(encoding="utf-8")
    [ignored] = look(agent_rows(), template, messages_key="m")
    text = "the chat template ignores keys of the messages: tool_call_id in 4 rows, name in 4 rows"
    assert ignored == ("warning", "ignored keys", text)


def test_a_template_without_tools_is_told(look):
    [(kind, name, text)] = look(agent_rows(), messages_key="m")
    assert (kind, name) == ("warning", "ignored keys")
    assert "tool_calls in 4 rows" in text


@pytest.mark.parametrize(
    ("changes", "kind", "name", "text"),
    [
        ({"m1": None}, "warning", "tool results", "1 of 4 rows have a tool result that no call before it asks for"),
        ({"m2": RESULT | {"tool_call_id": "call9"}}, "warning", "tool results", "1 of 4 rows have a tool result"),
        (
            {"m1": {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{city: Rom}"}}]}},
            "refused",
            "tool arguments",
            "1 of 4 rows have a tool call whose arguments are not valid JSON",
        ),
        ({"m0": None}, "refused", "questions", "1 of 4 rows have an answer to no question"),
        ({"m2": None}, "warning", "questions", "1 of 4 rows have an answer to no question"),
    ],
    ids=["no call", "another call", "arguments", "starts with an answer", "no result"],
)
def test_faults_of_conversations_with_tools(look, changes, kind, name, text):
    found = {found[1]: found for found in look(agent_rows(**changes), messages_key="m")}
    assert found[name][0] == kind
    assert found[name][2].startswith(text)
    assert "e.g. /f.parquet, row 2;" in found[name][2]


@pytest.mark.parametrize("flags", [{"weight_key": "w"}, {"learn": "flagged"}])
def test_weights_that_are_all_0(look, flags):
    rows = [row | {"w": 0} for row in agent_rows()]
    [(kind, name, text)] = [found for found in look(rows, messages_key="m", **flags) if found[0] == "refused"]
    assert (kind, name) == ("refused", "load")
    assert "is left: 4 rows with nothing to learn; give some answer a weight above 0" in text


def test_sources_that_are_empty(tiny_model, tmp_path):
    rows = [{"prompt": f"Hello {i}", "response": f"Hi {i}"} for i in range(4)]
    full = write_parquet(tmp_path / "full.parquet", rows)
    few = write_parquet(tmp_path / "few.parquet", [{"prompt": "Who?", "response": "Me"}])
    (tmp_path / "none.jsonl").write_text("")
    cases = {
        "none.jsonl": ("load", f"no rows in {tmp_path}/none.jsonl; name files that contain some"),
        "few.parquet*0.4": (
            "run",
            "train_files: source few has 1 rows, and with weight 0.4 none in an epoch; raise its weight, or leave the "
            "source out",
        ),
    }
    for entry, (name, text) in cases.items():
        made = preview(tiny_model, [f"full={full}", f"few={tmp_path}/{entry}"])
        assert [(f.name, f.text) for f in made.findings if f.kind == "refused"] == [(name, text)]
    made = preview(tiny_model, [f"full={full}*1.5", f"few={few}*3"], train_batch_size=3)
    assert not [f for f in made.findings if f.kind == "refused"]
    assert made.batches.rows * made.batches.steps_first_epoch == 4 * 1.5 + 3
    text = "\n".join(statistics_lines(made))
    assert "full: 4 rows, " in text
    assert ", 1.5 times per epoch" in text


def test_rows_show_their_weight(tiny_model, tmp_path):
    rows = [{"prompt": "Hello", "response": "Hi", "w": 0.5}, {"prompt": "And", "response": "Bye", "w": 1.0}]
    file = write_parquet(tmp_path / "f.parquet", rows)
    made = preview(tiny_model, [file], weight_key="w", rows=2)
    stream = io.StringIO()
    show(made, stream)
    heads = [line for line in stream.getvalue().splitlines() if line.startswith("row ")]
    assert [line.endswith("; weight 0.5") for line in heads] == [True, False]


# Of the template


def test_a_template_that_strips_thinking(look, rows, sound):
    have = with_history(sound)
    [histories] = [text for kind, name, text in look(rows, FORGETFUL, kinds=("ok",)) if name == "histories"]
    assert histories.startswith(
        f"the chat template strips thinking from earlier turns, here as at inference: in {len(have)} of 40 rows, "
        f"e.g. /f.parquet, row {have[0]};"
    )


def test_a_template_that_strips_thinking_which_there_is_not(look):
    assert look([{"prompt": f"{i} + 1?", "response": f"{i + 1}"} for i in range(9)], FORGETFUL) == []


def test_a_template_without_an_end_of_turn(look, rows):
    [(kind, name, text)] = look(rows, ENDLESS)
    assert (kind, name) == ("warning", "end of turn")
    assert text.startswith(
        "the chat template puts no special token directly after an answer; training appends <|im_end|> in all 40 rows"
    )


def test_a_template_that_rewrites_earlier_turns(look, rows):
    [(kind, name, text)] = look(rows, LAST_ONLY)
    assert (kind, name) == ("warning", "histories")
    assert ": 'probequestion<|im_end|>\\n" in text
    assert " becomes 'PROBEQUESTION<|im_end|>\\n" in text


def test_a_template_that_starts_answers_otherwise_in_generation(look, rows):
    found = {name: (kind, text) for kind, name, text in look(rows, OTHER_START)}
    assert found["start of answers"][0] == "warning"
    assert "ends a generation prompt otherwise than it begins an answer" in found["start of answers"][1]


@pytest.mark.parametrize(("stops", "kind"), [("[0]", "warning"), ("[0, 2]", "ok"), ("2", "ok"), (None, "ok")])
def test_an_end_of_turn_at_which_generation_does_not_stop(tiny_model, tmp_path, rows, stops, kind):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for name in ("generation_config.json", "config.json"):
        text = (model / name).read_text(encoding="utf-8")
        assert '"eos_token_id": 2' in text
        changed = re.sub(r'"eos_token_id": 2', '"eos_token_id": ' + (stops or "null"), text)
        (model / name).write_text(changed, encoding="utf-8")
    found = {f.name: f for f in preview(model, [write_parquet(tmp_path / "f.parquet", rows)]).findings}
    assert found["end of turn"].kind == kind
    if kind == "warning":
        assert found["end of turn"].text.startswith(
            "<|im_end|> is learned after every answer, but the model's generation config stops at <|endoftext|>:"
        )


def test_the_templates_own_system_prompt_is_told(tiny_model, tmp_path):
    rows = [{"prompt": f"{i} + 1?", "response": f"{i + 1}"} for i in range(4)]
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "response": row["response"]} for row in rows]
    found = preview(tiny_model, [write_parquet(tmp_path / "f.parquet", rows)]).findings
    assert found[0].kind == "ok"
    assert "all 4 rows have no system turn and get this one: 'You are a helpful AI assistant" in found[0].text


def test_an_answer_that_melts_into_its_header_makes_a_row_of_each_answer(tmp_path, tiny_model):
    """In a conversation, an answer that begins with blanks melts into the header before it once it is history."""
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "\n\nHi"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Bye"},
    ]
    file = write_parquet(tmp_path / "f.parquet", [{"messages": turns}, {"messages": turns[:1] + turns[3:]}])
    made = preview(tiny_model, [file], messages_key="messages", rows=3)
    assert [row.place for row in made.rows] == [f"{file}, row 0", f"{file}, row 0", f"{file}, row 1"]
    assert made.train.conversations_text.startswith("1 of 2 conversations became 2 rows, because the chat template")
    assert {f.kind for f in made.findings if f.name == "start of answers"} == {"ok"}


def test_faults_of_the_validation_set_are_told_as_its_own(tiny_model, tmp_path, rows):
    sound = write_parquet(tmp_path / "f.parquet", rows)
    bad = write_parquet(tmp_path / "v.parquet", [*rows[:5], rows[0]])
    found = preview(tiny_model, [sound], val_files=[str(bad)]).findings
    [(kind, name, text)] = [(f.kind, f.name, f.text) for f in found if f.kind != "ok" and f.name.startswith("val: ")]
    assert {f.kind for f in found if f.name in ("rows", "histories")} == {"ok"}
    assert (kind, name) == ("warning", "val: duplicates")
    assert text.startswith(f"1 of 6 rows repeat an earlier row exactly, e.g. {bad}, row 5 that of {bad}, row 0;")


# Small functions


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think> a </think> b", "b"),
        ("a </think> b", "b"),
        ("<think> a", ""),
        ("<think> a </think><answer> </answer>", ""),
        ("b <think> a </think> c", "b  c"),
        (" \n", ""),
        ("<answer>a</answer>", "a"),
    ],
)
def test_what_an_answer_says(text, left):
    assert answer_text(text) == left


@pytest.mark.parametrize(
    ("response", "answers"),
    [("a", ["a"]), ({"content": "a"}, ["a"]), ([{"content": "a"}], ["a"]), ([], []), (None, []), (3, [])],
)
def test_the_answers_of_a_row(response, answers):
    assert Row(Cell("f", 0), "p", response).answers == answers
