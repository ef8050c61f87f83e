"""COMPLETE: the checksums of a checkpoint's files, written last. `sha256sum -c COMPLETE` checks them too."""

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
    """A checkpoint is not what was written: which file, and what is wrong with it."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}")
        self.path, self.what = path, what


def mark_complete(folder: Path, sums: dict[str, str]) -> None:
    """Write COMPLETE.

    Args:
        folder: of the checkpoint.
        sums: SHA-256 in hexadecimal digits by file name, trainer_state.json among them.
    """
    names = sorted(sums, key=lambda name: (name == STATE, name))  # it stands last: a file cut short lacks it
    write_text(folder / COMPLETE, "".join(f"{sums[name]}  {name}\n" for name in names))


def listed_files(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by file name, from COMPLETE.

    Raises:
        DamagedError: it is not there, or not as it was written.
        UserError: the operating system does not permit to read it.
    """
    path = checkpoint / COMPLETE
    try:
        lines = path.read_bytes().decode().split("\n")  # as text, "\r\n" would read as "\n"
    except PermissionError as error:  # no reason to take the checkpoint for damaged
        raise UserError(f"{path} cannot be read: {reason(error)}; make it readable, or name another") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(path, f"is damaged ({error})") from error
    matches = [LINE.fullmatch(line) for line in lines[:-1]]
    sums = {match[2]: match[1] for match in matches if match}
    if lines[-1] != "" or None in matches or len(sums) != len(matches) or list(sums)[-1:] != [STATE]:
        raise DamagedError(path, "is damaged: it is no whole list of checksums")
    return sums


def verify(checkpoint: Path) -> None:
    """Read every file of a checkpoint and compare its checksum.

    Raises:
        DamagedError: naming the first file that is missing, damaged, or none of this checkpoint.
        UserError: the operating system refuses to read one.
    """
    for damage in damages(checkpoint):
        raise damage


def damages(checkpoint: Path, *, compare: bool = True) -> Iterator[DamagedError]:
    """All that is wrong with a checkpoint; what can be seen without reading its files comes first.

    Args:
        checkpoint: its folder.
        compare: read the files, and compare their checksums.

    Raises:
        UserError: the operating system refuses to read one.
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
            yield DamagedError(checkpoint / name, f"does not belong to the checkpoint: {COMPLETE} lacks it")
        if not compare:
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda name: _compare(checkpoint / name, sums[name]), present)
        yield from (damage for damage in found if damage is not None)
    except OSError as error:
        place = getattr(error, "filename", None) or checkpoint
        raise UserError(f"{place} cannot be read: {reason(error)}; make it readable, or name another") from error


def _compare(path: Path, expected: str) -> DamagedError | None:
    try:
        same = checksum(path) == expected
    except FileNotFoundError:
        return DamagedError(path, "is missing")
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return DamagedError(path, f"is damaged: {reason(error)}")  # the disk itself cannot give it back
    return None if same else DamagedError(path, "is damaged: its checksum is not the one it was written with")


def checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
