"""COMPLETE: the checksums of a checkpoint's files, written last. `sha256sum -c COMPLETE` checks them too."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsft.checkpointing.state import STATE
from dsft.errors import UserError
from dsft.files import reason, write_text

COMPLETE = "COMPLETE"
LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


class DamagedError(UserError):
    """A checkpoint is not what was written. The text names the file and what is wrong with it."""


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
        DamagedError: it cannot be read, or is not as it was written.
    """
    path = checkpoint / COMPLETE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    matches = [LINE.fullmatch(line) for line in lines[:-1]]
    sums = {match[2]: match[1] for match in matches if match}
    if lines[-1] != "" or None in matches or len(sums) != len(matches) or list(sums)[-1:] != [STATE]:
        raise DamagedError(f"{path} is damaged: it is no whole list of checksums")
    return sums


def verify(checkpoint: Path) -> None:
    """Read every file of a checkpoint and compare its checksum.

    Raises:
        DamagedError: naming the first file that is missing, damaged, or none of this checkpoint.
        UserError: the operating system refuses to read one.
    """
    sums = listed_files(checkpoint)
    for name in sums:
        if not (checkpoint / name).is_file():
            raise DamagedError(f"{checkpoint / name} is missing")
    try:
        unknown = sorted(p.name for p in checkpoint.glob("*.safetensors*") if p.name not in sums)
        if unknown:
            raise DamagedError(f"{checkpoint / unknown[0]} does not belong to the checkpoint: {COMPLETE} lacks it")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = dict(zip(sums, pool.map(lambda name: checksum(checkpoint / name), sums), strict=True))
    except OSError as error:
        place = getattr(error, "filename", None) or checkpoint
        raise UserError(f"{place} cannot be read: {reason(error)}; make it readable, or name another") from error
    for name, value in found.items():
        if value != sums[name]:
            raise DamagedError(f"{checkpoint / name} is damaged: its checksum is not the one it was written with")


def checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
