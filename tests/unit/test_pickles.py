"""A pickle runs what it names when it is read. None is ever read: not in a checkpoint file's place, not beside it.

Each payload leaves a marker where it is executed. Where the checksums were made to match too, the command refuses the
file by its form, or does not read it at all.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpointing.folder import CheckpointFolder, find_checkpoint
from dsft.checkpointing.inspection import inspect
from dsft.checkpointing.integrity import COMPLETE, DamagedError, verify
from dsft.checkpointing.state import STATE
from tests.commands import Commands, TrainedRuns
from tests.helpers import Done, flags, message, sign

FILES = [
    COMPLETE, "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.yaml",
    "metrics.jsonl", "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json", STATE,
]  # fmt: skip
BESIDE = [
    "adapter_model.bin", "pytorch_model.bin", "model.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt",
    "training_args.bin", "rng_state.pth", "adapter_model.pt", "tokenizer.pkl", "mp_rank_00_model_states.pt",
]  # fmt: skip


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def saved(marker: Path, *, as_zip: bool) -> bytes:
    path = marker.with_name("made.pt")
    torch.save({"weight": torch.ones(2), "trap": Trap(marker)}, path, _use_new_zipfile_serialization=as_zip)
    return path.read_bytes()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda marker: pickle.dumps(Trap(marker)),
    "text": lambda marker: pickle.dumps(Trap(marker), protocol=0),
    "zip": lambda marker: saved(marker, as_zip=True),
    "legacy": lambda marker: saved(marker, as_zip=False),
}


@pytest.fixture
def marker(tmp_path):
    """What an executed payload leaves; at the end of each test it must not be there."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "a pickle was executed"


@pytest.mark.parametrize("kind", PAYLOADS)
def test_the_payloads_do_work(tmp_path, kind):
    marker = tmp_path / "executed"
    path = tmp_path / "payload"
    path.write_bytes(PAYLOADS[kind](marker))
    if kind in ("pickle", "text"):
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False)["trap"].close()
    assert marker.exists()


def put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.fixture
def out(trained_runs, tmp_path) -> Path:
    return trained_runs.copy("lora", tmp_path / "run")


@pytest.fixture
def newest(out) -> Path:
    return out / "checkpoint-000002"


def all_commands(commands: Commands, trained_runs: TrainedRuns, out: Path, newest: Path) -> dict[str, Done]:
    """Every command that reads a checkpoint."""
    folder = out.parent
    usual = trained_runs.flags("lora")
    options = ["--model", usual["model"], "--data", usual["train_files"], "--episodes", "1", "--max_new_tokens", "1"]
    elsewhere = trained_runs.words("lora", folder / "new", init_from=newest)
    return {
        "inspect": commands.run("dsft.checkpoint", [newest]),
        "merge": commands.run("dsft.merge", ["--checkpoint", newest, "--output", folder / "merged"]),
        "validate": commands.run("dsft.validate", [*options, "--adapter", newest, "--output", folder / "report.json"]),
        "init_from": commands.run("dsft.train", elsewhere),
        "resume": commands.run("dsft.train", trained_runs.words("lora", out, resume=newest)),
    }


def told_in_one_line(done: Done) -> None:
    assert done.status == 1, done.out
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ")


# In a file's place


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", FILES)
def test_in_place_of_a_file_it_is_refused_before_anything_is_read(out, newest, marker, name, payload):
    put(newest / name, PAYLOADS[payload](marker))
    with pytest.raises(DamagedError) as caught:
        verify(newest)
    assert str(caught.value).startswith(f"{newest / name} is damaged")
    for flag in ("resume", "checkpoint", "adapter", "init_from"):
        told = message(find_checkpoint, str(newest), flag)
        assert told == f"--{flag} {newest}: {caught.value}; use {out}/checkpoint-000001, which is intact"
    for verifying in (True, False):
        report = inspect(str(newest), verify=verifying)
        is_read = verifying or name in (COMPLETE, STATE, "config.yaml") or name.endswith(".safetensors")
        assert (report.problem is not None) == is_read
    warnings: list[str] = []
    assert CheckpointFolder(out).newest_sound(warnings.append) == out / "checkpoint-000001"
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "name", [n if n == "adapter_model.safetensors" else pytest.param(n, marks=pytest.mark.slow) for n in FILES]
)
def test_the_commands_refuse_it(commands, trained_runs, out, newest, marker, name):
    put(newest / name, PAYLOADS["text"](marker))
    for command, done in all_commands(commands, trained_runs, out, newest).items():
        if command == "validate":  # see test_validate_verifies_its_adapter
            continue
        told_in_one_line(done)
        assert f"{newest / name} is damaged" in done.err, command
    done = trained_runs.resume("lora", out)  # auto
    assert done.status == 0
    assert f"warning: {newest / name} is damaged" in done.err


# With a checksum of its own

READ_BY = {
    "adapter_config.json": {"merge", "init_from"},
    "adapter_model.safetensors": {"inspect", "merge", "validate", "init_from", "resume"},
    "config.yaml": {"inspect", "resume"},
    "optimizer.safetensors": {"inspect", "resume"},
    "tokenizer.json": {"merge"},
    "tokenizer_config.json": {"merge"},
    STATE: {"inspect", "resume"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "payload"),
    [(name, "zip") for name in FILES[1:]] + [(name, "text") for name in FILES[1:] if "safetensors" not in name],
)
def test_with_a_checksum_of_its_own_it_is_refused_by_its_form_or_not_read(
    commands, trained_runs, out, newest, marker, name, payload
):
    put(newest / name, PAYLOADS[payload](marker))
    sign(newest)
    verify(newest)
    for command, done in all_commands(commands, trained_runs, out, newest).items():
        is_read = command in READ_BY.get(name, set()) or (name, command, payload) == ("metrics.jsonl", "resume", "zip")
        if is_read:
            told_in_one_line(done)
        else:
            assert done.status in (0, 1)
            assert "Traceback" not in done.err
            assert len(done.err.splitlines()) <= 1


# Beside the files


@pytest.mark.slow
def test_beside_the_files_it_is_not_touched(commands, trained_runs, out, newest, marker):
    for i, name in enumerate(BESIDE):
        put(newest / name, list(PAYLOADS.values())[i % 4](marker))
    for command, done in all_commands(commands, trained_runs, out, newest).items():
        assert done.status == 0, (command, done.err)


@pytest.mark.slow
def test_beside_the_files_of_full_fine_tuning_it_is_not_touched(commands, trained_runs, tmp_path, marker):
    out = trained_runs.copy("full", tmp_path / "run")
    newest = out / "checkpoint-000002"
    for name in BESIDE:
        put(newest / name, PAYLOADS["zip"](marker))
    usual = trained_runs.flags("full")
    options = ["--model", newest, "--data", usual["train_files"], "--episodes", "1", "--max_new_tokens", "1"]
    for done in (
        trained_runs.resume("full", out),
        commands.run("dsft.validate", [*options, "--output", tmp_path / "report.json"]),
        commands.run("dsft.train", trained_runs.words("full", tmp_path / "new", init_from=newest)),
        commands.run("dsft.train", trained_runs.words("full", tmp_path / "newer", model=newest)),
    ):
        assert done.status == 0, done.err


# Instead of the safetensors: what transformers and PEFT would read


@pytest.mark.slow
@pytest.mark.parametrize("signed", [False, True])
def test_weights_that_are_only_there_as_a_pickle(commands, trained_runs, out, newest, marker, signed):
    (newest / "adapter_model.safetensors").unlink()
    put(newest / "adapter_model.bin", PAYLOADS["zip"](marker))
    if signed:
        sign(newest)
    for command, done in all_commands(commands, trained_runs, out, newest).items():
        if signed and command == "inspect":
            assert "adapter_model.bin" in done.out
            assert done.status == 0  # it is what was signed
        elif command == "init_from":
            told_in_one_line(done)
        elif not (signed and command == "validate"):  # see test_validate_never_falls_back_to_a_pickle
            told_in_one_line(done)
            assert f"{newest}/adapter_model.safetensors is missing" in done.err, command


# Where a checkpoint is used as a model or an adapter without being asked for as a checkpoint

BYPASS = "reads a checkpoint's files without verifying them"


def evaluate(commands: Commands, trained_runs: TrainedRuns, folder: Path, **named: Any) -> Done:
    usual = trained_runs.flags("lora")
    more = {"data": usual["train_files"], "episodes": 1, "max_new_tokens": 1, "output": folder / "report.json"}
    return commands.run("dsft.validate", flags(**{"model": usual["model"], **named, **more}))


@pytest.mark.slow
def test_validate_verifies_its_adapter(commands, trained_runs, out, newest, tmp_path):
    put(newest / "optimizer.safetensors", b"")
    done = evaluate(commands, trained_runs, tmp_path, adapter=newest)
    told_in_one_line(done)
    assert f"{newest}/optimizer.safetensors is damaged" in done.err


@pytest.mark.slow
def test_validate_never_falls_back_to_a_pickle(commands, trained_runs, out, newest, marker, tmp_path):
    (newest / "adapter_model.safetensors").unlink()
    put(newest / "adapter_model.bin", PAYLOADS["zip"](marker))
    sign(newest)
    done = evaluate(commands, trained_runs, tmp_path, adapter=newest)
    told_in_one_line(done)
    assert f"{newest}/adapter_model.safetensors is missing" in done.err


@pytest.mark.slow
def test_a_checkpoint_as_a_model_is_verified(commands, trained_runs, tmp_path):
    newest = trained_runs.copy("full", tmp_path / "run") / "checkpoint-000002"
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-5] ^= 64
    put(newest / "model.safetensors", bytes(weights))
    done = evaluate(commands, trained_runs, tmp_path, model=newest)
    told_in_one_line(done)
    assert f"{newest}/model.safetensors is damaged" in done.err
