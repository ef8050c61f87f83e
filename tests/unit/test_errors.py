"""Spelling suggestions: of flags and columns by their names, of paths by what stands beside them."""

import pytest

from dsft.errors import did_you_mean, did_you_mean_path
from tests.helpers import message, write_parquet


@pytest.mark.parametrize(("name", "reported"), [("promt", " (did you mean 'prompt'?)"), ("xyz", ""), ("", "")])
def test_closest_name_or_none(name, reported):
    assert did_you_mean(name, ["prompt", "response"]) == reported


def test_paths_are_compared_by_their_last_part(tmp_path):
    """The folder's own long name would make all paths in it alike."""
    for name in ("merged", "checkpoint-000100"):
        (tmp_path / name).mkdir()
    assert did_you_mean_path(tmp_path / "mergd") == f" (did you mean '{tmp_path}/merged'?)"
    assert did_you_mean_path(tmp_path / "checkpoint-100") == f" (did you mean '{tmp_path}/checkpoint-000100'?)"
    assert did_you_mean_path(tmp_path / "other") == ""
    assert did_you_mean_path(tmp_path / "no" / "merged") == ""
    assert did_you_mean_path(tmp_path / "merged") == ""  # it is there, and something else is wrong with it
    assert did_you_mean_path("smolm2-135m", ["smollm2-135m"]) == " (did you mean 'smollm2-135m'?)"


def test_suggested_key_and_file(tmp_path):
    from dsft.dataset.readers import Cell, find_files, walk

    assert "no key 'txt' (did you mean 'text'?) at this depth (keys: text)" in message(
        walk, {"text": "a"}, ["txt"], Cell("f", 0), "prompt"
    )
    write_parquet(tmp_path / "train.parquet", [{"prompt": "a"}])
    reported = message(find_files, [str(tmp_path / "trian.parquet")], "train_files")
    assert reported.endswith(f"no such file (did you mean '{tmp_path}/train.parquet'?)")


def test_suggested_model_inside_a_run_folder(tmp_path):
    from dsft.model.source import resolve_model

    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    reported = message(resolve_model, str(tmp_path))
    assert reported.endswith(f"so it is not a model (did you mean '{tmp_path}/merged'?); name one that is")


def test_suggested_folder_for_a_name_like_one_of_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from dsft.model.source import load_tokenizer, resolve_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the environment variable of that name does at the start
    (tmp_path / "out" / "merged").mkdir(parents=True)
    assert resolve_model("out/mergd") == "out/mergd"
    assert message(load_tokenizer, "out/mergd", trust_remote_code=False).endswith("(did you mean 'out/merged'?)")


def test_suggested_config_file_and_checkpoint(tmp_path):
    from dsft import cli
    from dsft.checkpointing.folder import find_checkpoint
    from dsft.config import TrainConfig

    (tmp_path / "run.yaml").write_text("lr: 1")
    assert f"(did you mean '{tmp_path}/run.yaml'?)" in message(
        cli.parse, TrainConfig, ["--config", f"{tmp_path}/rum.yaml"]
    )
    (tmp_path / "checkpoint-000100").mkdir()
    assert "(did you mean '" in message(find_checkpoint, str(tmp_path / "checkpoint-00100"), "resume")
