"""dsft's gradients against a plain one-process PyTorch loop that uses nothing of the Trainer."""

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import flags, metrics, seeded_tensor

LONGEST = 115  # tokens of the longest row
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def reference(folder, rows_file, tokenizer, lora_rank):
    """Gradient of the token-mean loss over all rows, one row at a time, full logits, targets by slicing."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora_rank:
        model = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=32, target_modules=TARGETS))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = seeded_tensor(name, parameter.shape)
    losses, targets = [], 0
    for row in pq.read_table(rows_file).to_pylist():
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        predicting = logits[len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(predicting, torch.tensor(answer), reduction="sum"))
        targets += len(answer)
    loss = sum(losses) / targets
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values()))
    return loss.item(), norm.item(), gradients


@pytest.mark.parametrize(
    ("backend", "sharding", "nodes", "ranks", "tokens", "lora_rank"),
    [
        ("fsdp", "full", 1, 2, LONGEST, 4),
        ("zero3", "trainable", 1, 2, LONGEST, 4),
        *(
            pytest.param(*arm, marks=pytest.mark.slow)
            for arm in [
                ("fsdp", "trainable", 1, 2, LONGEST, 4),
                ("zero3", "full", 1, 2, LONGEST, 4),
                ("fsdp", "full", 1, 2, LONGEST, 0),
                ("zero3", "full", 1, 2, LONGEST, 0),
                ("fsdp", "trainable", 1, 1, 2000, 4),
                ("zero3", "full", 1, 1, 300, 0),
                ("fsdp", "full", 1, 3, 300, 0),
                ("zero3", "trainable", 1, 3, 200, 4),
                ("fsdp", "hybrid", 2, 4, LONGEST, 4),
                ("fsdp", "hybrid", 2, 4, LONGEST, 0),
                ("zero3", "hybrid", 2, 4, LONGEST, 4),
                ("zero3", "hybrid", 2, 4, LONGEST, 0),
            ]
        ),
    ],
)
def test_gradients_equal_a_plain_loop(
    backend, sharding, nodes, ranks, tokens, lora_rank, commands, tiny_model, uneven_rows, tokenizer, tmp_path
):
    loss, norm, expected = reference(tiny_model, uneven_rows, tokenizer, lora_rank)
    out = tmp_path / "gradients.safetensors"
    words = flags(
        backend=backend, sharding=sharding, model=tiny_model, train_files=uneven_rows, output_dir=tmp_path / "out",
        dtype="float32", lora_rank=lora_rank, lora_alpha=32, train_batch_size=10, max_tokens_per_micro_batch=tokens,
        clip_grad=0, schedule="constant", warmup_ratio=0,
    )  # fmt: skip
    done = commands.run("tests.distributed.gradient_worker", [out, *words], ranks=ranks, nodes=nodes)
    assert done.status == 0, done.err

    (line,) = metrics(tmp_path / "out")
    assert line["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert line["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    found = load_file(out)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max().item()
        assert difference <= 1e-5 * gradient.abs().max().item(), name
