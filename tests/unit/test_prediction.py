"""Predicted memory: parts computed by hand, allocations noted in order, flags that lower the peak."""

import gc
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.backends import backend_class
from dsft.backends.base import BackendOptions, HeldMemory
from dsft.model.lora import LoraOptions
from dsft.planning.disk import checkpoints_kept
from dsft.planning.out_of_memory import is_out_of_memory
from dsft.planning.prediction import (
    FIRST_PASS,
    HEAP_SPREAD,
    Prediction,
    ProcessMemory,
    Setting,
    predict,
    remedies,
    seconds_of,
    shapes,
)
from dsft.planning.trace import AllocationTrace, chains
from dsft.processes import COMPACT_HEAP

CPU = torch.device("cpu")
NO_PROCESS = ProcessMemory(0.0, 0.0)
LORA = LoraOptions(2, 4.0, 0.0, ["all-linear"], False, False)
# Embedding and tied head 100 x 8. A layer: q and o 8 x 8, k and v 8 x 4, three of 8 x 16, two norms: 592. A norm of 8.
LAYER, ROOT = 592, 808
WHOLE = 2 * LAYER + ROOT
# LoRA of rank 2 on those seven: 2 x (16 + 12 + 12 + 16 + 24 + 24 + 24) a layer.
ADAPTER = 256


@pytest.fixture(scope="module")
def bare():
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def setting(backend: str = "fsdp", dtype: torch.dtype = torch.float32, lora=LORA, **more) -> Setting:
    options = BackendOptions(
        device=CPU, dtype=dtype, trains_base=lora is None, clip_grad=1.0, train_batch_size=8, **more
    )
    return Setting(backend, options, lora)


def held(bare, chosen: Setting) -> HeldMemory:
    return backend_class(chosen.backend).memory(shapes(bare, chosen), chosen.options)


def test_fsdp_holds_shards_of_float32_masters_and_gathers_one_layer_and_the_root(bare):
    memory = held(bare, setting(lora=None))
    assert (memory.weights, memory.masters) == (4 * WHOLE, 0)
    assert (memory.gradients, memory.moments) == (4 * WHOLE, 8 * WHOLE)
    assert memory.gathered == LAYER * (4 + 8) + ROOT * (4 + 8)
    assert memory.step == 8 * 800
    assert memory.lasting == 16 * WHOLE


def test_fsdp_shards_a_frozen_bfloat16_base_and_float32_lora_over_two_ranks(bare):
    memory = held(bare, setting(dtype=torch.bfloat16, ranks=2))
    trained = 2 * ADAPTER
    assert memory.weights == (2 * WHOLE + 4 * trained) / 2
    assert (memory.gradients, memory.moments) == (4 * trained / 2, 8 * trained / 2)
    assert memory.gathered == 2 * (LAYER + ADAPTER) + ADAPTER * (2 + 4) + 2 * ROOT


def test_fsdp_keeps_a_frozen_base_whole_and_gathers_only_what_is_trained(bare):
    memory = held(bare, setting(dtype=torch.bfloat16, ranks=4, sharding="trainable"))
    trained = 2 * ADAPTER
    assert memory.weights == 2 * WHOLE + 4 * trained / 4
    assert (memory.gradients, memory.moments) == (4 * trained / 4, 8 * trained / 4)
    assert memory.gathered == trained * (2 + 4)


def test_fsdp_shards_over_the_ranks_of_a_node(bare):
    memory = held(bare, setting(dtype=torch.bfloat16, ranks=4, ranks_per_node=2, sharding="hybrid"))
    assert memory == held(bare, setting(dtype=torch.bfloat16, ranks=2))


@pytest.mark.parametrize(
    ("backend", "sharding", "gathers", "reduces", "repeats"),
    [
        ("fsdp", "full", 2 * (WHOLE + 2 * ADAPTER), 1, 3),
        ("fsdp", "trainable", 2 * ADAPTER, 1, 1),
        ("fsdp", "hybrid", 0, 2, 1),  # to all
        ("zero3", "full", 2 * (WHOLE + 2 * ADAPTER), 1, 3),
        ("zero3", "trainable", 2 * 2 * ADAPTER, 1, 3),
        ("zero3", "hybrid", 2 * ADAPTER, 1, 3),
    ],
)
def test_what_a_node_receives_in_a_step_of_three_micro_batches(bare, backend, sharding, gathers, reduces, repeats):
    chosen = setting(backend, torch.bfloat16, ranks=8, ranks_per_node=2, sharding=sharding)
    received = backend_class(backend).traffic(shapes(bare, chosen), chosen.options, 3)
    assert received == 0.75 * repeats * (2 * gathers + 4 * reduces * 2 * ADAPTER)
    alone = setting(backend, torch.bfloat16, ranks=8, ranks_per_node=8, sharding="full")
    assert backend_class(backend).traffic(shapes(bare, alone), alone.options, 3) == 0


def test_zero3_is_not_shown_a_frozen_base_that_is_whole(bare):
    memory = held(bare, setting("zero3", torch.bfloat16, ranks=4, sharding="trainable"))
    trained = 2 * ADAPTER
    assert memory.weights == 2 * (WHOLE + trained / 4 + trained)  # a partition, and whole between steps
    assert memory.masters == 4 * trained / 4
    assert memory.gathered == 2 * (2 * trained + 2 * 16) + 4 * trained


def test_zero3_has_a_second_partition_over_the_ranks_of_a_node(bare, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    options = {"config_file": str(path), "ranks": 4, "ranks_per_node": 2}
    assert held(bare, setting("zero3", torch.bfloat16, lora=None, sharding="hybrid", **options)).weights == (
        2 * WHOLE / 4 + 2 * WHOLE / 2
    )


def test_zero3_holds_compute_partitions_beside_float32_masters(bare):
    memory = held(bare, setting("zero3", torch.bfloat16, lora=None))
    assert (memory.weights, memory.masters) == (2 * WHOLE, 4 * WHOLE)
    assert (memory.gradients, memory.moments) == (4 * WHOLE + 4 * WHOLE, 8 * WHOLE)
    assert memory.gathered == 2 * 800 + 4 * WHOLE  # a gradient of the largest parameter, and the copied bucket
    assert memory.step == 12 * WHOLE
    assert memory.loading == 2 * max(LAYER, ROOT)


def test_zero3_fetches_parameters_ahead_on_several_ranks(bare):
    memory = held(bare, setting("zero3", torch.bfloat16, ranks=2))
    everything, trained = WHOLE + 2 * ADAPTER, 2 * ADAPTER
    assert memory.weights == 2 * everything / 2 + 2 * everything  # all are below the persistence threshold
    assert memory.masters == 4 * trained / 2
    assert memory.gathered == 2 * (2 * everything + 2 * 16) + 4 * trained


def test_zero3_fetches_two_decoder_layers_ahead(bare, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage3_prefetch_bucket_size": 1}}')
    options = {"config_file": str(path), "ranks": 2}
    memory = held(bare, setting("zero3", torch.bfloat16, lora=None, **options))
    assert memory.gathered == 2 * (2 * LAYER + 1 + 1 + 800 + 800) + 4 * WHOLE


def test_zero3_follows_the_settings_of_ds_config(bare, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 300,'
        ' "stage3_prefetch_bucket_size": 100, "reduce_bucket_size": 900, "sub_group_size": 400}}'
    )
    chosen = setting("zero3", torch.bfloat16, lora=None, ranks=2)
    memory = held(bare, replace(chosen, options=replace(chosen.options, config_file=str(path))))
    assert memory.weights == 2 * WHOLE / 2
    assert memory.gathered == 2 * (300 + 100 + 100 + 800 + 800) + 4 * 900
    assert memory.gradients == 4 * WHOLE / 2 + 4 * 900
    assert memory.step == 12 * 400


def test_the_peak_is_the_largest_of_loading_computing_and_stepping():
    state = HeldMemory(weights=10, masters=0, gradients=20, moments=40, gathered=5, step=3, loading=100)
    process = ProcessMemory(1000, 1050)
    prediction = Prediction(process, state, activations=7, heap=6, copied=0, tokens=1, traced=True)
    assert prediction.before_first_step == 1000 + 10 + 100
    assert prediction.peak == 1000 + 110
    assert prediction.parts()["activations"] == 7
    assert replace(prediction, traced=False).parts()["activations by a formula"] == 7
    tokenized = replace(prediction, process=ProcessMemory(1000, 3000))
    assert (tokenized.before_first_step, tokenized.peak) == (3000, 3000)
    longer = replace(prediction, activations=700)
    assert longer.before_first_step == 1000 + 30 + 5 + 700
    assert longer.peak == 1000 + 70 + 5 + 700
    assert sum(longer.parts().values()) == longer.peak
    stepping = replace(prediction, held=replace(state, step=500), copied=6)
    assert stepping.peak == 1000 + 70 + 500 + 6 + 6


def test_allocations_are_counted_from_their_beginning_to_their_end():
    present = torch.ones(8, device="meta")
    trace = AllocationTrace([present], threshold=32)
    with trace:
        first = present * 2
        second = first.view(2, 4) + 1  # a view takes nothing
        del first
        gc.collect()
        third = second.to(torch.bfloat16)
        present.add_(1)
    assert trace.peaks == [16, 64]
    del second, third


def test_the_heap_of_a_process_is_larger_than_its_tensors_and_a_gpu_has_none(bare):
    chosen, batch = setting(), chains([500], 4)
    on_cpu = predict(bare, chosen, batch, process=NO_PROCESS)
    on_gpu = replace(chosen, options=replace(chosen.options, device=torch.device("cuda")))
    gpu = predict(bare, on_gpu, batch, process=NO_PROCESS)
    assert (on_cpu.heap, gpu.heap) == (on_cpu.activations, 0)  # no tensor of this model is large
    assert on_cpu.activations == pytest.approx(HEAP_SPREAD * gpu.activations, rel=0.05)
    assert (on_cpu.process.now, gpu.process.now) == (FIRST_PASS, 0)


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="a setting of glibc's, for CPU")
def test_a_command_restarts_itself_once_for_a_compact_heap(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, dsft.processes as processes\nprint('started', *sys.argv[1:], flush=True)\n"
        "processes.restart_with_compact_heap()\nprint(os.environ['GLIBC_TUNABLES'])\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for env, starts, setting in ((plain, 2, COMPACT_HEAP), (plain | {"GLIBC_TUNABLES": "own"}, 1, "own")):
        words = [sys.executable, script, "a b"]
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.splitlines() == ["started a b"] * starts + [setting]


def test_more_tokens_take_more_and_recomputing_takes_less():
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    short, long = (predict(bare, setting(), chains([size], 4), process=NO_PROCESS) for size in (2000, 8000))
    assert short.traced is long.traced is True
    assert 2.5 < long.activations / short.activations < 6
    recomputed = predict(bare, replace(setting(), checkpointed_layers=8), chains([8000], 4), process=NO_PROCESS)
    assert recomputed.activations < 0.7 * long.activations
    assert recomputed.held == long.held


def test_the_logits_of_many_targets_are_never_there_at_once():
    config = AutoConfig.for_model(
        "llama", vocab_size=2**15, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        wide = AutoModelForCausalLM.from_config(config)
    few, many = (predict(wide, setting(), chains([6000], count), process=NO_PROCESS) for count in (2048, 5000))
    assert many.activations < 1.2 * few.activations


def test_a_state_that_is_copied_counts(bare):
    copied = predict(bare, replace(setting(), copies_state=True), chains([50], 4), process=NO_PROCESS)
    assert copied.copied == 12 * 2 * ADAPTER


@pytest.fixture(scope="module")
def too_large(bare):
    chosen = setting(lora=None)
    return predict(bare, chosen, chains([3000, 3000], 4), process=NO_PROCESS), chosen


def test_the_first_remedy_is_a_token_budget_that_fits(bare, too_large):
    prediction, chosen = too_large
    available = prediction.peak - prediction.activations / 4
    budget, *flags = remedies(prediction, chosen, longest=3000, available=available)
    assert flags == ["--gradient_checkpointing True", "--dtype bfloat16", "--lora_rank 16", "more ranks"]
    tokens = int(budget.removeprefix("--max_tokens_per_micro_batch "))
    assert 4400 < tokens < 4500
    fewer = predict(bare, chosen, chains([tokens // 2] * 2, 4), process=NO_PROCESS)
    assert fewer.peak <= available


def test_no_token_budget_is_named_where_the_longest_row_does_not_fit(too_large):
    prediction, chosen = too_large
    for longest, room in ((5000, prediction.peak - prediction.activations / 4), (3000, 10.0)):
        found = remedies(prediction, replace(chosen, checkpointed_layers=2), longest=longest, available=room)
        assert found == ["--dtype bfloat16", "--lora_rank 16", "more ranks"]


def test_memory_that_runs_out_is_recognised_by_a_real_refusal():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("total", "steps", "save_steps", "most", "expected"),
    [
        (100, 50, "epoch", None, 2),
        (101, 50, "epoch", None, 3),
        (100, 50, 10, None, 10),
        (100, 50, 10, 3, 5),
        (100, 50, 0, None, 1),
    ],
)
def test_checkpoints_on_the_disk_at_once(total, steps, save_steps, most, expected):
    assert checkpoints_kept(total, steps, save_steps, most) == expected


def test_time_follows_from_the_machines_own_rate():
    assert seconds_of(59e9, 1e9, torch.float32, CPU) == pytest.approx(100)
