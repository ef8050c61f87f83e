"""Files that are complete or absent, and errors of the operating system as one line."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dsft.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name, flush it to disk, and rename it."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


def make_readable(path: Path) -> None:
    """Give a file the permissions of the user's umask; safetensors creates files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def guard_disk(work: Callable[[], Any], path: Path) -> None:
    """Run something that writes `path`; an error of the operating system becomes a UserError."""
    try:
        work()
    except Exception as error:
        if not is_refusal(error):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        remedy = "free some space and rerun the same command" if full else "choose another folder, or make it writable"
        raise UserError(f"cannot write {path}: {reason(error)}; {remedy}") from error


def is_refusal(error: Exception) -> bool:
    """Whether an error comes from the operating system. The tokenizers library raises a plain Exception for those."""
    return isinstance(error, (OSError, SafetensorError)) or "(os error " in str(error)


def reason(error: Exception) -> str:
    """The operating system's message."""
    code = getattr(error, "errno", None)
    if code == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error)
