"""COMPLETE: the checksums of a checkpoint's files, written last, in the format of `sha256sum -c COMPLETE`."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsft.checkpointing.state import STATE
from dsft.errors import UserError
from dsft.files import reason, write_text

COMPLETE = "COMPLETE"
LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


class DamagedError(UserError):
    """A file of a checkpoint is not as it was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}")
        self.path, self.what = path, what


def mark_complete(folder: Path, sums: dict[str, str]) -> None:
    """Write COMPLETE; `sums` are SHA-256 in hexadecimal digits by file name, trainer_state.json among them."""
    names = sorted(sums, key=lambda name: (name == STATE, name))  # last, so that a truncated list lacks it
    write_text(folder / COMPLETE, "".join(f"{sums[name]}  {name}\n" for name in names))


def listed_files(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by file name, from COMPLETE.

    Raises:
        DamagedError: it is missing, or not as it was written.
        UserError: permission denied.
    """
    path = checkpoint / COMPLETE
    try:
        lines = path.read_bytes().decode().split("\n")  # as text, "\r\n" would read as "\n"
    except PermissionError as error:  # which does not mean damaged
        raise UserError(f"{path} cannot be read: {reason(error)}; make it readable, or choose another") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(path, f"is damaged ({error})") from error
    matches = [LINE.fullmatch(line) for line in lines[:-1]]
    sums = {match[2]: match[1] for match in matches if match}
    if lines[-1] != "" or None in matches or len(sums) != len(matches) or list(sums)[-1:] != [STATE]:
        raise DamagedError(path, "is damaged: the list of checksums is incomplete")
    return sums


def verify(checkpoint: Path) -> None:
    """Compare the checksum of every file of a checkpoint.

    Raises:
        DamagedError: for the first file that is missing, damaged or unexpected.
        UserError: a file cannot be read.
    """
    for damage in damages(checkpoint):
        raise damage


def damages(checkpoint: Path, *, compare: bool = True) -> Iterator[DamagedError]:
    """Everything that is wrong with a checkpoint; what needs no reading of its files comes first.

    Args:
        compare: read the files and compare their checksums.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        sums = listed_files(checkpoint)
    except DamagedError as error:
        yield error
        return
    try:
        present = [name for name in sums if (checkpoint / name).is_file()]
        for name in sums:
            if name not in present:
                yield DamagedError(checkpoint / name, "is missing")
        for name in sorted(p.name for p in checkpoint.glob("*.safetensors*") if p.name not in sums):
            yield DamagedError(checkpoint / name, f"is not listed in {COMPLETE}")
        if not compare:
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda name: _compare(checkpoint / name, sums[name]), present)
        yield from (damage for damage in found if damage is not None)
    except OSError as error:
        place = getattr(error, "filename", None) or checkpoint
        raise UserError(f"{place} cannot be read: {reason(error)}; make it readable, or choose another") from error


def _compare(path: Path, expected: str) -> DamagedError | None:
    try:
        same = checksum(path) == expected
    except FileNotFoundError:
        return DamagedError(path, "is missing")
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return DamagedError(path, f"is damaged: {reason(error)}")  # a bad disk
    return None if same else DamagedError(path, "is damaged: its checksum does not match")


def checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
