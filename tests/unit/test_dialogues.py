"""Evaluation on dialogues: what counts as a well-formed answer, the shares, the loss, and what users get wrong."""

import json
import math
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config import ValidateConfig
from dsft.distributed.runtime import World
from dsft.errors import UserError
from dsft.validation.dialogues import (
    Answer,
    classify_answer,
    earlier_questions,
    evaluate_dialogues,
    normalize,
    summarize_answers,
)
from dsft.validation.generation import load_generator
from dsft.validation.statistics import Z, wilson_interval
from tests.helpers import BIN, MEDICAL, ROOT, SAMPLE_VAL, flags, metrics, run, start_words, write_parquet

PROPERTY = settings(deadline=None, database=None, max_examples=100)
ALONE = World(0, 1, 0, 1)
CPU = torch.device("cpu")
ASKED = "<think>a</think>\n<answer>Question: How long?</answer>"
TOLD = "<think>b</think><answer>Diagnosis: A cold.\nRecommendation: Rest.</answer>"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other on a busy core made these tests six times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))


def config(data, **values) -> ValidateConfig:
    made = ValidateConfig(**{"model": "m", "data": str(data), "dtype": "float32", "max_new_tokens": 16} | values)
    made.check()
    return made


def message(work, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Scripted:
    """Answers each prompt with the text that belongs to a word of it; keeps the batches it was given."""

    def __init__(self, tokenizer, answers: dict[str, str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.batches: list[list[str]] = []

    def __call__(self, prompts) -> list[str]:
        texts = self.tokenizer.batch_decode(prompts)
        self.batches.append(texts)
        return [next(answer for word, answer in self.answers.items() if word in text) for text in texts]


# Text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ASKED, Answer(True, "question", "How long?")),
        (TOLD, Answer(True, "diagnosis")),
        (" <think>\n</think> \n <answer>\nQuestion:  So? Why?\n</answer> \n", Answer(True, "question", "So? Why?")),
        ("<think>a</think><answer>Recommendation: Rest. Diagnosis: A cold.</answer>", Answer(True, "diagnosis")),
        ("<think>Question: me? Diagnosis: x</think><answer>Question: So?</answer>", Answer(True, "question", "So?")),
        # the block is there, the form is not
        ("<answer>Question: How long?</answer>", Answer(False, "question", "How long?")),
        (ASKED + " Thank you.", Answer(False, "question", "How long?")),
        ("Well. " + TOLD, Answer(False, "diagnosis")),
        ("<think>a</think> so <answer>Question: How long?</answer>", Answer(False, "question", "How long?")),
        ("<think>a</think><think>b</think><answer>Question: Why?</answer>", Answer(False, "question", "Why?")),
        ("<answer>Question: Why?</answer><think>a</think>", Answer(False, "question", "Why?")),
        ("<think>a<answer>Question: Why?</answer></think>", Answer(False, "question", "Why?")),
        # the form is there, the content is neither
        ("<think>a</think><answer>How long?</answer>", Answer(True, None)),
        ("<think>a</think><answer></answer>", Answer(True, None)),
        ("<think>a</think><answer>Question: </answer>", Answer(True, None)),
        ("<think>a</think><answer>Hello. Question: How long?</answer>", Answer(True, None)),
        ("<think>a</think><answer>question: How long?</answer>", Answer(True, None)),
        ("<think>a</think><answer>Question: How long?\nQuestion: Fever?</answer>", Answer(True, None)),
        ("<think>a</think><answer>Question: How long?\nDiagnosis: A cold.</answer>", Answer(True, None)),
        ("<think>a</think><answer>Question: Why? Recommendation: Rest.</answer>", Answer(True, None)),
        ("<think>a</think><answer>Diagnosis: A cold.</answer>", Answer(True, None)),
        ("<think>a</think><answer>Diagnosis: A cold. Recommendation: \n</answer>", Answer(True, None)),
        ("<think>a</think><answer>Diagnosis: Recommendation: Rest.</answer>", Answer(True, None)),
        ("<think>a</think><answer>Diagnosis: A. Recommendation: B. Question: C?</answer>", Answer(True, None)),
        # neither
        ("", Answer(False, None)),
        ("<think>a</think><answer>Question: How lo", Answer(False, None)),
        (ASKED + ASKED, Answer(False, None)),
        ("<Think>a</Think><Answer>Question: How long?</Answer>", Answer(False, None)),
    ],
)
def test_an_answer_is_what_it_was_asked_to_be_or_not(text, expected):
    assert classify_answer(text) == expected


def test_with_thinking_the_prompt_has_opened_the_thinking():
    continued = ASKED.removeprefix("<think>")
    assert (
        classify_answer(continued, with_thinking=True)
        == classify_answer(ASKED)
        == Answer(True, "question", "How long?")
    )
    assert not classify_answer(continued).in_form
    assert not classify_answer(ASKED, with_thinking=True).in_form  # <think><think>


words = st.text(st.characters(exclude_characters="<>:", codec="utf-8"))
visible = words.filter(str.strip)
space = st.text(" \n\t")


@PROPERTY
@given(words, visible, visible, space, space, space)
def test_whatever_the_words_the_form_and_the_kind_are_known(thought, first, second, before, between, after):
    def answer(content: str) -> Answer:
        return classify_answer(f"{before}<think>{thought}</think>{between}<answer>{content}</answer>{after}")

    assert answer(f"{before}Question:{first}{after}") == Answer(True, "question", first.strip())
    assert answer(f"Diagnosis:{first}\nRecommendation:{second}") == Answer(True, "diagnosis")
    assert answer(f"Question:{first}\nRecommendation:{second}") == Answer(True, None)
    assert answer(f"{first}\nQuestion:{second}") == Answer(True, None)


@PROPERTY
@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "a", "Question: b"]), max_size=9))
def test_a_text_is_in_form_exactly_if_its_tags_stand_alone_in_their_order(pieces):
    tags = [piece for piece in pieces if piece.startswith("<")]
    outside, inside = [], False
    for piece in pieces:
        if piece.startswith("<"):
            inside = not piece.startswith("</")
        elif not inside:
            outside.append(piece)
    expected = tags == ["<think>", "</think>", "<answer>", "</answer>"] and not "".join(outside).strip()
    assert classify_answer("".join(pieces)).in_form == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How long has this been going on?", " how LONG has this\nbeen, going on"),
        ("Don’t you smoke?", "don't you smoke"),
        ("哪里疼？", "哪里疼"),
        ("Straße?", "STRASSE"),
    ],
)
def test_case_punctuation_and_whitespace_do_not_tell_questions_apart(one, other):
    assert normalize(one) == normalize(other)


def test_other_words_and_signs_that_mean_something_do():
    texts = ("Fever?", "Fevers?", "Over 38 °C?", "Over 39 °C?", "Was it > 2?", "Was it < 2?")
    assert len(set(map(normalize, texts))) == 6


@PROPERTY
@given(st.text())
def test_normalizing_again_changes_nothing(text):
    assert normalize(normalize(text)) == normalize(text)


def test_earlier_questions_are_those_of_the_assistant_turns():
    prompt = [
        {"role": "system", "content": "<answer>Question: Not asked?</answer>"},
        {"role": "user", "content": "Question: Mine?"},
        {"role": "assistant", "content": ASKED},
        {"role": "user", "content": "<answer>Question: Nor this?</answer>"},
        {"role": "assistant", "content": "Question: Without tags?"},
        {"role": "assistant", "content": TOLD},
        {"role": "user", "content": "Well?"},
    ]
    assert earlier_questions(prompt) == {"how long", "without tags"}


def test_in_a_string_every_answer_block_is_an_earlier_turn():
    instructions = "<answer>If you ask:\nQuestion: (your question).\n</answer> or <answer> Question: … </answer>"
    assert earlier_questions(f"{instructions} {ASKED} and {TOLD}") == {"how long"}
    assert earlier_questions("How long? Question: Fever?") == frozenset()


@pytest.mark.parametrize("file", [MEDICAL, SAMPLE_VAL], ids=["medical", "sample"])
def test_every_response_of_the_real_sets_is_well_formed(file):
    if not file.exists():
        pytest.skip("the medical set is not here")
    answers = [classify_answer(text) for text in pq.read_table(file, columns=["response"])["response"].to_pylist()]
    assert [row for row, answer in enumerate(answers) if not answer.in_form or answer.kind is None] == []
    assert {answer.kind for answer in answers} == {"question", "diagnosis"}


@pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is not here")
def test_the_one_doctor_who_asks_again_is_found_in_the_real_set():
    rows = pq.read_table(MEDICAL, columns=["prompt", "response"]).to_pylist()
    asked = [(row, question) for row in rows if (question := classify_answer(row["response"]).question)]
    again = [row for row, question in asked if normalize(question) in earlier_questions(row["prompt"])]
    assert (len(rows), len(asked), len(again)) == (549, 449, 1)
    assert "ask again about smoking" in again[0]["response"]


# Shares


def answered(in_form: bool, kind: str | None, repeated: bool | None = None) -> dict:
    return {"in_form": in_form, "kind": kind, "repeated": repeated}


def test_shares_are_counted_over_answers_and_repeated_ones_over_questions():
    rows = [
        answered(True, "question", False),
        answered(True, "question", True),
        answered(False, "question", False),
        answered(True, "diagnosis"),
        answered(True, None),
    ]
    report = summarize_answers(rows)
    assert {key: report[key] for key in report if not key.endswith("interval")} == {
        "answers": 5,
        "form_rate": 4 / 5,
        "question_rate": 3 / 5,
        "diagnosis_rate": 1 / 5,
        "well_formed_rate": 3 / 5,
        "repeated_question_rate": 1 / 3,
    }
    assert report["form_interval"] == list(wilson_interval(4, 5))
    assert report["repeated_question_interval"] == list(wilson_interval(1, 3))


def test_without_questions_none_is_repeated_and_nothing_is_known():
    report = summarize_answers([answered(True, "diagnosis"), answered(False, None)])
    assert (report["repeated_question_rate"], report["repeated_question_interval"]) == (None, [0.0, 1.0])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        # at a share of 0 the interval is z²/(n + z²) long, and at 1 likewise
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        # at one half it is 1/2 ± z / (2 √(n + z²))
        (5, 10, 0.5 - 1.959964 / (2 * math.sqrt(13.841459)), 0.5 + 1.959964 / (2 * math.sqrt(13.841459))),
    ],
)
def test_wilson_intervals_worked_out_by_hand(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-7)


@PROPERTY
@given(st.integers(1, 10**6).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_a_wilson_interval_holds_the_share_and_ends_where_its_score_is_z(counts):
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / trials), rel=1e-6)
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


# The whole, with scripted answers


def dialogue(word: str, *turns: str) -> dict:
    """A prompt that begins with a word, then answers and replies; the response is one question."""
    roles = ["user", "assistant"] * (1 + len(turns))
    messages = [{"role": role, "content": text} for role, text in zip(roles, (word, *turns), strict=False)]
    return {"prompt": messages, "response": ASKED}


SCRIPT = {
    "alpha": ASKED,
    "beta": "<think>c</think><answer>Question: how long</answer>",
    "gamma": TOLD,
    "delta": "I do not know.",
    "epsilon": "<answer>Question: Which?</answer>",
}
ROWS = [
    dialogue("alpha"),
    dialogue("beta", ASKED, "two days, and I have slept badly in both nights"),
    dialogue("gamma", ASKED, "two"),
    dialogue("delta and much more to be said about it"),
    dialogue("epsilon"),
    dialogue("zeta"),
]


def test_rows_are_answered_in_batches_of_like_length_and_reported_in_file_order(tokenizer, tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", ROWS)
    generator = Scripted(tokenizer, SCRIPT)
    report, rows = evaluate_dialogues(config(file, episodes=5, batch_size=2), generator, ALONE)
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["answer"] for row in rows] == list(SCRIPT.values())
    assert [row["in_form"] for row in rows] == [True, True, True, False, False]
    assert [row["kind"] for row in rows] == ["question", "question", "diagnosis", None, "question"]
    assert [row["repeated"] for row in rows] == [False, True, None, None, False]
    assert [len(batch) for batch in generator.batches] == [2, 2, 1]
    texts = [text for batch in generator.batches for text in batch]
    assert texts == sorted(texts, key=lambda text: -len(tokenizer(text)["input_ids"]))
    assert sorted(row["prompt_tokens"] for row in rows) == sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    assert report["rows"] == 6
    assert (report["answers"], report["prompts_cut"]) == (5, 0)
    assert report["well_formed_rate"] == 3 / 5
    assert report["repeated_question_rate"] == 1 / 3


def test_what_gives_no_losses_says_so(tokenizer, tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", ROWS)
    report, _ = evaluate_dialogues(config(file, episodes=1), Scripted(tokenizer, SCRIPT), ALONE)
    assert (report["val/loss"], report["val/perplexity"]) == (None, None)
    assert report["loss_note"] == "vLLM gives no losses; --engine transformers does"


def test_prompts_are_those_of_training_and_end_in_think_with_thinking(tokenizer, tmp_path):
    row = {"prompt": "alpha", "response": "<think>yes</think>"}
    file = write_parquet(tmp_path / "rows.parquet", [{"extra_info": row}])
    continued = Scripted(tokenizer, {"alpha": ASKED.removeprefix("<think>")})
    keys = {"prompt_key": "extra_info", "prompt_dict_keys": ["prompt"]}
    keys |= {"response_key": "extra_info", "response_dict_keys": ["response"]}
    report, _ = evaluate_dialogues(config(file, with_thinking=True, **keys), continued, ALONE)
    assert continued.batches[0][0].endswith("<|im_start|>user\nalpha<|im_end|>\n<|im_start|>assistant\n<think>")
    assert report["well_formed_rate"] == 1.0
    report, _ = evaluate_dialogues(config(file, **keys), continued, ALONE)
    assert continued.batches[1][0].endswith("<|im_start|>assistant\n")
    assert report["form_rate"] == 0.0


@pytest.mark.parametrize("truncation", ["left", "right", "drop"])
def test_a_prompt_that_leaves_no_room_for_an_answer_loses_its_front(tokenizer, tmp_path, truncation):
    file = write_parquet(tmp_path / "rows.parquet", [dialogue("alpha"), dialogue("delta " * 100 + "gamma")])
    generator = Scripted(tokenizer, {"gamma": TOLD, "alpha": ASKED})
    limits = {"max_length": 120, "max_new_tokens": 80, "truncation": truncation}
    report, rows = evaluate_dialogues(config(file, batch_size=1, **limits), generator, ALONE)
    assert report["prompts_cut"] == 1
    assert [row["prompt_tokens"] for row in rows] == [len(tokenizer(generator.batches[1][0])["input_ids"]), 40]
    assert generator.batches[0][0].endswith(" gamma<|im_end|>\n<|im_start|>assistant\n")
    assert report["rows"] + report["rows_dropped"] == 2


# What users get wrong


def test_a_prompt_that_leaves_no_room_is_an_error_where_truncation_is_one(tokenizer, tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", [dialogue("alpha"), dialogue("delta " * 100)])
    limits = {"max_length": 150, "max_new_tokens": 80}
    told = message(evaluate_dialogues, config(file, **limits), Scripted(tokenizer, SCRIPT), ALONE)
    assert told.startswith(f"{file}, row 1 has a prompt of 1")
    assert " tokens, --max_length 150 leaves 70 with --max_new_tokens 80; raise --max_length, or choose" in told
    assert told.endswith("--truncation left")


def test_an_answer_as_long_as_a_row_is_refused(tokenizer, tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", ROWS)
    limits = {"max_length": 64, "max_new_tokens": 64}
    told = message(evaluate_dialogues, config(file, **limits), Scripted(tokenizer, SCRIPT), ALONE)
    assert told == (
        "--max_length 64 leaves no tokens for a prompt with --max_new_tokens 64; raise the first or lower the second"
    )


@pytest.mark.parametrize(
    ("rows", "values", "start"),
    [
        (None, {}, "--data {file}: no such file"),
        (ROWS, {"prompt_key": "promt"}, "{file} has no column 'promt' (--prompt_key)"),
        (ROWS, {"prompt_dict_keys": ["text"]}, "{file}, row 0: column 'prompt' has no key 'text'"),
        ([*ROWS, ROWS[0] | {"response": None}], {}, "{file}, row 6: the response must be a string"),
        ([ROWS[0] | {"prompt": []}], {}, "{file}, row 0: the prompt must be a string or a list"),
        (ROWS, {"max_length": 64}, "{file}, row 1 has "),
    ],
)
def test_errors_name_the_flag_or_the_file_and_the_row(tokenizer, tmp_path, rows, values, start):
    file = tmp_path / "rows.parquet"
    if rows:
        write_parquet(file, rows)
    told = message(evaluate_dialogues, config(file, **values), Scripted(tokenizer, SCRIPT), ALONE)
    assert told.startswith(start.format(file=file))


# The whole, with a real model


def evaluate(file, **values):
    made = config(file, **values)
    return evaluate_dialogues(made, load_generator(made, CPU), ALONE)


def test_answers_in_batches_are_those_given_one_by_one(tiny_model, uneven_rows):
    values = {"model": str(tiny_model), "max_new_tokens": 12}
    together, alone = (evaluate(uneven_rows, batch_size=size, **values) for size in (4, 1))
    assert together[1] == alone[1]
    assert len({row["answer"] for row in alone[1]}) > 5
    assert together[0]["val/loss"] == pytest.approx(alone[0]["val/loss"], rel=1e-6)


def test_the_loss_is_that_of_full_logits(tiny_model, tokenizer, uneven_rows):
    made = config(uneven_rows, model=str(tiny_model), max_new_tokens=1)
    generator = load_generator(made, CPU)
    report, _ = evaluate_dialogues(made, generator, ALONE)
    total, count = 0.0, 0
    for row in pq.read_table(uneven_rows).to_pylist():
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, row["response"] + "<|im_end|>"))
        with torch.no_grad():
            logits = generator.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        total += F.cross_entropy(logits.double(), torch.tensor(after), reduction="sum").item()
        count += len(after)
    assert report["val/loss"] == pytest.approx(total / count, abs=1e-6)
    assert report["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_conversations_are_refused(tiny_model, tmp_path):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    file = write_parquet(tmp_path / "chat.parquet", [{"messages": messages}])
    config = ValidateConfig(model=str(tiny_model), data=str(file))
    with pytest.raises(UserError, match="contains conversations; it needs prompt and response columns"):
        evaluate_dialogues(config, load_generator(config, CPU), ALONE)


def test_a_loss_that_is_no_number_ends_the_run(tiny_model, uneven_rows):
    made = config(uneven_rows, model=str(tiny_model))
    generator = load_generator(made, CPU)
    generator.model.model.norm.weight.data.fill_(math.nan)
    told = message(evaluate_dialogues, made, generator, ALONE)
    assert told == f"the loss on --data {uneven_rows} is nan; check the model's weights"


@pytest.mark.slow
def test_the_loss_is_what_training_logs_before_its_first_step_and_with_its_adapter(tiny_model, uneven_rows, tmp_path):
    limits = {"max_length": 70, "truncation": "left", "with_thinking": True}
    words = flags(
        model=tiny_model, dtype="float32", train_files=uneven_rows, val_files=uneven_rows, output_dir=tmp_path / "run",
        lora_rank=4, lr=0.05, warmup_ratio=0.0, total_training_steps=1, validate_before_training=True,
        train_batch_size=4, max_tokens_per_micro_batch=150, **limits,
    )  # fmt: skip
    done = run([*start_words("fsdp", 1), *words])
    assert done.status == 0, done.err
    before, after = metrics(tmp_path / "run", "val/loss")
    values = {"model": str(tiny_model), "max_new_tokens": 1, "batch_size": 3} | limits
    report, _ = evaluate(uneven_rows, **values)
    assert report["rows_cut"] > 0
    assert report["val/loss"] == pytest.approx(before["val/loss"], abs=1e-6)
    assert report["val/perplexity"] == pytest.approx(before["val/perplexity"], rel=1e-6)
    trained, _ = evaluate(uneven_rows, adapter=str(tmp_path / "run"), **values)
    assert trained["val/loss"] == pytest.approx(after["val/loss"], abs=1e-6)
    assert abs(after["val/loss"] - before["val/loss"]) > 1e-3


TWO_RANKS = """
import json, sys
from dsft.distributed import runtime
from dsft.distributed.rendezvous import start_process_group
from dsft.config import ValidateConfig
from dsft.validation.dialogues import evaluate_dialogues
from dsft.validation.generation import load_generator

def work():
    config = ValidateConfig(**json.loads(sys.argv[1]))
    world = runtime.World.from_environment()
    device = runtime.pick_device(world)
    start_process_group(device)
    generator = runtime.together(lambda: load_generator(config, device))
    results = evaluate_dialogues(config, generator, world)
    print(json.dumps(results), file=open(f"{sys.argv[2]}.{world.rank}", "w"))

runtime.run_to_exit(work, debug=False)
"""


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_does(tiny_model, uneven_rows, tmp_path):
    (tmp_path / "evaluate.py").write_text(TWO_RANKS, encoding="utf-8")
    values = {"model": str(tiny_model), "max_new_tokens": 12, "batch_size": 2, "episodes": 7}
    made = asdict(config(uneven_rows, **values))
    launcher = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2"]
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = run([*launcher, tmp_path / "evaluate.py", json.dumps(made), tmp_path / "results"], env=env)
    assert done.status == 0, done.err
    report, rows = json.loads((tmp_path / "results.0").read_text(encoding="utf-8"))
    alone_report, alone_rows = evaluate(uneven_rows, **values)
    assert rows == alone_rows
    for key in ("val/loss", "val/perplexity"):
        assert report.pop(key) == pytest.approx(alone_report.pop(key), rel=1e-6)
    assert report == alone_report
