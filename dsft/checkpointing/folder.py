"""A run's folder of checkpoints: names, lock, links, rotation, and the order in which a checkpoint is written.

A checkpoint is a folder checkpoint-000100 with the trained weights, the moments, trainer_state.json and, written
last, COMPLETE with the checksums of all other files. Nothing in it depends on the backend, and there is no pickle.
"""

import os
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dsft.checkpointing.integrity import COMPLETE, DamagedError, mark_complete, verify
from dsft.checkpointing.state import CONFIG, STATE
from dsft.errors import UserError, did_you_mean_path
from dsft.files import guard_disk, reason, sync

METRICS, LOCK = "metrics.jsonl", ".lock"
ADAPTER, MODEL, OPTIMIZER = "adapter_model", "model", "optimizer"
NAME = re.compile(r"checkpoint-(\d{6,})")
UNFINISHED_FOLDERS = r"\.(checkpoint-\d+|small_files)\.tmp"
LOCK_SECONDS = 5  # a run that was just stopped may still hold it


class CheckpointFolder:
    """The checkpoints of one run, in its output folder. Only rank 0 calls the methods that write."""

    def __init__(self, output_dir: str | Path) -> None:
        self.root = Path(output_dir)
        self._lock = FileLock(self.root / LOCK, fallback_to_soft=False)  # a file as a lock outlives a kill
        self.is_locked = False
        """Whether this process owns the folder."""

    # Reading

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        try:
            found = [p for p in self.root.iterdir() if NAME.fullmatch(p.name) and (p / COMPLETE).is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.root} cannot be read: {reason(error)}; choose another folder") from error
        return sorted(found, key=step_of)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.root / f"checkpoint-{step:06d}"

    def latest(self) -> Path | None:
        """The complete checkpoint with the most steps."""
        complete = self.all()
        return complete[-1] if complete else None

    def best(self) -> Path | None:
        """The target of the link `best`, if that is a complete checkpoint."""
        target = (self.root / "best").resolve()
        return target if (target / COMPLETE).is_file() else None

    def newest_sound(self, warn: Callable[[str], None], *, rename: bool = True) -> Path | None:
        """The newest checkpoint whose checksums match. Newer ones, which are damaged, are renamed.

        Args:
            warn: called with a message for each damaged one.
            rename: False to leave them where they are.

        Raises:
            UserError: every checkpoint is damaged; nothing is renamed.
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
                    warn(f"{problem}; a run would resume from {checkpoint.name}")
                    continue
                aside = self.set_aside(path, "damaged")
                warn(f"{problem}; renamed to {aside.name}, resuming from {checkpoint.name}")
            return checkpoint
        if damaged:
            raise UserError(
                f"{damaged[0][1]}; no older checkpoint is intact; restore the file, or choose another --output_dir"
            )
        return None

    # Writing

    def lock(self) -> None:
        """Own the folder until `unlock` or the end of this process, however it ends.

        Raises:
            UserError: another process owns it.
        """
        path = self.root / LOCK
        try:
            if not self.is_locked:
                guard_disk(lambda: path.open("a").close(), path)
                self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            owner = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
            raise UserError(
                f"{self.root} belongs to a run that is still running ({owner}); wait for it, or choose another "
                "--output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        self.is_locked = True
        with suppress(OSError):  # only for the message above; a full disk may refuse it
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def unlock(self) -> None:
        """Let another run have the folder."""
        self._lock.release()
        self.is_locked = False

    def remove_unfinished(self) -> None:
        """Delete what a killed run left behind."""
        for path in self.root.iterdir():
            # Without config.yaml this is no run of dsft, and the folder may be another program's.
            ours = NAME.fullmatch(path.name) and (self.root / CONFIG).is_file()
            if (ours and not (path / COMPLETE).is_file()) or re.fullmatch(UNFINISHED_FOLDERS, path.name):
                shutil.rmtree(path)
            elif re.fullmatch(r"\..+\.tmp", path.name) and (path.is_symlink() or path.is_file()):
                path.unlink()
            elif ours:
                for unfinished in path.glob(".*.tmp"):
                    unfinished.unlink()

    def begin(self, step: int) -> Path:
        """Create an empty folder for the files of a step's checkpoint."""
        unfinished = self.unfinished(step)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        return unfinished

    def unfinished(self, step: int) -> Path:
        """Where a step's checkpoint is written before it is renamed."""
        return self.root / f".{self.path(step).name}.tmp"

    def commit(self, step: int, sums: dict[str, str]) -> Path:
        """Rename the folder that `begin` created, whose files are flushed to disk, and mark it COMPLETE.

        `sums` are SHA-256 in hexadecimal digits by file name.
        """
        target, unfinished = self.path(step), self.unfinished(step)
        sync(unfinished)
        (target / COMPLETE).unlink(missing_ok=True)  # exists if a step is repeated
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        sync(self.root)
        mark_complete(target, sums)
        sync(target)
        return target

    def abandon(self, step: int) -> None:
        """Remove what `begin` created; older checkpoints stay."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)
        if not (self.path(step) / COMPLETE).is_file():
            shutil.rmtree(self.path(step), ignore_errors=True)

    def point(self, name: str, checkpoint: Path) -> None:
        """Point the link `best` or `latest` to a checkpoint, atomically."""
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
                shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))  # half deleted, it is no checkpoint

    def set_aside(self, checkpoint: Path, why: str) -> Path:
        """Rename a checkpoint, so that no run uses it but a person still can."""
        for number in range(1, 1000):
            aside = checkpoint.with_name(f"{checkpoint.name}.{why}" + (f".{number}" if number > 1 else ""))
            if not aside.exists():
                break
        guard_disk(lambda: checkpoint.rename(aside), checkpoint)
        return aside


def step_of(checkpoint: Path) -> int:
    """The optimizer steps taken when a checkpoint was written, from its name."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def is_checkpoint(folder: Path) -> bool:
    """Whether this folder is a checkpoint, complete or not."""
    return (folder / COMPLETE).exists() or (folder / STATE).exists()


def find_checkpoint(path: str, flag: str, *, check: bool = True) -> Path:
    """The complete and intact checkpoint at a path: the folder itself, or a run's best or latest.

    Args:
        path: as the user typed it.
        flag: the flag with this value.
        check: compare checksums, which reads all files; the first rank of a machine does it for the others.

    Raises:
        UserError: there is none, or it is damaged; the message offers an older one.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        meant = did_you_mean_path(path)
        raise UserError(f"--{flag} {path}: no such folder{meant}; give a run's folder, or one of its checkpoints")
    if (folder / COMPLETE).is_file():
        found = folder.resolve()
    elif (folder / STATE).is_file():
        raise UserError(
            f"--{flag} {path}: no {COMPLETE} file, so saving it was interrupted; {_offer(folder.resolve())}"
        )
    else:
        run = CheckpointFolder(folder)
        best_or_latest = run.best() or run.latest()
        if best_or_latest is None:
            raise UserError(f"--{flag} {path}: no complete checkpoint in this folder; choose another")
        found = best_or_latest
    if not check:
        return found
    try:
        verify(found)
    except DamagedError as error:
        raise UserError(f"--{flag} {path}: {error}; {_offer(found)}") from error
    return found


def _offer(refused: Path) -> str:
    """Suggest the newest intact checkpoint of the same run."""
    for checkpoint in reversed(CheckpointFolder(refused.parent).all() if NAME.fullmatch(refused.name) else []):
        if checkpoint != refused:
            with suppress(UserError):
                verify(checkpoint)
                return f"use {checkpoint}, which is intact"
    return "no other checkpoint of the run is intact"
