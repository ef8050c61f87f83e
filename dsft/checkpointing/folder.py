"""What is on disk: names, lock, links, rotation, and the order in which a checkpoint comes into being.

A checkpoint is a folder checkpoint-000100 with the trained weights, the moments, trainer_state.json and, written
last, COMPLETE with the checksums of all other files. It says nothing that only one backend could read, and holds no
pickle.
"""

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from dsft.checkpointing.integrity import COMPLETE, DamagedError, mark_complete, verify
from dsft.checkpointing.state import CONFIG, STATE
from dsft.errors import UserError, did_you_mean_path
from dsft.files import guard_disk, reason, sync

METRICS, LOCK = "metrics.jsonl", ".lock"
ADAPTER, MODEL, OPTIMIZER = "adapter_model", "model", "optimizer"
NAME = re.compile(r"checkpoint-(\d{6,})")
UNFINISHED_FOLDERS = r"\.(checkpoint-\d+|small_files)\.tmp"
LOCK_SECONDS = 5  # a run that has just been ended may still hold it


class CheckpointFolder:
    """The checkpoints of one run, in its output folder. Only rank 0 calls the methods that write."""

    def __init__(self, output_dir: str | Path) -> None:
        self.root = Path(output_dir)
        self._lock: BinaryIO | None = None

    # What there is

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        try:
            found = [p for p in self.root.iterdir() if NAME.fullmatch(p.name) and (p / COMPLETE).is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.root} cannot be read: {reason(error)}; name another folder") from error
        return sorted(found, key=step_of)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.root / f"checkpoint-{step:06d}"

    def latest(self) -> Path | None:
        """The complete checkpoint with the most steps."""
        complete = self.all()
        return complete[-1] if complete else None

    def best(self) -> Path | None:
        """What the link `best` points to, if that is a complete checkpoint."""
        target = (self.root / "best").resolve()
        return target if (target / COMPLETE).is_file() else None

    def newest_sound(self, warn: Callable[[str], None], *, rename: bool = True) -> Path | None:
        """The newest checkpoint whose checksums hold. Damaged ones that are newer are renamed out of the way.

        Args:
            warn: told of each of these.
            rename: otherwise they are only told of.

        Raises:
            UserError: there are checkpoints, but none is sound; nothing is renamed.
        """
        damaged: list[tuple[Path, DamagedError]] = []
        for checkpoint in reversed(self.all()):
            try:
                verify(checkpoint)
            except DamagedError as error:
                damaged.append((checkpoint, error))
                continue
            for path, problem in damaged:
                if not rename:
                    warn(f"{problem}; a run would go on from {checkpoint.name}")
                    continue
                aside = self.set_aside(path, "damaged")
                warn(f"{problem}; it is now {aside.name}, and the run goes on from {checkpoint.name}")
            return checkpoint
        if damaged:
            raise UserError(
                f"{damaged[0][1]}; no older checkpoint is sound; put the file back, or name another --output_dir"
            )
        return None

    # What changes it

    @property
    def is_locked(self) -> bool:
        """Whether this process owns the folder."""
        return self._lock is not None

    def lock(self) -> None:
        """Own the folder until `unlock`, or the end of this process: two runs would write over each other.

        Raises:
            UserError: another process owns it.
        """
        if self._lock is not None:
            return
        path = self.root / LOCK
        opened: list[BinaryIO] = []
        guard_disk(lambda: opened.append(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb+")), path)
        [file] = opened
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    words = os.pread(file.fileno(), 200, 0).decode("utf-8", errors="replace").split()
                    owner = " ".join(words) or "another process"
                    file.close()
                    raise UserError(
                        f"{self.root} belongs to a run that still goes on ({owner}); "
                        "wait for its end, or name another --output_dir"
                    ) from None
                time.sleep(0.2)
            except OSError:
                break  # a file system without locks: nothing can be known
        with suppress(OSError):  # only words for the other's message; on a full disk they may be missing
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = file

    def unlock(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove_unfinished(self) -> None:
        """Delete what a killed run left half-written."""
        for path in self.root.iterdir():
            # A folder of that name in a folder that is no run of dsft may be another program's: it is left alone.
            ours = NAME.fullmatch(path.name) and (self.root / CONFIG).is_file()
            if (ours and not (path / COMPLETE).is_file()) or re.fullmatch(UNFINISHED_FOLDERS, path.name):
                shutil.rmtree(path)
            elif re.fullmatch(r"\..+\.tmp", path.name) and (path.is_symlink() or path.is_file()):
                path.unlink()
            elif ours:
                for unfinished in path.glob(".*.tmp"):
                    unfinished.unlink()

    def begin(self, step: int) -> Path:
        """An empty folder for the files of a step's checkpoint."""
        unfinished = self.unfinished(step)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        return unfinished

    def unfinished(self, step: int) -> Path:
        """Where a step's checkpoint is written before it has its name."""
        return self.root / f".{self.path(step).name}.tmp"

    def commit(self, step: int, sums: dict[str, str]) -> Path:
        """Give the filled folder its name, and mark it COMPLETE.

        Args:
            step: whose folder `begin` has made; its files are on the disk, not only in the system's memory.
            sums: SHA-256 in hexadecimal digits by file name.
        """
        target, unfinished = self.path(step), self.unfinished(step)
        sync(unfinished)
        (target / COMPLETE).unlink(missing_ok=True)  # there is one if a step is repeated
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        sync(self.root)
        mark_complete(target, sums)
        sync(target)
        return target

    def abandon(self, step: int) -> None:
        """Remove what `begin` made; older checkpoints are as they were."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)
        if not (self.path(step) / COMPLETE).is_file():
            shutil.rmtree(self.path(step), ignore_errors=True)

    def point(self, name: str, checkpoint: Path) -> None:
        """Let the link `best` or `latest` show to a checkpoint; the change is atomic."""
        new = self.root / f".{name}.tmp"
        new.unlink(missing_ok=True)
        new.symlink_to(checkpoint.name)
        new.replace(self.root / name)

    def rotate(self, keep: int | None) -> None:
        """Delete all but the newest `keep` checkpoints, best and latest."""
        if keep is None:
            return
        wanted = {self.best(), self.latest()}
        for path in self.all()[:-keep]:
            if path.resolve() not in {p.resolve() for p in wanted if p}:
                shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))  # half-deleted, it is no checkpoint

    def set_aside(self, checkpoint: Path, why: str) -> Path:
        """Rename a checkpoint, so that no run takes it for one, but a person still can."""
        for number in range(1, 1000):
            aside = checkpoint.with_name(f"{checkpoint.name}.{why}" + (f".{number}" if number > 1 else ""))
            if not aside.exists():
                break

        def rename() -> None:
            checkpoint.rename(aside)

        guard_disk(rename, checkpoint)
        return aside


def step_of(checkpoint: Path) -> int:
    """Optimizer steps taken when a checkpoint was written, from its name."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def is_checkpoint(folder: Path) -> bool:
    """Whether dsft has written this folder, or begun to."""
    return (folder / COMPLETE).exists() or (folder / STATE).exists()


def find_checkpoint(path: str, flag: str, *, check: bool = True) -> Path:
    """A user's path as one complete and sound checkpoint: the folder itself, or a run's best or latest.

    Args:
        path: what the user has typed.
        flag: whose value it is.
        check: compare the checksums of its files, which reads all of them. Where several ranks of a machine look for
            one checkpoint, the first does it for all.

    Raises:
        UserError: it is neither, or damaged; then an older one is offered.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        meant = did_you_mean_path(path)
        raise UserError(f"--{flag} {path}: no such folder{meant}; name a run's folder, or one of its checkpoints")
    if (folder / COMPLETE).is_file():
        found = folder.resolve()
    elif (folder / STATE).is_file():
        raise UserError(
            f"--{flag} {path}: the checkpoint has no {COMPLETE} file; its writing was interrupted; "
            f"{_offer(folder.resolve())}"
        )
    else:
        run = CheckpointFolder(folder)
        best_or_latest = run.best() or run.latest()
        if best_or_latest is None:
            raise UserError(f"--{flag} {path}: the folder holds no complete checkpoint; name one that does")
        found = best_or_latest
    if not check:
        return found
    try:
        verify(found)
    except DamagedError as error:
        raise UserError(f"--{flag} {path}: {error}; {_offer(found)}") from error
    return found


def _offer(refused: Path) -> str:
    """The newest sound checkpoint of the same run, in words."""
    for checkpoint in reversed(CheckpointFolder(refused.parent).all() if NAME.fullmatch(refused.name) else []):
        if checkpoint != refused:
            with suppress(UserError):
                verify(checkpoint)
                return f"name {checkpoint}, which is sound"
    return "no other checkpoint beside it is sound"
