"""From which checkpoint a run goes on, or takes its first weights, and whether it may."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsft.checkpointing import folder
from dsft.checkpointing.folder import CheckpointFolder
from dsft.checkpointing.integrity import COMPLETE
from dsft.checkpointing.resuming import InitialWeights, find_initial_weights, find_resume, open_output
from dsft.checkpointing.state import CONFIG, STATE
from dsft.config import TrainConfig
from dsft.config.values import as_yaml
from tests.helpers import contents, message, save_checkpoint


def config(output_dir: Path, **changed: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "train_files": ["t"], "output_dir": str(output_dir)} | changed)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def train(out: Path, *steps: int, **changed: Any) -> list[Path]:
    """What a run with these flags leaves."""
    out.mkdir(exist_ok=True)
    text = as_yaml(config(out, **changed))
    (out / CONFIG).write_text(text)
    return [save_checkpoint(out, step, {CONFIG: text}) for step in steps]


def resumed(out: Path, warn: Any = pytest.fail, **changed: Any) -> Path | None:
    run = CheckpointFolder(out)
    try:
        return find_resume(config(out, **changed), run, warn)
    finally:
        run.unlock()  # as if the process had ended


def refusal(out: Path, **changed: Any) -> str:
    return message(resumed, out, **changed)


def damage(checkpoint: Path, name: str = "weights") -> None:
    (checkpoint / name).write_text("other")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint"))


# Resume


def test_a_new_folder_has_nothing_to_go_on_from(out):
    assert resumed(out) is None
    assert not out.exists()


def test_the_latest_checkpoint_is_gone_on_from(out):
    saved = train(out, 1, 2)
    assert resumed(out) == saved[1]


def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_gone_on_from(out):
    saved = train(out, 1, 2)
    damage(saved[1])
    told: list[str] = []
    assert resumed(out, told.append) == saved[0]
    assert len(told) == 1
    assert names(out) == ["checkpoint-000001", "checkpoint-000002.damaged"]


def test_no_sound_checkpoint_is_refused(out):
    for checkpoint in train(out, 1, 2):
        damage(checkpoint)
    assert "no older checkpoint is intact; restore the file, or choose another --output_dir" in refusal(out)
    assert names(out) == ["checkpoint-000001", "checkpoint-000002"]


def test_a_damaged_checkpoint_that_was_named_is_refused(out):
    saved = train(out, 1, 2)
    damage(saved[1])
    told = refusal(out, resume=str(saved[1]))
    assert told.startswith(f"--resume {saved[1]}: {saved[1]}/weights is damaged")
    assert told.endswith(f"; use {saved[0]}, which is intact")
    assert names(out) == ["checkpoint-000001", "checkpoint-000002"]


def test_never_refuses_a_used_folder_and_takes_a_new_one(out, tmp_path):
    train(out, 1)
    assert (
        refusal(out, resume="never")
        == f"{out} contains checkpoint-000001 but --resume is never; choose another --output_dir"
    )
    assert resumed(tmp_path / "new", resume="never") is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lr": 1.0}, "lr was 0.0001, is 1.0"),
        ({"seed": 2, "lr": 1.0}, "lr was 0.0001, is 1.0; seed was 1, is 2"),
        ({"betas": (0.9, 0.99)}, "betas was [0.9, 0.95], is [0.9, 0.99]"),
        ({"init_from": "x"}, "init_from was None, is x"),
    ],
)
def test_other_flags_are_refused_each_by_name(out, changed, told):
    [saved] = train(out, 1)
    names = ",".join(part.split()[0] for part in told.split("; "))
    assert refusal(out, **changed) == (
        f"{saved} is of a run with other flags: {told}; use its values or another --output_dir, or accept the new "
        f"ones with --resume_override {names}"
    )
    assert resumed(out, **changed, resume_override=names.split(",")) == saved


def test_an_override_allows_only_what_it_names(out):
    train(out, 1)
    assert "other flags: seed was 1, is 2; " in refusal(out, lr=1.0, seed=2, resume_override=["lr"])


@pytest.mark.parametrize(
    "changed",
    [
        {"backend": "zero3"},
        {"max_tokens_per_micro_batch": 9},
        {"save_steps": 3},
        {"val_files": ["v"]},
        {"async_save": True},
    ],
)
def test_what_does_not_change_the_numbers_is_free(out, changed):
    [saved] = train(out, 1)
    assert resumed(out, **changed) == saved


def test_the_flags_are_those_of_the_checkpoint_not_of_the_folder(out):
    [saved] = train(out, 1)
    (out / CONFIG).write_text("lost")
    assert resumed(out) == saved


@pytest.mark.parametrize("named", ["checkpoint-000001", "."])
def test_a_checkpoint_of_another_folder_is_gone_on_from_in_a_new_one(out, tmp_path, named):
    [saved] = train(out, 1)
    new = tmp_path / "new"
    found = resumed(new, resume=str(out / named))
    assert found == saved
    open_output(CheckpointFolder(new), found, pytest.fail)
    assert names(new) == []


def test_a_checkpoint_of_another_folder_is_never_mixed_with_a_runs_own(out, tmp_path):
    [theirs] = train(tmp_path / "theirs", 2)
    train(out, 1, 2, 3)
    before = contents(out)
    told = refusal(out, resume=str(theirs))
    assert told == (
        f"{out} contains checkpoint-000003 of its own, and --resume {theirs} is of another folder; "
        "leave --resume out to resume from it, or choose another --output_dir"
    )
    assert {n: c for n, c in contents(out).items() if n != ".lock"} == before


def test_a_resume_owns_the_folder(out, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.1)
    train(out, 1)
    first = CheckpointFolder(out)
    find_resume(config(out), first, pytest.fail)
    assert first.is_locked
    assert "belongs to a run that is still running" in refusal(out)


# The output folder


def test_a_new_output_folder_is_made_and_owned(out):
    run = CheckpointFolder(out / "below")
    open_output(run, None, pytest.fail)
    assert run.is_locked
    assert [path.name for path in (out / "below").iterdir()] == [".lock"]


def test_of_two_runs_that_begin_at_once_in_a_new_folder_one_is_refused(out, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.1)
    one, two = CheckpointFolder(out), CheckpointFolder(out)
    assert find_resume(config(out), one, pytest.fail) is find_resume(config(out), two, pytest.fail) is None
    open_output(one, None, pytest.fail)
    assert "belongs to a run that is still running" in message(open_output, two, None, pytest.fail)


def test_a_folder_in_which_another_run_has_been_meanwhile_is_refused(out):
    two = CheckpointFolder(out)
    assert find_resume(config(out), two, pytest.fail) is None
    train(out, 1)
    told = message(open_output, two, None, pytest.fail)
    assert told == f"another run has begun in {out} meanwhile; rerun to resume from it, or choose another --output_dir"


def test_steps_that_are_taken_again_are_set_aside(out):
    saved = train(out, 1, 2, 3)
    told: list[str] = []
    run = CheckpointFolder(out)
    assert find_resume(config(out, resume=str(saved[0])), run, pytest.fail) == saved[0]
    open_output(run, saved[0], told.append)
    assert names(out) == ["checkpoint-000001", "checkpoint-000002.superseded", "checkpoint-000003.superseded"]
    assert told == [
        f"{saved[i].name} is of steps that are taken again from checkpoint-000001; it is now {saved[i].name}.superseded"
        for i in (1, 2)
    ]


def test_a_checkpoint_that_was_set_aside_is_gone_on_from_under_its_own_step(out):
    saved = train(out, 1, 2, 3)
    aside = CheckpointFolder(out).set_aside(saved[1], "superseded")
    train(out, 2)
    run = CheckpointFolder(out)
    assert find_resume(config(out, resume=str(aside)), run, pytest.fail) == aside
    open_output(run, aside, lambda line: None)
    assert names(out) == [
        "checkpoint-000001", "checkpoint-000002.superseded", "checkpoint-000002.superseded.2",
        "checkpoint-000003.superseded",
    ]  # fmt: skip


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    told = message(open_output, CheckpointFolder(tmp_path / "file" / "below"), None, pytest.fail)
    assert told == f"cannot write {tmp_path}/file/below: Not a directory; choose another folder, or make it writable"


# First weights

ADAPTER = {"base_model_name_or_path": "m", "r": 64, "lora_alpha": 32.0, "use_rslora": False, "use_dora": False}
MODEL = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9}


def adapter(folder: Path, **changed: Any) -> Path:
    files = {"adapter_config.json": json.dumps(ADAPTER | changed), "adapter_model.safetensors": "w", CONFIG: "{}"}
    return save_checkpoint(folder, 1, files)


def model(folder: Path, **changed: Any) -> dict[str, bytes | str]:
    return {"config.json": json.dumps(MODEL | changed), "model.safetensors": "w", CONFIG: "{}"}


def initial(
    init_from: Path, base: Path | str = "m", *, resumed: Path | None = None, check: bool = True, **changed: Any
) -> Any:
    flags = config(Path("none"), init_from=str(init_from), **changed)
    return find_initial_weights(flags, str(base), resumed, check=check)


def test_without_the_flag_there_is_nothing():
    assert find_initial_weights(config(Path("none")), "m", None) is None


def test_an_adapter_starts_lora_of_its_own_shape(out):
    out.mkdir()
    saved = adapter(out)
    found = initial(saved)
    assert (found.folder, found.is_adapter) == (saved, True)
    assert "were trained with --lora_rank 64; give the same values" in message(initial, saved, lora_rank=8)
    assert "were trained with --lora_alpha 32.0 --use_dora False" in message(
        initial, saved, lora_alpha=1.0, use_dora=True
    )
    assert "contains LoRA weights, but --lora_rank is 0" in message(initial, saved, lora_rank=0)


@pytest.mark.parametrize("base", ["m", "/the/folder/of/m"])
def test_a_resumed_run_needs_no_adapter_that_it_began_from(out, base):
    out.mkdir()
    own = adapter(out, base_model_name_or_path=base)
    assert initial(Path("/deleted"), "/the/folder/of/m", resumed=own) is None


def test_a_resumed_run_needs_the_model_under_its_lora(out):
    out.mkdir()
    own = adapter(out, base_model_name_or_path="/stage/one")
    assert message(initial, Path("/stage/one"), resumed=own).startswith("--init_from /stage/one: no such folder")


def test_a_resumed_run_of_full_fine_tuning_begins_from_its_own_checkpoint(out):
    out.mkdir()
    own = save_checkpoint(out, 1, model(out))
    assert initial(Path("/deleted"), resumed=own, lora_rank=0) == InitialWeights(own, is_adapter=False)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\x80"])
def test_an_adapter_config_that_cannot_be_read_is_one_line(out, content):
    out.mkdir()
    saved = save_checkpoint(out, 1, {"adapter_config.json": content, "adapter_model.safetensors": "w"})
    assert message(initial, saved).startswith(f"{saved}/adapter_config.json cannot be read (")


def test_a_model_of_another_program_starts_a_run(tmp_path):
    for name, changed in (("theirs", {}), ("base", {}), ("other", {"vocab_size": 10})):
        (tmp_path / name).mkdir()
        for file, content in model(tmp_path / name, **changed).items():
            (tmp_path / name / file).write_text(str(content))
    found = initial(tmp_path / "theirs", tmp_path / "base")
    assert (found.folder, found.is_adapter) == (tmp_path / "theirs", False)
    assert initial(tmp_path / "theirs", "hub/name").folder == tmp_path / "theirs"
    told = message(initial, tmp_path / "theirs", tmp_path / "other")
    assert told.endswith("is not the same model as --model m: vocab_size 9; use the model that it was trained from")


def test_a_checkpoint_of_full_fine_tuning_is_verified_first(out):
    out.mkdir()
    saved = save_checkpoint(out, 1, model(out))
    assert initial(saved).folder == saved
    damage(saved, "model.safetensors")
    assert f"{saved}/model.safetensors is damaged" in message(initial, saved)


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_an_interrupted_checkpoint_of_full_fine_tuning_is_no_model(out, how):
    out.mkdir()
    saved = save_checkpoint(out, 1, model(out))
    (saved / COMPLETE).unlink()
    if how == "emptied":
        (saved / COMPLETE).touch()
    told = message(initial, saved)
    assert "no COMPLETE file" in told if how == "deleted" else f"{saved}/COMPLETE is damaged" in told


def test_a_damaged_adapter_is_refused_and_the_older_one_offered(out):
    out.mkdir()
    first = adapter(out)
    text = (first / "adapter_config.json").read_text()
    second = save_checkpoint(out, 2, {"adapter_config.json": text, "adapter_model.safetensors": "w"})
    damage(second, "adapter_model.safetensors")
    assert message(initial, out).endswith(f"adapter_model.safetensors is damaged: its checksum does "
                                          f"not match; use {first}, which is intact")  # fmt: skip
    assert message(initial, second).endswith(f"; use {first}, which is intact")
    assert initial(second, check=False).folder == second  # another rank of the machine reads it


def test_a_state_alone_makes_it_a_checkpoint(tmp_path):
    for name, content in model(tmp_path).items():
        (tmp_path / name).write_text(str(content))
    assert initial(tmp_path).folder == tmp_path
    (tmp_path / STATE).write_text("{}")
    assert "no COMPLETE file" in message(initial, tmp_path)
