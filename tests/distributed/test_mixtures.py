"""Mixtures of sources: every step is that of a plain loop, on any ranks and backends and after a resume."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from dsft.config import TrainConfig
from dsft.dataset.tokens import load_dataset
from dsft.planning.plan import order_rows
from tests.helpers import flags, metrics, start_words, write_parquet

RATE = 1e-3
RUN = {
    "dtype": "float32", "lora_rank": 0, "lr": RATE, "schedule": "constant", "warmup_ratio": 0, "train_batch_size": 6,
    "total_epochs": 2, "max_tokens_per_micro_batch": 300, "save_steps": 3, "eval_steps": 3, "best_by": "val/loss/chat",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """--train_files and --val_files: dialogues of prompt and response twice, conversations by half."""
    folder = tmp_path_factory.mktemp("mixture")
    words = ["iron", "tin", "lead", "zinc", "gold"]
    rows = []
    for word in words:
        prompt = [{"role": "user", "content": f"Tell me about {word}, {word} alone."}]
        for turn in range(2):
            rows.append({"prompt": prompt, "response": f"{word} is {turn} " * (1 + turn * 3)})
            prompt = [
                *prompt,
                {"role": "assistant", "content": rows[-1]["response"]},
                {"role": "user", "content": "And?"},
            ]
    med = write_parquet(folder / "med.parquet", rows[2:])
    chats = [
        [{"role": "user", "content": f"{i} of {word}?"}, {"role": "assistant", "content": f"{i + 1} {word} " * i}]
        for i, word in enumerate(words * 2, 1)
    ]
    for name, part in (("chat", chats[1:]), ("val", chats[:3])):
        lines = "\n".join(json.dumps({"messages": messages}) for messages in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    val = write_parquet(folder / "val.parquet", rows[:2])
    return {
        "train_files": f"med={med}*2,chat={folder}/chat.jsonl*0.5",
        "val_files": f"med={val},chat={folder}/val.jsonl",
        "on_leak": "ignore",
    }


def loss_sums(model, data, rows, divisor) -> np.ndarray:
    """Summed loss and targets of each source, [2, sources]; its gradient over all targets is added up."""
    found = np.zeros((2, len(data.sources)))
    for row in map(int, rows):
        ids, mask = torch.tensor(data[row][0]).long()[None], torch.tensor(data[row][1])[1:]
        loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1][mask], ids[0, 1:][mask], reduction="sum")
        (loss / divisor).backward()
        found[:, data.source[row]] += loss.item(), mask.sum().item()
    return found


@pytest.fixture(scope="module")
def reference(tiny_model, tokenizer, files) -> tuple[list[dict], list[dict]]:
    """The lines of training and of validation that a plain loop would log: one process, one row at a time."""
    config = TrainConfig(model="", output_dir="", train_files=files["train_files"].split(","), train_batch_size=6)
    data = load_dataset(config.train_files, "train_files", tokenizer, config)
    val = load_dataset(files["val_files"].split(","), "val_files", tokenizer, config)
    batches = order_rows(data, config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    steps, validations = [], []
    for step in range(batches.first_step(2)):
        rows = batches[step]
        found = loss_sums(model, data, rows, int(data.targets[rows].sum()))
        parameters = list(model.parameters())
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters))
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(named("train/loss", data.sources, found) | {"train/grad_norm": norm.item()})
        if (step + 1) % 3 == 0 or step + 1 == batches.first_step(2):
            validations.append(named("val/loss", val.sources, loss_sums(model, val, range(len(val)), 1.0)))
            optimizer.zero_grad()
    return steps, validations


def named(name: str, sources: list[str], found: np.ndarray) -> dict[str, float]:
    means = {
        f"{name}/{source}": loss / targets for source, loss, targets in zip(sources, *found, strict=True) if targets
    }
    return {name: found[0].sum() / found[1].sum()} | means


def same(lines: list[dict], wanted: list[dict], prefixes: tuple[str, ...]) -> bool:
    found = [{key: value for key, value in line.items() if key.startswith(prefixes)} for line in lines]
    return found == [pytest.approx(line, rel=1e-5) for line in wanted]


@pytest.mark.parametrize(
    ("backend", "ranks", "then"),
    [("fsdp", 2, ("zero3", 1)), pytest.param("zero3", 2, ("fsdp", 1), marks=pytest.mark.slow)],
)
def test_a_mixture_is_a_plain_loop_also_after_a_resume(
    commands, backend, ranks, then, tiny_model, files, reference, tmp_path
):
    words = flags(model=tiny_model, output_dir=tmp_path, **RUN, **files)
    first = commands([*start_words(backend, ranks), *words, "--stop_after_steps", "4"])  # within an epoch
    assert first.status == 0, first.err
    assert "med: 8 rows" in first.out
    assert ", 2 times per epoch" in first.out
    second = commands([*start_words(*then), *words])
    assert second.status == 0, second.err
    steps, validations = reference
    assert same(metrics(tmp_path), steps, ("train/loss", "train/grad_norm"))
    assert same(metrics(tmp_path, "val/loss"), validations, ("val/loss",))
    best = min(line["val/loss/chat"] for line in validations)
    state = json.loads((tmp_path / "best" / "trainer_state.json").read_text(encoding="utf-8"))
    assert (state["best_by"], state["best_loss"]) == (
        "val/loss/chat",
        pytest.approx(best),
    )
    assert f"val/loss/chat {state['best_loss']:.6f}" in second.out
    other = commands([*start_words(*then), *words, "--train_files", files["train_files"].replace("*2", "*3")])
    assert other.status == 1
    assert "was trained on other rows than --train_files" in other.err


def test_a_source_that_does_not_validate(commands, tiny_model, files, tmp_path):
    """--val_fraction draws whole dialogues, and this seed none of one source."""
    values = RUN | {"train_files": files["train_files"], "val_fraction": 0.06, "best_by": "val/loss/med"}
    done = commands([*start_words("fsdp", 1), *flags(model=tiny_model, output_dir=tmp_path / "out", **values)])
    assert done.status == 1
    [told] = done.errors
    assert told.endswith("best_by is val/loss/med, but no row of that source validates; raise --val_fraction")
