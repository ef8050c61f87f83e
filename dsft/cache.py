"""The cache folder of this machine: $DSFT_CACHE, else $XDG_CACHE_HOME/dsft, else ~/.cache/dsft. It may be deleted."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dsft.errors import UserError


def cache_folder() -> Path:
    """The folder, created if it is missing. Raises UserError if it cannot be created."""
    base = os.environ.get("DSFT_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsft"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}; set DSFT_CACHE to a writable folder") from error
    return folder


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, filled by `build(folder)` unless a process on this machine already did.

    It is built under a temporary name and renamed, so a folder that exists is complete.
    """
    target = cache_folder() / name
    if target.exists():
        return target
    unfinished = target.with_name(f"{target.name}.{socket.gethostname()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):  # released by the kernel if this process is killed
            if not target.exists():
                shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
                unfinished.mkdir()
                try:
                    build(unfinished)
                    _rename(unfinished, target)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        why = f"{error.strerror or error}; free some space, or set DSFT_CACHE to another folder"
        raise UserError(f"cannot write {unfinished}: {why}") from error
    return target


def _rename(unfinished: Path, target: Path) -> None:
    """Accept the folder of another host that shares the cache, has no lock in common and was first."""
    try:
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
