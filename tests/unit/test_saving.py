"""Writing a checkpoint, on one rank: what it holds, and what stays where it cannot be written."""

import errno
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsft.backends.base import StateSlice
from dsft.checkpointing import folder, saving, tensor_files
from dsft.checkpointing.folder import CheckpointFolder
from dsft.checkpointing.integrity import COMPLETE, verify
from dsft.checkpointing.saving import Checkpointer, Snapshot
from dsft.checkpointing.state import STATE, TrainerState, read_state
from dsft.checkpointing.tensor_files import TensorReader
from dsft.distributed.runtime import World
from dsft.errors import UserError
from tests.helpers import contents, message, seeded_tensor

ONE = World(0, 1, 0, 1)
SHAPES = {"layer.0": (7, 5), "layer.1": (30,), "scale": ()}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {name: seeded_tensor(f"{name} {step}", shape or (1,)).reshape(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def run(tmp_path) -> CheckpointFolder:
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\nhalf a li")
    return CheckpointFolder(tmp_path)


def snapshot(run: CheckpointFolder, step: int, *, stem: str = "adapter_model", is_best: bool = False) -> Snapshot:
    def slices(kind: str) -> list[tuple[str, StateSlice]]:
        return [
            (name, StateSlice(kind, name, tuple(t.shape), 0, t.reshape(-1).clone()))
            for name, t in tensors(step).items()
        ]

    return Snapshot(
        state=TrainerState(step, 9, step / 9, "fsdp", 1, "rows"),
        slices={stem: slices("parameter"), "optimizer": [(f"exp_avg.{n}", s) for n, s in slices("exp_avg")]},
        small_files={"config.yaml": b"lr: 1\n"},
        metrics=(run.root / "metrics.jsonl", 8),
        is_best=is_best,
    )


def writer(run: CheckpointFolder, *, keep: int | None = None, asynchronous: bool = False) -> Checkpointer:
    return Checkpointer(run, ONE, keep=keep, asynchronous=asynchronous)


def refusal(checkpointer: Checkpointer, snapshot: Snapshot) -> str:
    def save() -> None:
        checkpointer.save(snapshot)
        checkpointer.finish()

    return message(save)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_holds_all_and_is_sound(run, asynchronous):
    checkpointer = writer(run, asynchronous=asynchronous)
    checkpointer.save(snapshot(run, 3, is_best=True))
    checkpointer.finish()
    saved = run.path(3)
    verify(saved)
    names = {COMPLETE, STATE, "adapter_model.safetensors", "config.yaml", "metrics.jsonl", "optimizer.safetensors"}
    assert {path.name for path in saved.iterdir()} == names
    assert read_state(saved) == TrainerState(3, 9, 3 / 9, "fsdp", 1, "rows")
    assert (saved / "metrics.jsonl").read_text() == "one\ntwo\n"
    for name, tensor in tensors(3).items():
        assert load_file(saved / "adapter_model.safetensors")[name].equal(tensor)
        assert load_file(saved / "optimizer.safetensors")[f"exp_avg.{name}"].equal(tensor)
    assert (run.root / "latest").resolve() == (run.root / "best").resolve() == saved
    assert not list(run.root.glob(".*"))


def test_what_is_large_is_written_in_several_files_with_an_index(run, monkeypatch):
    monkeypatch.setattr(tensor_files, "LARGEST_FILE", 130)
    monkeypatch.setattr(tensor_files, "SMALLEST_SHARE", 1)
    monkeypatch.setattr(saving, "MESSAGE_BYTES", 50)
    writer(run).save(snapshot(run, 1, stem="model"))
    saved = run.path(1)
    verify(saved)
    assert len(list(saved.glob("model-*-of-00002.safetensors"))) == 2
    assert set(json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]) == set(SHAPES)
    reader = TensorReader(saved, "model")
    reader.check(SHAPES)
    for name, tensor in tensors(1).items():
        assert reader.read(name, 0, tensor.numel()).equal(tensor.reshape(-1))


def test_old_checkpoints_are_rotated_only_after_the_new_one_is_whole(run):
    checkpointer = writer(run, keep=1)
    for step in (1, 2, 3):
        checkpointer.save(snapshot(run, step, is_best=step == 1))
    assert [path.name for path in run.all()] == ["checkpoint-000001", "checkpoint-000003"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", ["write", "finish", "sync", "mark_complete"])
def test_a_full_disk_is_one_line_and_older_checkpoints_stay(run, monkeypatch, failing, asynchronous):
    checkpointer = writer(run, asynchronous=asynchronous)
    checkpointer.save(snapshot(run, 1))
    checkpointer.finish()
    before = contents(run.root)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files.TensorWriter if failing in ("write", "finish") else folder, failing, fail)
    assert refusal(checkpointer, snapshot(run, 2)) == (
        f"cannot save {run.path(2)}: the disk is full; {run.path(1)} is still valid; free some space and "
        "rerun the same command"
    )
    assert contents(run.root) == before
    assert run.latest() == run.path(1)


def test_a_first_checkpoint_that_fails_says_that_there_is_no_older_one(run, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tensor_files.TensorWriter, "write", fail)
    told = refusal(writer(run), snapshot(run, 2))
    assert told.startswith(f"cannot save {run.path(2)}: Permission denied; no older checkpoint exists; ")
    assert run.all() == []


def test_what_no_one_foresaw_is_one_line_too(run, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("over\nlines")

    monkeypatch.setattr(tensor_files.TensorWriter, "write", fail)
    assert "rank 0: ZeroDivisionError: over lines; no older checkpoint exists (--debug" in refusal(
        writer(run), snapshot(run, 1)
    )


def test_a_save_in_the_background_copies_what_the_next_step_changes(run, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    write = Checkpointer._write_tensors

    def wait(*arguments):
        started.set()
        assert go_on.wait(10)
        return write(*arguments)

    monkeypatch.setattr(Checkpointer, "_write_tensors", wait)
    checkpointer = writer(run, asynchronous=True)
    live = snapshot(run, 1)
    checkpointer.save(live)
    assert started.wait(10)
    for parts in live.slices.values():
        for _, part in parts:
            part.values.fill_(-1)
    go_on.set()
    checkpointer.finish()
    for name, tensor in tensors(1).items():
        assert load_file(run.path(1) / "adapter_model.safetensors")[name].equal(tensor)


def test_a_failure_in_the_background_is_seen_and_raised_once(run, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files.TensorWriter, "write", fail)
    checkpointer = writer(run, asynchronous=True)
    checkpointer.save(snapshot(run, 1))
    thread = checkpointer._thread
    assert thread is not None
    thread.join(10)
    assert checkpointer.has_failed
    with pytest.raises(UserError, match="the disk is full"):
        checkpointer.save(snapshot(run, 2))
    assert not checkpointer.has_failed
    checkpointer.finish()


def test_a_step_saved_again_replaces_its_checkpoint(run):
    checkpointer = writer(run)
    checkpointer.save(snapshot(run, 1))
    again = snapshot(run, 1)
    checkpointer.save(replace(again, state=replace(again.state, val_losses={"val/loss": 1.5})))
    verify(run.path(1))
    assert read_state(run.path(1)).val_loss == 1.5


def test_everything_is_on_the_disk_before_the_name_and_the_name_before_complete(run, monkeypatch):
    seen: list[str] = []
    fsync, mark = saving.os.fsync, folder.mark_complete

    def fsync_(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(saving.os, "fsync", fsync_)
    monkeypatch.setattr(folder, "mark_complete", lambda *a: (seen.append("mark"), mark(*a)))
    writer(run).save(snapshot(run, 1))
    files = {STATE, "adapter_model.safetensors", "config.yaml", "metrics.jsonl", "optimizer.safetensors"}
    assert set(seen[:5]) == files
    assert seen[5:] == [".checkpoint-000001.tmp", run.root.name, "mark", ".COMPLETE.tmp", "checkpoint-000001"]
