"""The card of a merged model: what huggingface_hub reads in it, and where its words come from."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.checkpointing.state import read_state, with_command
from dsft.cli import parse
from dsft.config import TrainConfig
from dsft.config.games import TUNED
from dsft.config.values import as_words, build
from dsft.export.model_card import add_results, model_card, name_of
from dsft.reporting.eval_reports import EvalReport
from tests.helpers import save_checkpoint

NAMES = {"name": "tuned", "place": "me/tuned", "dtype": "torch.bfloat16"}
FLAGS = {
    "model": "some/base",
    "train_files": ["/home/me/rows.parquet"],
    "output_dir": "out",
    "lora_rank": 8,
    "lr": 0.001,
}


def make_checkpoint(root: Path, **flags: object) -> Path:
    root.mkdir(exist_ok=True)
    command = shlex.join(["/usr/bin/python", "-m", "dsft.train", *as_words(build(TrainConfig, FLAGS | flags))])
    (root / "config.yaml").write_text(with_command("", command))
    return save_checkpoint(root, 1, {"config.yaml": yaml.safe_dump(FLAGS | flags)})


def with_card(folder: Path, **metadata: object) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# base\n")
    return str(folder)


@pytest.fixture(scope="module")
def merged(commands, trained_runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    done = commands.run("dsft.merge", ["--checkpoint", trained_runs.folder("lora"), "--output", folder])
    assert done.status == 0, done.err
    return folder


def test_the_card_of_a_merge(merged, trained_runs):
    run = trained_runs.folder("lora")
    state = read_state(run / "best")
    card = ModelCard.load(merged / "README.md")  # raises where its metadata is not as the Hub has it
    metadata = card.data.to_dict()
    [index] = metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["dsft", "sft", "lora", "text-generation"],
    }
    assert index["name"] == "model"
    [result] = index["results"]
    assert result["dataset"] == {"name": "rows", "type": "rows", "split": "validation"}
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        "loss": pytest.approx(state.val_loss),
        "perplexity": pytest.approx(math.exp(state.val_loss)),
    }
    assert "Licence: unknown." in card.text
    assert f"fingerprint of the tokenised rows: {state.data}." in card.text
    assert re.search(r"\| `lora\\?_rank` +\| `4` +\|", card.text)
    assert "which are float32 here" in card.text
    [command] = re.findall(r"```bash\npython -m dsft.train (.*)\n```", card.text)
    config = parse(TrainConfig, shlex.split(command))
    assert (config.lora_rank, config.lr, config.train_batch_size) == (4, 1e-3, 4)


def test_the_metadata_survives_the_hubs_own_editing(merged, tmp_path):
    path = tmp_path / "README.md"
    path.write_text((merged / "README.md").read_text())
    before = metadata_load(path)
    ModelCardData(**before, ignore_metadata_errors=False)
    edited = ModelCard.load(path)
    edited.data.license = "mit"
    edited.save(path)
    assert metadata_load(path) == before | {"license": "mit"}
    assert ModelCard.load(path).text == ModelCard.load(merged / "README.md").text


def test_the_embedded_model_and_one_of_the_hub_are_named_as_bases(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = make_checkpoint(tmp_path / "run")
    embedded = model_card(checkpoint, "smollm2-135m", "/cache/smollm2", **NAMES).data
    validate_repo_id(embedded.base_model)
    assert (embedded.base_model, embedded.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    hub = model_card(checkpoint, "some/base", "some/base", **NAMES).data
    assert (hub.base_model, hub.license, hub.base_model_relation) == ("some/base", "unknown", "finetune")


@pytest.mark.parametrize(
    ("metadata", "licence", "base"),
    [
        ({"license": "mit"}, {"license": "mit"}, None),
        (
            {"license": "other", "license_name": "own", "license_link": "LICENSE", "base_model": "a/b"},
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
            "a/b",
        ),
        ({"license": None, "base_model": ["a/b", "c/d"]}, {"license": "unknown"}, None),
        ({"base_model": "../secret"}, {"license": "unknown"}, None),
    ],
)
def test_licence_and_lineage_come_from_the_local_bases_card(tmp_path, metadata, licence, base):
    checkpoint = make_checkpoint(tmp_path / "run")
    folder = with_card(tmp_path / "base", **metadata)
    data = ModelCard(str(model_card(checkpoint, folder, folder, **NAMES))).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == licence
    assert data.get("base_model") == base


@pytest.mark.parametrize("text", ["", "no metadata", "---\n- a\n---\n", "---\nlicense: [\n---\n", "\x00"])
def test_a_bases_card_that_says_nothing_does_not_stop_the_merge(tmp_path, text):
    checkpoint = make_checkpoint(tmp_path / "run")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(text)
    card = model_card(checkpoint, str(tmp_path / "base"), str(tmp_path / "base"), **NAMES)
    assert card.data.license == "unknown"


@pytest.mark.parametrize("home", ["/home/me", "~", "../../me"])
def test_no_folder_of_this_machine_gets_out(tmp_path, home):
    base = with_card(tmp_path / "secret_place", license="mit")
    files = {name: [f"{home}/project/{name}.parquet", "data/own.parquet"] for name in ("train_files", "val_files")}
    own = {name: f"{home}/project/{name}" for name in ("model", "output_dir", "init_from")}
    checkpoint = make_checkpoint(tmp_path / "run", **files, **own)
    text = str(model_card(checkpoint, base, base, **NAMES))
    for secret in (str(tmp_path), "secret_place", "project/", "home", "~", ".."):
        assert secret not in text
    [command] = re.findall(r"```bash\npython -m dsft.train (.*)\n```", text)
    config = parse(TrainConfig, shlex.split(command))
    assert config.train_files == ["train_files.parquet", "data/own.parquet"]
    assert (config.model, config.output_dir, config.init_from) == ("model", "output_dir", "init_from")


def test_no_folder_gets_out_with_a_local_merge_or_with_results(merged, tmp_path):
    path = tmp_path / "README.md"
    path.write_text((merged / "README.md").read_text())
    played = replace(eval_report(0.5), model="/home/me/other")
    rows = played.values | {"val/loss": 0.5, "well_formed_rate": 1.0, "well_formed_interval": [0.5, 1.0]}
    del rows["success_rate"]
    answered = EvalReport(TUNED, None, Path("d.json"), rows | {"settings": {"data": "/home/me/rows.parquet"}})
    add_results(tmp_path, [played, answered])
    text = path.read_text()
    assert "/home" not in text
    assert str(merged.parent) not in text
    assert str(merged.parent.parent) not in text
    assert "## Results: rows.parquet" in text


foul = st.one_of(
    st.sampled_from(["~nobody", "a: b", "---", "'", "null", "1e3"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)


@settings(max_examples=30, deadline=None)
@given(foul, foul, foul)
def test_any_names_make_a_card_that_can_be_read_back(tmp_path_factory, model, file, name):
    checkpoint = make_checkpoint(
        tmp_path_factory.mktemp("foul") / "run", model=model, train_files=[file], val_files=[file]
    )
    card = model_card(checkpoint, "/no/base", "/no/base", **NAMES | {"name": name})
    again = ModelCard(str(card), ignore_metadata_errors=False)
    assert again.data.to_dict() == card.data.to_dict()
    assert again.text == card.text


def eval_report(success: float) -> EvalReport:
    report = {
        "model": "m", "episodes": 10, "success_rate": success, "success_interval": [0.25, 0.75],
        "moves_over_optimum": 0.0, "invalid_answer_rate": 0.0, "settings": {"env": "sokoban"},
    }  # fmt: skip
    return EvalReport(TUNED, None, Path("r.json"), report)


def test_what_a_model_has_reached_is_added_once(merged, tmp_path):
    path = tmp_path / "README.md"
    path.write_text((merged / "README.md").read_text())
    add_results(tmp_path, [eval_report(0.5)])
    add_results(tmp_path, [eval_report(0.75)])
    card = ModelCard.load(path)
    kinds = [(result.dataset_type, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert [kind[:2] for kind in kinds] == [("rows", "loss"), ("rows", "perplexity"), ("sokoban", "success_rate")]
    assert kinds[-1][2] == 0.75
    assert card.text.count("## Results: sokoban") == 1
    assert "| fine-tuned model | 75.0% (25.0% to 75.0%)" in card.text
    assert card.text.startswith(ModelCard.load(merged / "README.md").text.rstrip())
    assert name_of(Path("out/run/merged")) == "run"
    add_results(tmp_path / "no", [eval_report(0.5)])  # full fine-tuning has no merged folder


def test_a_loss_whose_perplexity_is_beyond_all_numbers(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "run")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"val_losses": {"val/loss": 1000.0}}))
    data = model_card(checkpoint, "/no/base", "/no/base", **NAMES).data
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("loss", 1000.0)]
