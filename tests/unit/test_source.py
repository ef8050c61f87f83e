"""Where a base model comes from: names, folders, and a skeleton that is filled module by module."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from dsft.errors import UserError
from dsft.model.source import INDEX, SINGLE, ModelSource, load_tokenizer, resolve_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(kind: str, folder) -> str:
    torch.manual_seed(3)
    if kind == "gpt2":  # transposed weights, tied, learned positions
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4, **ids))
    elif kind == "without head":
        model = LlamaModel(LlamaConfig(**SIZES, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"))
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "in shards" else "5GB")
    return str(folder)


def everything(model) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def message(work, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layer_by_layer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tied", "untied", "in shards", "without head", "gpt2"])
def test_a_filled_skeleton_equals_the_pretrained_model(tmp_path, kind, dtype, layer_by_layer):
    source = ModelSource(build(kind, tmp_path))
    whole = source.pretrained(dtype)
    model = source.skeleton(dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    if layer_by_layer:
        for module in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
            for layer in module:
                source.fill(layer)
                assert not any(parameter.is_meta for parameter in layer.parameters())
    source.fill(model)
    expected, found = everything(whole), everything(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert (found[name].dtype, found[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    ids = torch.arange(10)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)
    if kind != "without head":  # saved without a generation config: transformers derives one as it likes
        assert model.generation_config.to_dict() == whole.generation_config.to_dict()


def test_a_tied_weight_is_one_object_after_filling_its_users_apart(tmp_path):
    source = ModelSource(build("tied", tmp_path))
    model = source.skeleton(torch.float32)
    source.fill(model.get_input_embeddings())
    source.fill(model.get_output_embeddings())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_filling_again_changes_nothing(tmp_path):
    source = ModelSource(build("tied", tmp_path))
    model = source.skeleton(torch.float32)
    source.fill(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    source.fill(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_what_did_not_come_with_the_model_is_left_to_after_fill(tmp_path):
    source = ModelSource(build("tied", tmp_path))
    model = source.skeleton(torch.float32)
    model.extra = torch.nn.Linear(2, 2, device="meta")
    filled = []
    source.after_fill = filled.append
    source.fill(model)
    assert filled == [model]
    assert {name for name, p in model.named_parameters() if p.is_meta} == {"extra.weight", "extra.bias"}


def test_weights_that_transformers_renames_are_loaded_through_it(tmp_path):
    folder = build("untied", tmp_path)
    weights = load_file(tmp_path / SINGLE)
    renamed = {name.replace("model.", "transformer.model."): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / SINGLE, metadata={"format": "pt"})
    source = ModelSource(folder)
    whole, model = source.pretrained(torch.float32), source.skeleton(torch.float32)
    source.fill(model)
    assert source.loads_whole
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


def test_a_folder_with_safetensors_is_a_model(tiny_model):
    assert resolve_model(str(tiny_model)) == str(tiny_model.resolve())


def test_the_embedded_model_has_a_name(embedded):
    assert resolve_model("smollm2-135m") == embedded


def test_a_hub_name_is_passed_on():
    assert resolve_model("organisation/model-1b") == "organisation/model-1b"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("smollm2-135", "smollm2-135m"), ("smolm2-135m", "smollm2-135m"), ("{folder}/tinny", "tiny")],
)
def test_no_such_folder_suggests_the_closest_name(tiny_model, name, suggestion):
    name = name.format(folder=tiny_model.parent)
    told = message(resolve_model, name)
    assert told.startswith(f"--model {name}: no such folder (did you mean '")
    assert f"{suggestion}'?)" in told


def test_a_folder_without_a_config_is_no_model(tmp_path):
    assert message(resolve_model, str(tmp_path)).startswith(f"--model {tmp_path}: the folder has no config.json")


@pytest.mark.parametrize("weights", [None, "pytorch_model.bin"])
def test_a_folder_without_safetensors_is_refused_and_pickles_are_not_read(tmp_path, weights):
    build("tied", tmp_path)
    (tmp_path / SINGLE).unlink()
    if weights is not None:
        torch.save({}, tmp_path / weights)
    told = message(resolve_model, str(tmp_path))
    assert told.startswith(f"--model {tmp_path}: the folder has no {SINGLE} and no {INDEX}; pickled weights")
    assert "convert them to safetensors" in told


def test_a_missing_shard_is_named(tmp_path):
    source = ModelSource(build("in shards", tmp_path))
    source.check()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    told = f"--model {tmp_path}: {shards[-1].name} is missing; download the folder again"
    assert message(source.check).startswith(told)
    assert message(source.skeleton, torch.float32).startswith(told)


def test_a_damaged_weight_file_is_named(tmp_path):
    source = ModelSource(build("tied", tmp_path))
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes()[:-9])
    assert message(source.check).startswith(f"--model {tmp_path}: {SINGLE} is not a valid safetensors file (")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_one_line(tmp_path, text):
    source = ModelSource(build("in shards", tmp_path))
    (tmp_path / INDEX).write_text(text)
    assert message(source.check).startswith(f"--model {tmp_path}: {INDEX} is damaged (")


def test_a_damaged_config_is_one_line(tmp_path):
    source = ModelSource(build("tied", tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert message(source.check).startswith(f"--model {tmp_path}: the model cannot be loaded: ")


def test_an_unknown_architecture_is_one_line(tmp_path):
    source = ModelSource(build("tied", tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    told = message(source.pretrained, torch.float32)
    assert told.startswith(f"--model {tmp_path}: the model cannot be loaded: ")
    assert "nonesuch" in told


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    build("tied", tmp_path)
    told = message(load_tokenizer, str(tmp_path), trust_remote_code=False)
    assert told.startswith(f"--model {tmp_path}: the tokenizer cannot be loaded: ")


def test_the_attention_that_a_user_names_is_taken(tiny_model):
    source = ModelSource(str(tiny_model), attn_implementation="eager")
    assert source.pretrained(torch.float32).config._attn_implementation == "eager"
    assert source.skeleton(torch.float32).config._attn_implementation == "eager"


def test_auto_is_the_dtype_of_the_config(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert ModelSource(str(tmp_path)).pretrained("auto").dtype == torch.bfloat16


def test_a_filled_skeleton_saves_as_the_model_it_came_from(tmp_path):
    source = ModelSource(build("tied", tmp_path / "base"))
    model = source.skeleton(torch.float32)
    source.fill(model)
    shutil.rmtree(tmp_path / "base")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in model.named_parameters())
