"""Folded training against a plain loop that runs every row by itself: the same losses and norms, step by step."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from dsft.config.flags import RowFlags
from dsft.dataset.batches import GlobalBatches
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions
from dsft.dataset.tokens import TokenDataset, load_dataset
from dsft.model.flops import Cost
from dsft.planning.activations import MOST_TOKENS
from tests.helpers import MEDICAL, SAMPLE_TRAIN, flags, metrics, start_words, write_parquet

STEPS, ROWS_A_STEP, RATE = 5, 6, 1e-4
MARKED = "<|im_end|>\n<|im_start|>assistant\n"  # a string with the template's marks is taken as it is


def without_thinking(messages: list[dict]) -> list[dict]:
    """The history as models get it whose template leaves out earlier thinking."""
    return [
        turn | {"content": re.sub(r"<think>.*?</think>\s*", "", turn["content"], flags=re.DOTALL)}
        if turn["role"] == "assistant"
        else turn
        for turn in messages
    ]


def row_set(name: str) -> list[dict]:
    rows = [{k: row[k] for k in ("prompt", "response")} for row in pq.read_table(SAMPLE_TRAIN).to_pylist()[:14]]
    words = ["alpha", "beta", "gamma", "delta", "rho", "zeta", "eta", "theta", "iota", "kappa", "tau", "phi"]
    if name == "chains":
        return rows
    if name == "trees":
        return [row | {"prompt": without_thinking(row["prompt"])} for row in rows]
    if name == "alone":
        return [{"prompt": f"{w} {w * i}{MARKED}", "response": f"{w} is {i}"} for i, w in enumerate(words)]
    if name == "duplicates":
        return [rows[i] for i in (0, 3, 0, 5, 3, 0, 5, 0, 7)]
    assert name == "answers"
    return [rows[4] | {"response": f"{w} and {words[i % 3]} and {w}"} for i, w in enumerate(words)]


@pytest.fixture(scope="module")
def tokenized(tokenizer, tmp_path_factory):
    """The parquet file of a row set, and its rows as tokens."""
    made: dict[str, tuple[Path, TokenDataset]] = {}

    def get(name: str) -> tuple[Path, TokenDataset]:
        if name not in made:
            file = write_parquet(tmp_path_factory.mktemp("rows") / f"{name}.parquet", row_set(name))
            made[name] = file, load_dataset([str(file)], "train_files", tokenizer, RowFlags())
        return made[name]

    return get


@pytest.fixture(scope="module")
def reference(tiny_model, tokenized):
    """(loss, norm) of each step of a plain loop over the same global batches: one process, one row at a time."""
    made: dict[str, list[tuple[float, float]]] = {}

    def get(name: str) -> list[tuple[float, float]]:
        if name in made:
            return made[name]
        data = tokenized(name)[1]
        batches = GlobalBatches(data.dialogue, data.sorted_place, ROWS_A_STEP, seed=1)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
        made[name] = []
        for step in range(STEPS):
            rows = [data[row] for row in batches[step]]
            targets = sum(int(is_target.sum()) for _, is_target in rows)
            total = 0.0
            for tokens, is_target in rows:
                ids, mask = torch.tensor(tokens).long()[None], torch.tensor(is_target)[1:]
                logits = model(input_ids=ids).logits[0, :-1][mask]
                loss = F.cross_entropy(logits, ids[0, 1:][mask], reduction="sum") / targets
                loss.backward()
                total += loss.item()
            norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters()))
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
            optimizer.step()
            optimizer.zero_grad()
            made[name].append((total, norm.item()))
        return made[name]

    return get


def trained(commands, backend, ranks, model, file, out, **more) -> list[dict]:
    usual = {
        "model": model, "train_files": file, "output_dir": out, "dtype": "float32", "lora_rank": 0, "lr": RATE,
        "schedule": "constant", "warmup_ratio": 0, "train_batch_size": ROWS_A_STEP, "total_training_steps": STEPS,
        "save_steps": 0,
    }  # fmt: skip
    words = flags(**(usual | more))
    done = commands([*start_words(backend, ranks), *words])
    assert done.status == 0, done.err
    return metrics(out)


NAMES = ("chains", "trees", "alone", "duplicates", "answers")
ARMS = [("fsdp", 1), ("fsdp", 2), ("zero3", 1), ("zero3", 2)]
FAST = {("trees", "fsdp", 2, True)}
MATRIX = [
    pytest.param(name, *arm, small, marks=() if (name, *arm, small) in FAST else pytest.mark.slow)
    for small in (True, False)
    for name in (NAMES if small else ("trees",))
    for arm in (ARMS if name == "trees" else ARMS[1::2])
]


@pytest.mark.parametrize(("name", "backend", "ranks", "small"), MATRIX)
def test_every_step_is_that_of_a_plain_loop(
    commands, name, backend, ranks, small, tiny_model, tokenized, reference, tmp_path
):
    file, data = tokenized(name)
    longest = int(data.lengths.max())
    tokens = longest if small else 100 * longest  # several micro-batches, or one
    lines = trained(commands, backend, ranks, tiny_model, file, tmp_path / "out", max_tokens_per_micro_batch=tokens)
    found = [(line["train/loss"], line["train/grad_norm"]) for line in lines]
    assert np.array(found) == pytest.approx(np.array(reference(name)), rel=1e-5)
    if not small and ranks == 1:
        batches = GlobalBatches(data.dialogue, data.sorted_place, ROWS_A_STEP, seed=1)
        everything = MicroBatches(data, MicroBatchOptions(1, tokens, True, True), Cost(1, 0, 0), 0)
        plans = [everything.plan(batches[step]) for step in range(STEPS)]
        assert [line["train/fold_ratio"] for line in lines] == [p.row_tokens / p.tokens for p in plans]
        assert all(line["train/fold_ratio"] > 1.5 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend", "ranks"), [("chains", "fsdp", 2), ("trees", "zero3", 2)])
def test_a_model_that_follows_no_tree_folds_chains(
    commands, name, backend, ranks, tiny_model, tokenized, reference, tmp_path
):
    file, data = tokenized(name)
    tokens = int(data.lengths.max()) * 2
    more = {"max_tokens_per_micro_batch": tokens, "attn_implementation": "eager"}
    lines = trained(commands, backend, ranks, tiny_model, file, tmp_path / "out", **more)
    found = [(line["train/loss"], line["train/grad_norm"]) for line in lines]
    assert np.array(found) == pytest.approx(np.array(reference(name)), rel=1e-5)
    assert all((line["train/fold_ratio"] > 1.5) == (name == "chains") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("fsdp", 2), ("zero3", 1)])
def test_folding_and_not_folding_agree_where_a_batch_holds_all_rows(
    commands, backend, ranks, tiny_model, tokenized, tmp_path
):
    file, data = tokenized("trees")
    more = {"train_batch_size": len(data), "max_tokens_per_micro_batch": 900}
    on, off = (
        trained(commands, backend, ranks, tiny_model, file, tmp_path / fold, fold=fold, **more)
        for fold in ("batch", "off")
    )
    assert all(line["train/fold_ratio"] == 1.0 for line in off)
    assert all(line["train/fold_ratio"] > 1.5 for line in on)
    for key in ("train/loss", "train/grad_norm", "train/targets", "train/tokens", "epoch"):
        assert [line[key] for line in on] == pytest.approx([line[key] for line in off], rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_bfloat16_gradients_are_added_up_in_float32(commands, backend, tiny_model, tokenized, tmp_path):
    """16 times a sixteenth is the whole exactly, unless the sum is rounded to bfloat16 on its way."""
    data = tokenized("chains")[1]
    file = write_parquet(tmp_path / "rows.parquet", [row_set("chains")[0]] * 16)
    more = {"train_batch_size": 16, "total_training_steps": 1, "dtype": "bfloat16", "lora_rank": 4}
    tokens = {"batch": int(data.lengths.max()), "off": len(data[0][0])}
    once, often = (
        trained(
            commands,
            backend,
            1,
            tiny_model,
            file,
            tmp_path / fold,
            fold=fold,
            max_tokens_per_micro_batch=tokens[fold],
            **more,
        )[0]["train/grad_norm"]
        for fold in ("batch", "off")
    )
    assert often == pytest.approx(once, rel=1e-4)


# Conversations, each answer given what its template renders before it

THINKING_STRIPPED = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def thinking_conversations() -> list[dict]:
    """Of one to five turns, with weights: 1, 0.25, 0 and 3 among them, and of whole rows."""
    rows = []
    for number, turns in enumerate((1, 5, 2, 3, 4)):
        messages = []
        for turn in range(turns):
            thought = f"{number} and {turn} " * (turn + 1)
            messages.append({"role": "user", "content": f"Question {turn} of {number}? " * (1 + number)})
            messages.append({"role": "assistant", "content": f"Answer {turn}", "reasoning_content": thought})
            messages[-1]["weight"] = (1, 0.25, 1, 0, 3)[turn]
        rows.append({"messages": messages, "importance": 1 + number % 2})
    return rows


def plain_loss(tiny_model, tokenizer) -> tuple[float, float]:
    """The weighted mean over the answers, each computed by itself, and the norm of its gradient."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    losses, weights = [], 0.0
    for row in thinking_conversations():
        for index in range(1, len(row["messages"]), 2):
            texts = [
                tokenizer.apply_chat_template(
                    row["messages"][: index + more],
                    chat_template=THINKING_STRIPPED,
                    tokenize=False,
                    add_generation_prompt=not more,
                )
                for more in (0, 1)
            ]
            answer_text = texts[1].removeprefix(texts[0]).removesuffix("\n")
            assert answer_text.startswith("<think>")
            prompt, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (texts[0], answer_text))
            predicting = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            weight = row["messages"][index]["weight"] * row["importance"]
            losses.append(weight * F.cross_entropy(predicting, torch.tensor(answer), reduction="sum"))
            weights += weight * len(answer)
    loss = sum(losses) / weights
    loss.backward()
    return loss.item(), torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters())).item()


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [("zero3", 2), *(pytest.param(*arm, marks=pytest.mark.slow) for arm in (("fsdp", 1), ("fsdp", 2), ("zero3", 1)))],
)
def test_weighted_answers_of_conversations_are_those_of_single_rows(
    commands, backend, ranks, tiny_model, tokenizer, tmp_path
):
    loss, norm = plain_loss(tiny_model, tokenizer)
    file = write_parquet(tmp_path / "rows.parquet", thinking_conversations())
    template = tmp_path / "template.jinja"
    template.write_text(THINKING_STRIPPED, encoding="utf-8")
    more = {"messages_key": "messages", "weight_key": "importance", "chat_template": template}
    more |= {"train_batch_size": 100, "total_training_steps": 1, "max_tokens_per_micro_batch": 400}
    for fold in ("batch", "off"):
        [line] = trained(commands, backend, ranks, tiny_model, file, tmp_path / fold, fold=fold, **more)
        assert (line["train/loss"], line["train/grad_norm"]) == pytest.approx((loss, norm), rel=1e-5)
        assert (line["train/fold_ratio"] > 1.4) == (fold == "batch")
        saved = tmp_path / fold / "latest" / "chat_template.jinja"
        assert saved.read_text(encoding="utf-8") == THINKING_STRIPPED


# What folding saves on the real set


def mean_fold_ratio(data: TokenDataset, ranks: int, tokens: int, trees: bool) -> float:
    """Over one epoch of 128 rows a batch."""
    layout = MicroBatchOptions(ranks, max(tokens, int(data.lengths.max())), True, trees)
    batches = GlobalBatches(data.dialogue, data.sorted_place, 128, seed=1)
    micro_batches = MicroBatches(data, layout, Cost(2e8, 2e5, 6e7), 0)
    assert sum(len(rows) for rows in batches.epoch(0)) == len(data)
    plans = [micro_batches.plan(rows) for rows in batches.epoch(0)]
    return float(np.mean([plan.row_tokens / plan.tokens for plan in plans]))


@pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is not here")
@pytest.mark.parametrize(
    ("stripped", "least"),
    [(False, {"chains": 3.9, "trees": 5.3, "two ranks": 5.0}), (True, {"chains": 1.0, "trees": 3.9, "two ranks": 3.7})],
    ids=["thinking kept", "thinking stripped"],
)
def test_the_medical_set_folds(stripped, least, tokenizer, tmp_path, capsys):
    """On one rank with a GPU's micro-batches, and trees on two with those of a CPU, where cuts cost something."""
    rows = [{k: row[k] for k in ("prompt", "response")} for row in pq.read_table(MEDICAL).to_pylist()]
    if stripped:
        rows = [row | {"prompt": without_thinking(row["prompt"])} for row in rows]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    data = load_dataset([str(file)], "train_files", tokenizer, RowFlags())
    found = {
        "chains": mean_fold_ratio(data, 1, MOST_TOKENS["cuda"], False),
        "trees": mean_fold_ratio(data, 1, MOST_TOKENS["cuda"], True),
        "two ranks": mean_fold_ratio(data, 2, MOST_TOKENS["cpu"], True),
    }
    with capsys.disabled():
        kept = "stripped from" if stripped else "kept in"
        print(f"\n{len(data)} rows, thinking {kept} the history: {found}")
    assert all(found[name] >= least[name] for name in least)
