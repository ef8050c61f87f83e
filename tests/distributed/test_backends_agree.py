"""Both backends, one and two ranks, several micro-batch sizes: the same numbers; and adapters that PEFT reads."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers import ROOT, SAMPLE_TRAIN, flags, metrics, run, start_words

KEYS = ("train/loss", "train/grad_norm", "train/lr", "train/targets", "train/tokens")


def common(tiny_model, **more):
    values = {
        "model": tiny_model, "train_files": SAMPLE_TRAIN, "val_files": SAMPLE_TRAIN, "dtype": "float32",
        "lora_rank": 4, "lr": 1e-3, "train_batch_size": 12, "total_training_steps": 4, "max_train_rows": 31,
        "max_val_rows": 13, "eval_steps": 2,
    }  # fmt: skip
    return flags(**(values | more))


@pytest.mark.slow
def test_compare_script_finds_the_arms_equal(tiny_model, tmp_path):
    table = tmp_path / "table.json"
    words = ["--arms", "fsdp:1:auto,zero3:2:900", "--work_dir", tmp_path, "--json", table]
    done = run([start_words("fsdp", 1)[0], "scripts/compare_backends.py", *words, *common(tiny_model)])
    assert done.status == 0, done.err
    assert "equal: largest relative difference" in done.out
    runs = json.loads(table.read_text())["runs"]
    assert [len(lines) for lines in runs.values()] == [4, 4]
    for lines in zip(*runs.values(), strict=True):
        for key in KEYS:
            assert [line[key] for line in lines] == pytest.approx([lines[0][key]] * 2, rel=1e-5), key
    validations = [[line["val/loss"] for line in metrics(path, "val/loss")] for path in sorted(tmp_path.glob("*-*"))]
    assert len(validations) == 2
    for losses in validations:
        assert losses == pytest.approx(validations[0], rel=1e-5)


@pytest.mark.slow
def test_compare_script_fails_when_arms_differ(tiny_model, tmp_path):
    words = ["--arms", "fsdp:1:auto,fsdp:1:900", "--work_dir", tmp_path, "--tolerance", "-1"]
    one_step = common(tiny_model, total_training_steps=1)
    done = run([start_words("fsdp", 1)[0], "scripts/compare_backends.py", *words, *one_step])
    assert done.status == 1
    assert "DIFFERENT" in done.out


@pytest.mark.slow
def test_an_epoch_uses_every_row_once_in_batches_that_need_not_divide(commands, tiny_model, tmp_path):
    words = common(tiny_model, train_batch_size=12, output_dir=tmp_path / "out")
    words[words.index("--total_training_steps") : words.index("--total_training_steps") + 2] = []
    done = commands([*start_words("fsdp", 1), *words])
    assert done.status == 0, done.err
    lines = metrics(tmp_path / "out")
    assert [line["epoch"] for line in lines] == [round((n + 1) / len(lines), 6) for n in range(len(lines))]
    assert 3 <= len(lines) <= 4  # 31 rows, whole dialogues
    from dsft.config.flags import RowFlags
    from dsft.dataset.tokens import load_dataset
    from dsft.model.source import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    data = load_dataset([str(SAMPLE_TRAIN)], "train_files", tokenizer, RowFlags(), max_rows=31)
    assert sum(line["train/targets"] for line in lines) == data.counts.targets
    assert sum(line["train/tokens"] for line in lines) == data.counts.tokens


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_both_backends_load_with_plain_peft_and_agree(commands, use_dora, tiny_model, tmp_path):
    logits = {}
    for backend, ranks in (("fsdp", 1), ("zero3", 2)):
        out = tmp_path / f"{backend}{ranks}"
        words = common(tiny_model, output_dir=out, use_dora=use_dora, total_training_steps=2)
        done = commands([*start_words(backend, ranks), *words])
        assert done.status == 0, done.err
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(out / "latest")).eval()
        with torch.no_grad():
            logits[backend] = model(input_ids=torch.arange(5, 60)[None]).logits
            with model.disable_adapter():
                plain = model(input_ids=torch.arange(5, 60)[None]).logits
        assert (logits[backend] - plain).abs().max() > 1e-3, "the adapter does nothing"
    torch.testing.assert_close(logits["fsdp"], logits["zero3"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_full_fine_tuning_writes_a_model_that_transformers_loads(commands, backend, tiny_model, tmp_path):
    out = tmp_path / "out"
    done = commands([*start_words(backend, 2), *common(tiny_model, lora_rank=0, output_dir=out, eval_steps=4)])
    assert done.status == 0, done.err
    loaded = AutoModelForCausalLM.from_pretrained(out / "best")
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert all(not torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters(), strict=True))


TWO_STEPS = {"lora_rank": 4, "total_training_steps": 2, "eval_steps": 0}


@pytest.fixture(scope="module")
def two_steps(commands, tiny_model, tmp_path_factory):
    """The output folder of a run on a backend that leaves all settings as they are."""

    @cache
    def run_of(backend: str) -> Path:
        out = tmp_path_factory.mktemp(backend)
        done = commands([*start_words(backend, 1), *common(tiny_model, output_dir=out, **TWO_STEPS)])
        assert done.status == 0, done.err
        assert "layers recompute their activations" not in done.out  # auto: a tiny model fits
        return out

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False},
        {"cpu_offload": True},
        {"attn_implementation": "eager"},
        {"max_tokens_per_micro_batch": 400},
    ],
    ids=lambda changed: "-".join(map(str, *changed.items())),
)
def test_memory_and_attention_settings_leave_the_numbers(commands, backend, changed, two_steps, tiny_model, tmp_path):
    words = common(tiny_model, output_dir=tmp_path, **(TWO_STEPS | changed))
    done = commands([*start_words(backend, 1), *words])
    assert done.status == 0, done.err
    recomputes = "layers recompute their activations" in done.out
    assert recomputes == (changed.get("gradient_checkpointing") is True)
    for ours, theirs in zip(metrics(two_steps(backend)), metrics(tmp_path), strict=True):
        assert theirs["train/loss"] == pytest.approx(ours["train/loss"], rel=1e-5)
        assert theirs["train/grad_norm"] == pytest.approx(ours["train/grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "lora_rank"), [("fsdp", 4), ("zero3", 4), ("fsdp", 0)])
def test_bfloat16_compute_keeps_float32_weights_and_moments(commands, backend, lora_rank, tiny_model, tmp_path):
    from safetensors import safe_open

    few = {"train_batch_size": 2, "total_training_steps": 2, "eval_steps": 0}  # slow where bfloat16 is emulated
    words = common(tiny_model, dtype="bfloat16", lora_rank=lora_rank, output_dir=tmp_path, **few)
    done = commands([*start_words(backend, 2), *words])
    assert done.status == 0, done.err
    weights = "adapter_model" if lora_rank else "model"
    for stem in (weights, "optimizer"):
        with safe_open(tmp_path / "latest" / f"{stem}.safetensors", framework="pt") as handle:
            tensors = [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in tensors), "moments were rounded to bfloat16"


@pytest.mark.slow
def test_fsdp_works_where_deepspeed_cannot_be_imported(tiny_model, tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('deepspeed is broken here')")
    words = common(tiny_model, total_training_steps=1, eval_steps=0, output_dir=tmp_path / "out")
    done = run([*start_words("fsdp", 1), *words], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.status == 0, done.err
    done = run([*start_words("zero3", 1), *words], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.status == 1
    assert any("deepspeed is broken here" in line for line in done.errors)
