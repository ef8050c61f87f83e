"""The cache folder of this machine: things made once, by whichever process comes first.

Its place is $DSFT_CACHE, else $XDG_CACHE_HOME/dsft, else ~/.cache/dsft. Deleting it loses only time.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.errors import UserError


def cache_folder() -> Path:
    """The folder, made if it is missing.

    Raises:
        UserError: it cannot be made.
    """
    base = os.environ.get("DSFT_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsft"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}; set DSFT_CACHE to a writable folder") from error
    return folder


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file. The kernel frees it when the process dies, however it dies."""
    with open(path, "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache; `build(folder)` fills it if no process on this machine has before.

    Built under a temporary name and renamed, so a folder that exists is whole.
    """
    target = cache_folder() / name
    if target.exists():
        return target
    unfinished = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target.with_name(target.name + ".lock")):
            if not target.exists():
                shutil.rmtree(unfinished, ignore_errors=True)  # a builder that was killed left it; we hold its lock
                unfinished.mkdir()
                try:
                    build(unfinished)
                    unfinished.rename(target)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        why = f"{error.strerror or error}; make room, or set DSFT_CACHE to another folder"
        raise UserError(f"cannot write {unfinished}: {why}") from error
    return target
