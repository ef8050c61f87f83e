"""What is on disk, and what a killed or failed run leaves there."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsft import checkpoint, files, tensor_files
from dsft.checkpoint import (
    COMPLETE,
    STATE,
    CheckpointFolder,
    TrainerState,
    find_checkpoint,
    read_state,
    write_state,
)
from dsft.errors import UserError
from dsft.files import write_text
from dsft.tensor_files import TensorReader, write_tensors


@pytest.fixture
def run(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path)


def save(run: CheckpointFolder, *steps: int) -> list[Path]:
    for step in steps:
        with run.writing(step) as folder:
            (folder / "weights").write_text(f"weights of {step}")
    return [run.root / f"checkpoint-{step:06d}" for step in steps]


def names(run: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in run.root.iterdir())


def message(work, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_appears_whole_under_its_name(run):
    with run.writing(100) as folder:
        (folder / "weights").write_text("w")
        assert run.all() == []
        assert folder.name == ".checkpoint-000100.tmp"
    assert names(run) == ["checkpoint-000100"]
    assert sorted(p.name for p in (run.root / "checkpoint-000100").iterdir()) == [COMPLETE, "weights"]


def test_complete_is_the_last_thing_written(run, monkeypatch):
    seen = []

    def write(path, text):
        seen.append((path.name, sorted(p.name for p in path.parent.iterdir())))

    monkeypatch.setattr(checkpoint, "write_text", write)
    save(run, 1)
    assert seen == [(COMPLETE, ["weights"])]


def test_checkpoints_are_ordered_by_step_not_by_name(run):
    saved = save(run, 999_999, 1_000_000, 5)
    assert run.all() == [saved[2], saved[0], saved[1]]
    assert run.latest() == saved[1]
    assert [checkpoint.step_of(path) for path in run.all()] == [5, 999_999, 1_000_000]


def test_a_folder_without_complete_is_ignored_and_removed(run):
    old, new = save(run, 1, 2)
    (new / COMPLETE).unlink()
    (run.root / ".checkpoint-000003.tmp").mkdir()
    (run.root / ".checkpoint-000003.tmp" / "weights").touch()
    (run.root / ".latest.tmp").symlink_to("checkpoint-000001")
    (run.root / ".config.yaml.tmp").touch()
    (run.root / "notes").mkdir()
    (run.root / "config.yaml").touch()
    assert (run.all(), run.latest()) == ([old], old)
    run.remove_unfinished()
    assert names(run) == ["checkpoint-000001", "config.yaml", "notes"]


def test_checkpoints_of_another_program_are_left_alone(run):
    (run.root / "checkpoint-100000").mkdir(parents=True)
    run.remove_unfinished()
    assert (run.all(), names(run)) == ([], ["checkpoint-100000"])


def test_no_folder_means_no_checkpoints(tmp_path):
    run = CheckpointFolder(tmp_path / "none")
    assert (run.all(), run.latest(), run.best()) == ([], None, None)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("lost a rank")])
def test_a_checkpoint_that_fails_vanishes_and_older_ones_stay(run, error):
    [old] = save(run, 1)

    def fail():
        with run.writing(2) as folder:
            (folder / "weights").touch()
            raise error

    with pytest.raises((UserError, RuntimeError)):
        fail()
    assert names(run) == ["checkpoint-000001"]
    assert run.latest() == old


def test_a_full_disk_is_one_line_that_names_the_checkpoint_still_valid(run):
    [old] = save(run, 1)

    def fail():
        with run.writing(2):
            raise OSError(errno.ENOSPC, "No space left on device")

    told = message(fail)
    target = run.root / "checkpoint-000002"
    assert told.startswith(f"cannot save {target}: the disk is full; {old} is still valid; make room")


def test_a_first_checkpoint_that_fails_says_that_there_is_no_older_one(run):
    def fail():
        with run.writing(2):
            raise PermissionError(errno.EACCES, "Permission denied")

    assert "Permission denied; there is no older checkpoint" in message(fail)


def test_a_step_written_again_replaces_the_older_checkpoint(run):
    [saved] = save(run, 1)
    (saved / "stale").touch()
    save(run, 1)
    assert sorted(p.name for p in saved.iterdir()) == [COMPLETE, "weights"]


def test_a_replaced_checkpoint_killed_while_it_is_deleted_is_no_checkpoint(run, monkeypatch):
    [saved] = save(run, 1)

    def killed(path, **_):
        if Path(path) == saved:
            (saved / "weights").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 1)
    assert run.all() == []


def test_links_show_to_checkpoints_and_can_be_moved(run):
    first, second = save(run, 1, 2)
    run.point("best", first)
    run.point("latest", first)
    run.point("latest", second)
    assert (run.root / "latest").readlink() == Path("checkpoint-000002")
    assert run.best() == first.resolve()
    assert names(run) == ["best", "checkpoint-000001", "checkpoint-000002", "latest"]


def test_best_is_nothing_where_its_checkpoint_is_incomplete(run):
    [saved] = save(run, 1)
    run.point("best", saved)
    (saved / COMPLETE).unlink()
    assert run.best() is None


@pytest.mark.parametrize(
    ("best", "keep", "left"),
    [(1, 1, [1, 4]), (1, 2, [1, 3, 4]), (4, 1, [4]), (3, 2, [3, 4]), (None, 1, [4]), (1, None, [1, 2, 3, 4])],
)
def test_rotation_never_deletes_best_or_latest(run, best, keep, left):
    saved = save(run, 1, 2, 3, 4)
    if best is not None:
        run.point("best", saved[best - 1])
    run.rotate(keep)
    assert [checkpoint.step_of(path) for path in run.all()] == left
    assert len([name for name in names(run) if name.startswith("checkpoint")]) == len(left)


def test_a_rotation_killed_midway_leaves_no_half_deleted_checkpoint(run, monkeypatch):
    save(run, 1, 2)

    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.rotate(1)
    assert [checkpoint.step_of(path) for path in run.all()] == [2]


def test_a_path_to_a_checkpoint_or_to_a_run_is_found(run):
    first, second = save(run, 1, 2)
    assert find_checkpoint(str(first), "resume") == first.resolve()
    assert find_checkpoint(str(run.root), "resume") == second
    run.point("best", first)
    assert find_checkpoint(str(run.root), "resume") == first.resolve()
    assert find_checkpoint(str(run.root / "best"), "resume") == first.resolve()


def test_a_path_that_is_no_checkpoint_says_why(run, tmp_path):
    assert message(find_checkpoint, "/no/such", "resume").startswith("--resume /no/such: no such folder")
    told = message(find_checkpoint, str(tmp_path), "checkpoint")
    assert told.startswith(f"--checkpoint {tmp_path}: the folder holds no complete checkpoint")
    [saved] = save(run, 1)
    (saved / STATE).touch()
    (saved / COMPLETE).unlink()
    told = message(find_checkpoint, str(saved), "resume")
    assert told.startswith(f"--resume {saved}: the checkpoint has no COMPLETE file; its writing was interrupted")


STATES = TrainerState(
    3, 6, 0.5, "fsdp", 2, "abc", val_loss=1.25, best_step=2, best_val_loss=1.0, versions={"torch": "2"}
)


def test_the_state_reads_back_as_it_was_written(tmp_path):
    write_state(tmp_path, STATES)
    assert read_state(tmp_path) == STATES
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


@pytest.mark.parametrize("text", ["", '{"step": 3', "[]", '{"step": 3}', '{"stepp": 3}', None])
def test_a_damaged_state_is_refused_in_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / STATE).write_text(text)
    told = message(read_state, tmp_path)
    assert told.startswith(f"{tmp_path}/trainer_state.json is damaged (")
    assert "--resume" in told.split("); ")[-1]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(tmp_path / "f", "old")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"


def tensors(count: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(4, i + 1, generator=generator) for i in range(count)}


def test_tensors_read_back_bit_for_bit(tmp_path):
    written = tensors() | {"half": torch.ones(3, dtype=torch.bfloat16), "turned": torch.arange(6.0).reshape(2, 3).T}
    write_tensors(tmp_path, "optimizer", iter(written.items()))
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.safetensors"]
    read = TensorReader(tmp_path, "optimizer")
    assert all(torch.equal(read(name), tensor) and read(name).dtype == tensor.dtype for name, tensor in written.items())


def test_many_bytes_are_written_in_numbered_files_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 100)  # tensors of 16, 32, 48, 64 and 80 bytes
    write_tensors(tmp_path, "model", iter(tensors().items()))
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    assert [len(load_file(tmp_path / file)) for file in files] == [3, 1, 1]
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(weight_map.values()) == [files[0]] * 3 + files[1:]
    read = TensorReader(tmp_path, "model")
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors().items())


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 1)
    write_tensors(tmp_path, "model", iter(tensors(2).items()))
    assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2


def test_ranks_that_write_nothing_go_through_all_tensors():
    left = iter(tensors().items())
    write_tensors(None, "model", left)
    assert list(left) == []


def test_tensors_are_consumed_to_the_end_even_when_writing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 1)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    left = iter(tensors().items())
    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path, "model", left)
    assert list(left) == []


@pytest.mark.parametrize("damage", [lambda b: b[:-8], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_damaged_safetensors_are_refused_in_one_line(tmp_path, damage):
    write_tensors(tmp_path, "adapter_model", iter(tensors().items()))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    told = message(TensorReader, tmp_path, "adapter_model")
    assert told.startswith(f"{file} is damaged (")
    assert "--resume" in told.split("); ")[-1]


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    assert message(TensorReader, tmp_path, "optimizer").startswith(f"{tmp_path}/optimizer.safetensors is missing; ")


def test_a_missing_numbered_file_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 100)
    write_tensors(tmp_path, "model", iter(tensors().items()))
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    told = message(TensorReader, tmp_path, "model")
    assert told.startswith(f"missing: 1 of the 3 files {tmp_path}/model-*.safetensors; ")


def test_a_tensor_that_is_not_there_is_refused_in_one_line(tmp_path):
    write_tensors(tmp_path, "model", iter(tensors().items()))
    told = message(TensorReader(tmp_path, "model"), "other")
    assert told.startswith(f"{tmp_path}/model.safetensors holds no 'other'")
