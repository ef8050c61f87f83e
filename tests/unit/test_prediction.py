"""Predicted memory: parts computed by hand, allocations noted in order, settings that would fit."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.backends import backend_class
from dsft.backends.base import BackendOptions, HeldMemory
from dsft.model.lora import LoraOptions
from dsft.planning.activations import AllocationTrace
from dsft.planning.heap import heap_peaks
from dsft.planning.prediction import (
    Activations,
    Prediction,
    ProcessMemory,
    Setting,
    chains,
    checkpoints_kept,
    is_out_of_memory,
    predict,
    remedies,
    seconds_of,
    shapes,
)

CPU = torch.device("cpu")
MIB, GIB = 2**20, 2**30
NO_PROCESS, SMALL_PROCESS = ProcessMemory(0.0, 0.0), ProcessMemory(50.0 * MIB, 50.0 * MIB)
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


def setting(backend: str = "fsdp", dtype: torch.dtype = torch.float32, lora=LORA, ranks: int = 1, **more) -> Setting:
    options = BackendOptions(device=CPU, dtype=dtype, trains_base=lora is None, clip_grad=1.0, train_batch_size=8)
    return Setting(backend, options, ranks, lora, **more)


def held(bare, chosen: Setting) -> HeldMemory:
    return backend_class(chosen.backend).memory(shapes(bare, chosen), chosen.options, chosen.ranks)


def test_fsdp_holds_shards_of_float32_masters_and_gathers_one_layer_and_the_root(bare):
    memory = held(bare, setting(lora=None))
    assert (memory.weights, memory.masters) == (4 * WHOLE, 0)
    assert (memory.gradients, memory.moments) == (4 * WHOLE, 8 * WHOLE)
    assert memory.gathered == LAYER * (4 + 8) + ROOT * (4 + 8)
    assert memory.step == 8 * 800
    assert not memory.moments_from_start
    assert memory.lasting == 16 * WHOLE


def test_fsdp_shards_a_frozen_bfloat16_base_and_float32_lora_over_two_ranks(bare):
    memory = held(bare, setting(dtype=torch.bfloat16, ranks=2))
    trained = 2 * ADAPTER
    assert memory.weights == (2 * WHOLE + 4 * trained) / 2
    assert (memory.gradients, memory.moments) == (4 * trained / 2, 8 * trained / 2)
    assert memory.gathered == 2 * (LAYER + ADAPTER) + ADAPTER * (2 + 4) + 2 * ROOT


def test_zero3_holds_compute_shards_beside_float32_masters(bare):
    memory = held(bare, setting("zero3", torch.bfloat16, lora=None))
    assert (memory.weights, memory.masters) == (2 * WHOLE, 4 * WHOLE)
    assert (memory.gradients, memory.moments) == (4 * WHOLE + 2 * WHOLE, 8 * WHOLE)
    assert memory.gathered == 2 * 800 + 2 * 800
    assert memory.moments_from_start
    assert memory.step == 12 * WHOLE
    assert memory.leftover == 2 * WHOLE


def test_zero3_keeps_small_parameters_whole_on_several_ranks(bare):
    memory = held(bare, setting("zero3", torch.bfloat16, ranks=2))
    everything, trained = WHOLE + 2 * ADAPTER, 2 * ADAPTER
    assert memory.weights == 2 * everything / 2 + 2 * everything
    assert memory.masters == 4 * trained / 2
    assert memory.gathered == 2 * (2 * 800 + 3 * everything + 2 * 16)


def test_the_peak_is_the_largest_of_loading_computing_and_stepping():
    state = HeldMemory(
        weights=10, masters=0, gradients=20, moments=40, gathered=5, step=3, loading=100, moments_from_start=False
    )
    prediction = Prediction(ProcessMemory(1000, 1050), state, Activations(7, 9, 8), 0, tokens=1, by_trace=True)
    assert prediction.before_first_step == 1000 + 10 + 100
    assert prediction.parts()["activations"] == 9
    assert replace(prediction, by_trace=False).parts()["activations by a formula"] == 9
    tokenised = replace(prediction, process=ProcessMemory(1000, 3000))
    assert (tokenised.before_first_step, tokenised.peak) == (3000, 3000)
    assert prediction.peak == 1000 + 110
    longer = Prediction(ProcessMemory(1000, 1050), state, Activations(700, 900, 2), 0, tokens=1, by_trace=True)
    assert longer.before_first_step == 1000 + 30 + 5 + 700
    assert longer.peak == 1000 + 70 + 5 + 900
    assert sum(longer.parts().values()) == longer.peak
    stepping = Prediction(ProcessMemory(1000, 1050), state, Activations(1, 2, 80), 6, tokens=1, by_trace=True)
    assert stepping.peak == 1000 + 70 + 80 + 3 + 6


def test_allocations_are_noted_when_they_begin_and_end():
    present = torch.ones(8, device="meta")
    trace = AllocationTrace([present])
    with trace:
        first = present * 2
        second = first.view(2, 4) + 1  # a view takes nothing
        del first
        gc.collect()
        third = second.to(torch.bfloat16)
        present.add_(1)
    assert [size for _, size in trace.events] == [32, 32, 0, 16]
    assert trace.peak == 64
    del second, third


def test_blocks_above_the_threshold_are_given_back():
    events = [(0, 10 * MIB), (1, 10 * MIB), (0, 0), (2, 10 * MIB), (1, 0), (2, 0)]
    [(peak, heap)] = heap_peaks(events, 1, 8 * MIB)
    assert peak == pytest.approx(20 * MIB, rel=0.01)
    assert heap < MIB


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(10_000, 2_000_000), st.booleans()), min_size=3, max_size=40))
def test_a_heap_is_at_least_as_large_as_what_lives_in_it(allocations):
    events, live, now = [], [], 0
    for number, (size, frees) in enumerate(allocations):
        events.append((number, size))
        live.append((number, size))
        now += size
        if frees:
            last, freed = live.pop(0)
            events.append((last, 0))
            now -= freed
    everything = sum(size for size, _ in allocations)
    first, second = heap_peaks([*events, (-1, 9 * MIB)], 2, 8 * MIB)  # a mapped block is always looked at
    assert first[1] <= first[0] <= second[0]
    assert first[0] >= (now + 9 * MIB) - MIB  # the process's heap has had some room before
    assert second[0] <= 2 * everything + 10 * MIB


def test_more_tokens_take_more_and_recomputing_takes_less():
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    short, long = (predict(bare, setting(), chains([size], 4), process=NO_PROCESS) for size in (2000, 8000))
    assert short.by_trace
    assert long.by_trace
    assert 2.5 < long.activations.first / short.activations.first < 6
    recomputed = predict(bare, setting(checkpointed_layers=8), chains([8000], 4), process=NO_PROCESS)
    assert recomputed.activations.first < 0.7 * long.activations.first
    assert recomputed.held == long.held


def test_the_logits_of_many_targets_are_never_there_at_once():
    config = AutoConfig.for_model(
        "llama", vocab_size=2**15, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        wide = AutoModelForCausalLM.from_config(config)
    few, many = (predict(wide, setting(), chains([6000], count), process=NO_PROCESS) for count in (2048, 5000))
    assert many.activations.first < 1.2 * few.activations.first


def test_a_state_that_is_copied_counts(bare):
    copied = predict(bare, setting(copies_state=True), chains([50], 4), process=NO_PROCESS)
    assert copied.copied == 12 * 2 * ADAPTER


@pytest.fixture(scope="module")
def too_large(bare):
    chosen = setting(lora=None)
    return predict(bare, chosen, chains([3000, 3000], 4), process=SMALL_PROCESS), chosen


def test_settings_that_fit_are_told_and_do(bare, too_large):
    prediction, chosen = too_large
    room = 50 * MIB + 0.75 * (prediction.peak - 50 * MIB)
    found = remedies(prediction, bare, chosen, longest=3000, room=room)
    assert any(words.startswith("--max_tokens_per_micro_batch ") for words in found)
    assert "--dtype bfloat16" in found
    assert any(words.startswith("--gradient_checkpointing True") for words in found)
    assert any(words.startswith("--lora_rank 16") for words in found)
    tokens = int(next(words for words in found if words.startswith("--max_tokens")).split()[1])
    assert 3000 <= tokens < 6000
    fewer = predict(bare, chosen, chains([tokens // 2] * 2, 4), process=SMALL_PROCESS)
    assert fewer.peak < prediction.peak


def test_nothing_is_promised_where_nothing_fits(bare, too_large):
    prediction, chosen = too_large
    assert remedies(prediction, bare, chosen, longest=3000, room=10.0 * MIB) == []


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
