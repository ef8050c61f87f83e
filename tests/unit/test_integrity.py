"""COMPLETE and the checksums in it."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dsft.checkpointing import integrity
from dsft.checkpointing.integrity import COMPLETE, DamagedError, damages, listed_files, mark_complete, verify
from dsft.checkpointing.state import STATE
from tests.helpers import message, save_checkpoint

FILES = {"a.json": "{}", "weights.safetensors": "w" * 5000}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_checkpoint(tmp_path, 1, dict(FILES))


def wrong(checkpoint: Path, **options: bool) -> list[tuple[str, str]]:
    return [(damage.path.name, damage.what.split(" (")[0]) for damage in damages(checkpoint, **options)]


def test_complete_is_what_sha256sum_checks(checkpoint):
    done = subprocess.run(["sha256sum", "--strict", "-c", COMPLETE], cwd=checkpoint, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name}: OK" for name in ["a.json", "weights", "weights.safetensors", STATE]]
    verify(checkpoint)
    assert list(listed_files(checkpoint)) == ["a.json", "weights", "weights.safetensors", STATE]


def test_the_state_is_listed_last_so_that_a_list_cut_short_lacks_it(checkpoint):
    whole = (checkpoint / COMPLETE).read_bytes()
    for length in range(len(whole)):
        (checkpoint / COMPLETE).write_bytes(whole[:length])
        with pytest.raises(DamagedError, match="COMPLETE is damaged: the list of checksums is incomplete"):
            verify(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text + text.splitlines()[0] + "\n",
        lambda text: text.splitlines()[0] + "\n" + text,
        lambda text: text.replace("  a.json", "  ../a.json"),
        lambda text: text.replace("  a.json", " a.json"),
        lambda text: text.upper(),
        lambda text: text.replace("  a.json\n", "  a.json\r\n"),
    ],
)
def test_a_list_that_was_edited_is_refused(checkpoint, change):
    (checkpoint / COMPLETE).write_bytes(change((checkpoint / COMPLETE).read_text()).encode())
    with pytest.raises(DamagedError):
        verify(checkpoint)


def test_a_list_that_is_no_text_is_refused_in_one_line(checkpoint):
    (checkpoint / COMPLETE).write_bytes(b"\xff\xfe" * 40)
    assert message(verify, checkpoint).startswith(f"{checkpoint}/COMPLETE is damaged ('utf-8' codec can't decode")


def test_all_damages_are_found_those_that_need_no_reading_first(checkpoint):
    (checkpoint / "weights").write_text("other")
    (checkpoint / "a.json").unlink()
    (checkpoint / "weights-2.safetensors").touch()
    (checkpoint / "notes.txt").touch()
    assert wrong(checkpoint) == [
        ("a.json", "is missing"),
        ("weights-2.safetensors", "is not listed in COMPLETE"),
        ("weights", "is damaged: its checksum does not match"),
    ]
    assert wrong(checkpoint, compare=False) == wrong(checkpoint)[:2]
    assert message(verify, checkpoint) == f"{checkpoint}/a.json is missing"


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe"])
def test_what_is_no_file_is_missing(checkpoint, kind):
    path = checkpoint / "weights"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # to open it would wait for ever
    else:
        path.symlink_to("nowhere")
    assert message(verify, checkpoint) == f"{path} is missing"


def test_a_link_to_the_same_bytes_is_as_good_as_the_file(checkpoint, tmp_path):
    shutil.move(checkpoint / "weights", tmp_path / "stored")
    (checkpoint / "weights").symlink_to(tmp_path / "stored")
    verify(checkpoint)


def refuse(number: int):
    def checksum(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    return checksum


def test_a_disk_that_cannot_give_a_file_back_means_damage(checkpoint, monkeypatch):
    monkeypatch.setattr(integrity, "checksum", refuse(errno.EIO))
    with pytest.raises(DamagedError, match=r"a\.json is damaged: Input/output error"):
        verify(checkpoint)


def test_a_file_that_may_not_be_read_is_no_damage(checkpoint, monkeypatch):
    monkeypatch.setattr(integrity, "checksum", refuse(errno.EACCES))
    told = message(verify, checkpoint)
    assert told == f"{checkpoint}/a.json cannot be read: Permission denied; make it readable, or choose another"
    with pytest.raises(integrity.UserError) as caught:
        verify(checkpoint)
    assert not isinstance(caught.value, DamagedError)


def test_a_list_that_may_not_be_read_is_no_damage(checkpoint, monkeypatch):
    def read_bytes(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(integrity.UserError) as caught:
        verify(checkpoint)
    assert not isinstance(caught.value, DamagedError)
    assert (
        str(caught.value)
        == f"{checkpoint}/COMPLETE cannot be read: Permission denied; make it readable, or choose another"
    )


def test_a_file_deleted_while_it_is_read_is_missing(checkpoint, monkeypatch):
    monkeypatch.setattr(integrity, "checksum", refuse(errno.ENOENT))
    assert message(verify, checkpoint) == f"{checkpoint}/a.json is missing"


def test_complete_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(integrity, "write_text", lambda path, text: seen.append((path.name, text)))
    mark_complete(tmp_path, {STATE: "0" * 64, "z": "1" * 64, "a": "2" * 64})
    assert seen == [(COMPLETE, f"{'2' * 64}  a\n{'1' * 64}  z\n{'0' * 64}  {STATE}\n")]
