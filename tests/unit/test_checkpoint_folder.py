"""Which checkpoints a run's folder holds, in which order one comes into being, and who may write there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsft.checkpointing import folder
from dsft.checkpointing.folder import CheckpointFolder, find_checkpoint, step_of
from dsft.checkpointing.integrity import COMPLETE, verify
from dsft.checkpointing.state import STATE
from tests.helpers import ROOT, contents, message, save_checkpoint


@pytest.fixture
def run(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path)


def save(run: CheckpointFolder, *steps: int) -> list[Path]:
    return [save_checkpoint(run.root, step) for step in steps]


def names(run: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in run.root.iterdir())


def damage(checkpoint: Path) -> None:
    (checkpoint / "weights").write_text("other weights")


# How one comes into being


def test_a_checkpoint_has_its_name_only_when_its_files_are_there(run):
    folder = run.begin(100)
    (folder / "weights").write_text("w")
    assert (run.all(), names(run), folder.name) == ([], [".checkpoint-000100.tmp"] * 1, ".checkpoint-000100.tmp")
    save(run, 100)
    assert names(run) == ["checkpoint-000100"]
    assert sorted(p.name for p in run.path(100).iterdir()) == [COMPLETE, STATE, "weights"]


def test_complete_is_the_last_thing_written_after_all_else_is_on_the_disk(run, monkeypatch):
    done = []
    monkeypatch.setattr(folder, "sync", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(folder, "mark_complete", lambda path, sums: done.append(f"complete {path.name} {sorted(sums)}"))
    save(run, 1)
    assert done == [
        "sync .checkpoint-000001.tmp",
        f"sync {run.root.name}",
        f"complete checkpoint-000001 {[STATE, 'weights']}",
        "sync checkpoint-000001",
    ]


def test_begin_starts_with_an_empty_folder(run):
    (run.begin(1) / "old").touch()
    assert list(run.begin(1).iterdir()) == []


@pytest.mark.parametrize("named", [False, True])
def test_an_abandoned_checkpoint_vanishes_and_older_ones_stay(run, named):
    [old] = save(run, 1)
    (run.begin(2) / "weights").touch()
    if named:
        run.unfinished(2).rename(run.path(2))
    run.abandon(2)
    assert (names(run), run.latest()) == (["checkpoint-000001"], old)


def test_abandoning_a_repeated_step_leaves_its_complete_checkpoint(run):
    [saved] = save(run, 1)
    run.begin(1)
    run.abandon(1)
    assert names(run) == ["checkpoint-000001"]
    verify(saved)


def test_a_step_written_again_replaces_the_older_checkpoint(run):
    [saved] = save(run, 1)
    (saved / "stale").touch()
    save(run, 1)
    assert sorted(p.name for p in saved.iterdir()) == [COMPLETE, STATE, "weights"]


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


# What there is


def test_checkpoints_are_ordered_by_step_not_by_name(run):
    saved = save(run, 999_999, 1_000_000, 5)
    assert run.all() == [saved[2], saved[0], saved[1]]
    assert run.latest() == saved[1]
    assert [step_of(path) for path in run.all()] == [5, 999_999, 1_000_000]


def test_a_folder_without_complete_is_ignored_and_removed(run):
    old, new = save(run, 1, 2)
    (new / COMPLETE).unlink()
    (run.root / ".checkpoint-000003.tmp").mkdir()
    (run.root / ".checkpoint-000003.tmp" / "weights").touch()
    (run.root / ".small_files.tmp").mkdir()
    (run.root / ".latest.tmp").symlink_to("checkpoint-000001")
    (run.root / ".config.yaml.tmp").touch()
    (old / ".COMPLETE.tmp").touch()
    (run.root / "notes").mkdir()
    (run.root / "config.yaml").touch()
    assert (run.all(), run.latest()) == ([old], old)
    run.remove_unfinished()
    assert names(run) == ["checkpoint-000001", "config.yaml", "notes"]
    assert sorted(p.name for p in old.iterdir()) == [COMPLETE, STATE, "weights"]


def test_checkpoints_of_another_program_are_left_alone(run):
    (run.root / "checkpoint-100000").mkdir(parents=True)
    run.remove_unfinished()
    assert (run.all(), names(run)) == ([], ["checkpoint-100000"])


def test_no_folder_means_no_checkpoints(tmp_path):
    run = CheckpointFolder(tmp_path / "none")
    assert (run.all(), run.latest(), run.best()) == ([], None, None)
    assert run.newest_sound(pytest.fail) is None


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
    assert [step_of(path) for path in run.all()] == left
    assert len([name for name in names(run) if name.startswith("checkpoint")]) == len(left)


def test_a_rotation_killed_midway_leaves_no_half_deleted_checkpoint(run, monkeypatch):
    save(run, 1, 2)

    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.rotate(1)
    assert [step_of(path) for path in run.all()] == [2]


# Damaged ones


def test_the_newest_checkpoint_is_used_where_it_is_sound(run):
    save(run, 1, 2)
    assert run.newest_sound(pytest.fail) == run.path(2)


def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_used(run):
    save(run, 1, 2, 3)
    damage(run.path(2))
    damage(run.path(3))
    told: list[str] = []
    assert run.newest_sound(told.append) == run.path(1)
    assert names(run) == ["checkpoint-000001", "checkpoint-000002.damaged", "checkpoint-000003.damaged"]
    assert told == [
        f"{run.path(step)}/weights is damaged: its checksum does not match; renamed to "
        f"checkpoint-{step:06d}.damaged, resuming from checkpoint-000001"
        for step in (3, 2)
    ]
    assert run.newest_sound(pytest.fail) == run.path(1)


def test_nothing_is_renamed_where_no_checkpoint_is_sound(run):
    save(run, 1, 2)
    damage(run.path(1))
    damage(run.path(2))
    told = message(run.newest_sound, pytest.fail)
    assert told.startswith(f"{run.path(2)}/weights is damaged: ")
    assert told.endswith("; no older checkpoint is intact; restore the file, or choose another --output_dir")
    assert names(run) == ["checkpoint-000001", "checkpoint-000002"]


def test_older_damaged_checkpoints_are_no_concern_of_a_resume(run):
    save(run, 1, 2)
    damage(run.path(1))
    assert run.newest_sound(pytest.fail) == run.path(2)


def test_setting_aside_never_replaces_what_was_set_aside_before(run):
    for _ in range(3):
        run.set_aside(save(run, 1)[0], "superseded")
    assert names(run) == [f"checkpoint-000001.superseded{end}" for end in ("", ".2", ".3")]
    assert run.all() == []


# What a user names


def test_a_path_to_a_checkpoint_or_to_a_run_is_found(run):
    first, second = save(run, 1, 2)
    assert find_checkpoint(str(first), "resume") == first.resolve()
    assert find_checkpoint(str(run.root), "resume") == second
    run.point("best", first)
    assert find_checkpoint(str(run.root), "resume") == first.resolve()
    assert find_checkpoint(str(run.root / "best"), "resume") == first.resolve()


def test_a_checkpoint_under_any_name_is_found(run, tmp_path):
    [saved] = save(run, 1)
    copied = shutil.copytree(saved, tmp_path / "elsewhere" / "mine")
    assert find_checkpoint(str(copied), "resume") == copied
    damage(copied)
    assert message(find_checkpoint, str(copied), "resume").endswith("; no other checkpoint of the run is intact")


def test_a_path_that_is_no_checkpoint_says_why(run, tmp_path):
    assert message(find_checkpoint, "/no/such", "resume").startswith("--resume /no/such: no such folder")
    told = message(find_checkpoint, str(tmp_path), "checkpoint")
    assert told.startswith(f"--checkpoint {tmp_path}: no complete checkpoint in this folder")


def test_a_checkpoint_without_complete_is_refused_and_a_sound_one_offered(run):
    first, second = save(run, 1, 2)
    (second / COMPLETE).unlink()
    assert message(find_checkpoint, str(second), "resume") == (
        f"--resume {second}: no COMPLETE file, so saving it was interrupted; use {first}, which is intact"
    )
    (first / COMPLETE).unlink()
    assert message(find_checkpoint, str(first), "resume").endswith("; no other checkpoint of the run is intact")


@pytest.mark.parametrize("named", ["checkpoint-000003", "."])
def test_a_damaged_checkpoint_is_refused_and_the_newest_sound_one_offered(run, named):
    save(run, 1, 2, 3)
    damage(run.path(3))
    before = contents(run.root)
    assert message(find_checkpoint, str(run.root / named), "init_from") == (
        f"--init_from {run.root / named}: {run.path(3)}/weights is damaged: its checksum "
        f"does not match; use {run.path(2)}, which is intact"
    )
    assert contents(run.root) == before


# The lock

HOLD = """
import sys, time
from dsft.checkpointing.folder import CheckpointFolder
run = CheckpointFolder(sys.argv[1])
run.lock()
run.lock()  # what is owned can be asked for again
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(run):
    """Another process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, run.root], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_owns_is_refused_by_its_number(run, owner, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.3)
    started = time.monotonic()
    told = message(run.lock)
    assert re.fullmatch(
        rf"{run.root} belongs to a run that is still running \(process {owner.pid} on .+\); wait for it, or choose "
        "another --output_dir",
        told,
    )
    assert 0.3 < time.monotonic() - started < 2
    assert not run.is_locked


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_folder_is_free_when_its_owner_has_ended_however_it_ended(run, owner, number):
    os.kill(owner.pid, number)
    run.lock()  # waits until the other is gone
    assert run.is_locked
    assert (run.root / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_is_free_when_its_run_has_ended_in_a_process_that_lives_on(run):
    run.lock()
    run.unlock()
    again = CheckpointFolder(run.root)
    again.lock()
    assert again.is_locked
    assert not run.is_locked


def test_reading_needs_no_lock(run, owner):
    [saved] = save(run, 1)
    assert find_checkpoint(str(run.root), "checkpoint") == saved


def test_a_lock_file_that_cannot_be_made_is_one_line(run):
    (run.root / ".lock").mkdir()
    assert (
        message(run.lock)
        == f"cannot write {run.root}/.lock: Is a directory; choose another folder, or make it writable"
    )


def test_a_file_system_without_locks_stops_no_run(run, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    run.lock()
    assert run.is_locked
