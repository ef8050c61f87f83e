"""LoRA by PEFT: the same start however a backend builds the model."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from dsft.errors import UserError
from dsft.model.initial_weights import LoraInitializer
from dsft.model.lora import LoraOptions, adapter_tensors, add_lora
from dsft.model.source import ModelSource

PLAIN = LoraOptions(rank=4, alpha=8.0, dropout=0.0, target_modules=["all-linear"], use_rslora=False, use_dora=False)
LINEAR = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A model whose linear weights lie transposed."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(5)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, **ids)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder_of(tiny_model, gpt2):
    return {"llama": str(tiny_model), "gpt2": gpt2}


def lora_tensors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def built_whole(path: str, options: LoraOptions, dtype=torch.float32, seed: int = 1) -> PeftModel:
    model = add_lora(ModelSource(path).pretrained(dtype), options, "base")
    LoraInitializer(model, seed)(model)
    return model


def built_layer_by_layer(path: str, options: LoraOptions, dtype=torch.float32, seed: int = 1) -> PeftModel:
    source = ModelSource(path)
    model = add_lora(source.skeleton(dtype), options, "base")
    source.after_fill = LoraInitializer(model, seed)
    source.after_fill(model)
    layers = [layer for m in model.modules() if isinstance(m, torch.nn.ModuleList) for layer in m]
    for layer in reversed(layers):  # the order in which layers come must not matter
        torch.rand(3)
        source.fill(layer)
    source.fill(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_start_is_the_same_whole_or_layer_by_layer(folder_of, kind, use_dora, dtype):
    options = replace(PLAIN, use_dora=use_dora)
    whole = built_whole(folder_of[kind], options, dtype)
    by_layer = built_layer_by_layer(folder_of[kind], options, dtype)
    expected, found = dict(whole.named_parameters()), dict(by_layer.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert (found[name].dtype, found[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
    assert any("magnitude" in name for name in found) is use_dora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_doras_magnitudes_equal_pefts_own(folder_of, kind, dtype):
    options = replace(PLAIN, use_dora=True)
    peft_own = lora_tensors(add_lora(ModelSource(folder_of[kind]).pretrained(dtype), options, "base"))
    expected = {name: tensor for name, tensor in peft_own.items() if "magnitude" in name}
    assert expected
    for model in (built_whole(folder_of[kind], options, dtype), built_layer_by_layer(folder_of[kind], options, dtype)):
        found = lora_tensors(model)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_only_lora_trains_and_in_float32(tiny_model):
    model = built_whole(str(tiny_model), PLAIN, torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == lora_tensors(model).keys()
    assert len(trained) == 2 * 7 * 2  # layers, linear modules in each, A and B
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_b_starts_at_zero_and_a_as_peft_draws_it(tiny_model):
    tensors = lora_tensors(built_whole(str(tiny_model), PLAIN))
    for name, tensor in tensors.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
            assert bound * 0.8 < tensor.abs().max() <= bound


def test_the_start_depends_on_seed_and_layer_and_on_nothing_else(tiny_model):
    torch.manual_seed(11)
    first = lora_tensors(built_whole(str(tiny_model), PLAIN, seed=1))
    torch.manual_seed(12)
    again = lora_tensors(built_whole(str(tiny_model), PLAIN, seed=1))
    other = lora_tensors(built_whole(str(tiny_model), PLAIN, seed=2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    drawn = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    queries = [name for name in drawn if "q_proj" in name]
    assert not torch.equal(first[queries[0]], first[queries[1]])


def test_starting_leaves_the_random_state_as_it_was(tiny_model):
    model = add_lora(ModelSource(str(tiny_model)).pretrained(torch.float32), PLAIN, "base")
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    LoraInitializer(model, 1)(model)
    assert torch.equal(torch.rand(1), expected)


def test_a_layer_is_started_once(tiny_model):
    model = add_lora(ModelSource(str(tiny_model)).pretrained(torch.float32), PLAIN, "base")
    start = LoraInitializer(model, 1)
    start(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(7)
    start(model)
    assert all((tensor == 7).all() for tensor in lora_tensors(model).values())


def test_a_fresh_adapter_changes_no_logit(tiny_model):
    ids = torch.arange(12)[None]
    base = ModelSource(str(tiny_model)).pretrained(torch.float32)
    expected = base(input_ids=ids).logits
    assert torch.equal(built_whole(str(tiny_model), PLAIN)(input_ids=ids).logits, expected)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 8.0 / 4), (True, 8.0 / 2)])
def test_the_scale_is_alpha_over_rank_or_over_its_root(tiny_model, use_rslora, scaling):
    model = built_whole(str(tiny_model), replace(PLAIN, use_rslora=use_rslora))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": scaling}


def test_named_targets_alone_get_lora(tiny_model):
    options = replace(PLAIN, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    model = built_whole(str(tiny_model), options)
    names = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in lora_tensors(model)}
    assert names == {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}


def test_all_linear_leaves_the_head_out(tiny_model):
    assert not any("lm_head" in name for name in lora_tensors(built_whole(str(tiny_model), PLAIN)))


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_porj"], "target_modules: 'q_porj' matches no module (did you mean 'q_proj'?); linear modules: "),
        (["q_proj", "xyz"], "target_modules: 'xyz' matches no module; linear modules: "),
        (["all-linear", "q_proj"], "target_modules: 'all-linear' matches no module; linear modules: "),
    ],
)
def test_a_target_that_matches_nothing_lists_what_could_be_matched(tiny_model, targets, told):
    model = ModelSource(str(tiny_model)).pretrained(torch.float32)
    with pytest.raises(UserError) as caught:
        add_lora(model, replace(PLAIN, target_modules=targets), "base")
    assert str(caught.value) == f"{told}{LINEAR}, or all-linear"


def test_a_target_that_cannot_get_lora_is_one_line(tiny_model):
    model = ModelSource(str(tiny_model)).pretrained(torch.float32)
    with pytest.raises(UserError) as caught:
        add_lora(model, replace(PLAIN, target_modules=["input_layernorm"]), "base")
    assert str(caught.value).startswith("target_modules input_layernorm: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_saved_adapter_is_read_by_peft(tiny_model, tmp_path, use_dora):
    from safetensors.torch import save_file

    options = replace(PLAIN, use_dora=use_dora)
    model = built_layer_by_layer(str(tiny_model), options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01)
    tensors = adapter_tensors(model, lora_tensors(model))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(ModelSource(str(tiny_model)).pretrained(torch.float32), tmp_path)
    assert again.peft_config["default"].base_model_name_or_path == "base"
    ids = torch.arange(12)[None]
    assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
