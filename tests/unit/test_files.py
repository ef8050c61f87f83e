"""Files that are whole or absent."""

import errno

import pytest

from dsft import files
from dsft.files import write_text


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(tmp_path / "f", "old")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
