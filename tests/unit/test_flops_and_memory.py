"""Counted operations against torch's own counter; predicted activations against what autograd keeps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.model.flops import count_flops, measure_matmul
from dsft.model.lora import LoraOptions, add_lora
from dsft.planning.activations import MOST_TOKENS, ActivationMemory, checkpointed_layers, token_budget

CPU = torch.device("cpu")
TOKENS = 96
GIB = 2**30


@pytest.fixture
def model():
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, attn_implementation="eager",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).train()


def shape(parameter):
    return tuple(parameter.shape)


def counted(model) -> float:
    """Operations of a forward and backward pass over TOKENS tokens, eager attention: all pairs, all targets."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def test_operations_of_full_fine_tuning(model):
    cost = count_flops(model, shape)
    assert cost.of(TOKENS, TOKENS * TOKENS, TOKENS) == counted(model)


def test_operations_of_lora(model):
    wrapped = add_lora(model, LoraOptions(4, 8, 0, ["all-linear"], False, False), "tiny")
    cost = count_flops(wrapped, shape)
    # The first layer's input needs no gradient, which the count leaves out of account.
    assert counted(wrapped) == pytest.approx(float(cost.of(TOKENS, TOKENS * TOKENS, TOKENS)), rel=0.1)
    assert cost.target == 4 * 300 * 64


def test_the_machine_multiplies():
    assert measure_matmul(torch.float32, CPU) > 1e8


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_predicted_activations_are_near_what_autograd_keeps(model, lora):
    model.set_attn_implementation("sdpa")
    wrapped = add_lora(model, LoraOptions(4, 8, 0, ["all-linear"], False, False), "tiny") if lora else model
    weights = {parameter.untyped_storage().data_ptr() for parameter in wrapped.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wrapped(input_ids=torch.arange(TOKENS)[None], use_cache=False, logits_to_keep=1)
    predicted = ActivationMemory.of(model, torch.float32).per_token(0) * TOKENS
    assert 0.7 < sum(storage.nbytes() for storage in kept.values()) / predicted < 1.5


def test_checkpointing_recomputes_only_what_memory_needs(model):
    memory = ActivationMemory.of(model, torch.float32)
    enough = 1000 * memory.per_token(0)
    assert checkpointed_layers(memory, enough, 1000) == 0
    assert 0 < checkpointed_layers(memory, 0.9 * enough, 1000) < memory.layers
    assert checkpointed_layers(memory, 1.0, 1000) == memory.layers


def test_the_budget_fills_the_memory_and_holds_the_longest_row(model):
    memory = ActivationMemory.of(model, torch.float32)
    room = 1000.5 * memory.per_token(0)
    assert token_budget(memory, room, 10, 0, CPU) == 1000
    assert token_budget(memory, room, 1500, 0, CPU) == 1500
    assert token_budget(memory, 1000 * GIB, 10, 0, CPU) == MOST_TOKENS["cpu"]
    assert token_budget(memory, room, 10, memory.layers, CPU) > 1000
