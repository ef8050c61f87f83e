"""What a run needs, and what is said where it does not fit."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.config import PreviewConfig, TrainConfig
from dsft.errors import UserError
from dsft.planning.out_of_memory import out_of_memory, refuse
from dsft.planning.plan import Needs, backend_options, choose_sharding, order_rows, plan_run
from dsft.planning.prediction import ProcessMemory
from dsft.previewing.preview import few_tokens_finding, needs_findings
from dsft.previewing.statistics import Batches
from tests.helpers import message, token_dataset

GIB = 2**30


def needs(available: float, *, remedies=("--dtype bfloat16",), **changes) -> Needs:
    """Of a run whose peak is 3 GiB by prediction."""
    values = {
        "computes": "fsdp in float32 on cpu", "memory": SimpleNamespace(peak=3.0 * GIB, parts=dict),
        "available": available * GIB, "remedies": list(remedies), "fold_ratio": 1.0, "step_flops": 1.0,
        "step_seconds": 1.0,
        "steps_per_epoch": 4, "total_steps": 8,
    }  # fmt: skip
    return Needs(**values | changes)


def test_a_run_is_refused_only_beyond_the_error_of_the_prediction():
    refuse(needs(0.63 * 3))
    with pytest.raises(UserError, match="; try --dtype bfloat16"):
        refuse(needs(0.62 * 3))
    assert (needs(2.99).fits, needs(3.01).fits) == (False, True)


def test_memory_that_runs_out_becomes_one_line():
    config = TrainConfig(model="m", train_files=["t"], output_dir="out", lora_rank=0)

    def work(remedies: list[str]) -> None:
        with out_of_memory(config, lambda: remedies):
            torch.empty(2**60)

    line = message(work, [])
    assert line.startswith("out of memory (")
    assert "--max_tokens_per_micro_batch" in line
    assert "--lora_rank 16" in line
    assert message(work, ["4 ranks"]).endswith("; try 4 ranks")
    with pytest.raises(ZeroDivisionError), out_of_memory(config, list):
        raise ZeroDivisionError


def test_a_preview_names_what_will_not_fit(tmp_path):
    config = PreviewConfig(model="m", train_files=["t"], output_dir=str(tmp_path / "not" / "yet"), save_steps=1)
    enormous = shutil.disk_usage(tmp_path).free // 12 + 1
    memory, disk = needs_findings(needs(2.0), enormous, config)
    assert (memory.kind, memory.name) == ("warning", "memory")
    assert memory.text == ("a rank needs 3.00 GiB by prediction, and 2.00 GiB are available; try --dtype bfloat16")
    assert (disk.kind, disk.name) == ("warning", "disk")
    assert f"{tmp_path} has" in disk.text
    assert not (tmp_path / "not").exists()
    assert needs_findings(needs(4.0), 100, config) == []
    without = PreviewConfig(model="m", train_files=["t"], save_steps=1)
    assert needs_findings(needs(4.0), enormous, without) == []


def test_needs_in_words_and_in_json():
    run = needs(11.57)
    assert run.memory_text() == "3.00 GiB per rank predicted (), 11.57 GiB available"
    assert run.time_text() == "1.0 s per step predicted, 4.0 s per epoch, 8.0 s for 8 steps"
    assert run.time_text(1).endswith("1.0 s for 1 step")
    assert run.as_dict()["seconds"] == 8


@pytest.fixture(scope="module")
def shapes():
    """0.3 B parameters that are nowhere."""
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def chosen(shapes, available: float, ranks: int = 8, node: int = 4, **flags):
    """Sharding, reason and predicted bytes where so many GiB are available."""
    values = {"max_tokens_per_micro_batch": 64, "gradient_checkpointing": False, "dtype": "bfloat16"} | flags
    config = TrainConfig(model="m", train_files=["t"], output_dir="out", **values)
    data = token_dataset([(range(20), [False] * 10 + [True] * 10)] * 4)
    options = backend_options(config, torch.device("cuda"), torch.bfloat16, ranks=ranks, ranks_per_node=node)
    memory, batches = ProcessMemory(0.0, 0.0, available * GIB), order_rows(data, config)
    plan, needs = choose_sharding(config, shapes, options, memory, data, batches, 20, 1e12)
    return plan.sharding, plan.sharding_reason, needs.memory.peak / GIB


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_auto_is_the_first_sharding_that_fits(shapes, backend, tmp_path):
    buckets = ("stage3_max_live_parameters", "stage3_prefetch_bucket_size", "reduce_bucket_size")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": dict.fromkeys(buckets, 10**6)}))
    values = {"backend": backend} | ({"ds_config": str(tmp_path / "ds.json")} if backend == "zero3" else {})
    peaks = {name: chosen(shapes, 99, sharding=name, **values) for name in ("trainable", "hybrid", "full")}
    assert [(name, reason) for name, reason, _ in peaks.values()] == [(name, "") for name in peaks]
    trainable, hybrid, full = (peak for _, _, peak in peaks.values())
    found = chosen(shapes, trainable / 0.89, **values)
    assert found == ("trainable", "the frozen base fits on each rank", trainable)
    assert full < hybrid < trainable, peaks
    name, reason, _ = chosen(shapes, hybrid / 0.89, **values)
    assert (name, reason) == ("hybrid", "the model fits on the ranks of a node")
    name, reason, _ = chosen(shapes, full, **values)
    assert name == "full"
    assert reason == f"trainable would take {trainable:.2f} GiB per rank; hybrid would take {hybrid:.2f} GiB per rank"


def test_auto_leaves_memory_for_activations(shapes):
    """With 3 GiB a frozen base that is whole on each rank would leave less than 4,096 tokens."""
    found = chosen(shapes, 3, max_tokens_per_micro_batch=None)
    assert found[0] == "full"
    assert "trainable would leave too little memory for activations" in found[1]
    assert chosen(shapes, 5, max_tokens_per_micro_batch=None)[0] == "trainable"


def test_sharding_follows_what_is_trained_nodes_and_offload(shapes):
    assert chosen(shapes, 99, lora_rank=0)[0] == "hybrid"
    assert chosen(shapes, 99, lora_rank=0, node=8)[:2] == ("full", "")
    assert chosen(shapes, 99, lora_rank=0, sharding="trainable")[0] == "full"
    assert chosen(shapes, 99, sharding="hybrid", node=1)[0] == "trainable"
    assert chosen(shapes, 99, sharding="hybrid", node=8)[0] == "full"
    assert chosen(shapes, 99, cpu_offload=True)[0] == "full"
    assert chosen(shapes, 99, ranks=1, node=1)[0] == "trainable"


def test_auto_does_not_trade_larger_micro_batches_for_whole_weights(shapes):
    tight = {"max_tokens_per_micro_batch": None}
    trainable = chosen(shapes, 99, sharding="trainable", **tight)[2]
    assert chosen(shapes, trainable, **tight)[0] != "trainable"


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_on_a_gpu_layers_recompute_only_where_activations_would_not_fit(backend):
    """A 7 B model and rows of 6,784 tokens: none of the layers with 80 GiB, most with 24 GiB, all with 16."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    flags = TrainConfig(model="m", train_files=["t"], output_dir="out", backend=backend, lora_rank=64)
    options = backend_options(flags, torch.device("cuda"), torch.bfloat16, ranks=8, ranks_per_node=8)
    plans = [plan_run(flags, model, options, ProcessMemory(0.0, 0.0, size * GIB), 6784) for size in (80, 24, 10)]
    assert plans[0].checkpointed_layers == 0
    assert 14 < plans[1].checkpointed_layers < 28
    assert plans[2].checkpointed_layers == 28
    assert all(plan.micro_batches.token_budget >= 6784 for plan in plans)


def test_gpus_with_too_few_tokens_are_named():
    batches = Batches(5, 5, 128.0, 80_000.0, 9_000.0, 16, 1.0, 300.0, 0.1, 4096, 5)
    [finding] = few_tokens_finding(batches, torch.device("cuda"))
    assert finding.text == (
        "each GPU computes 300 tokens per step, too few to be busy; --train_batch_size 437 would give it 1,024; "
        "or use fewer GPUs"
    )
    assert few_tokens_finding(replace(batches, computed_per_rank=1024), torch.device("cuda")) == []
    assert few_tokens_finding(batches, torch.device("cpu")) == []
