"""What is on disk: layout, atomic writing, latest, best, rotation. The tensors' files are in tensor_files.py.

A checkpoint is a folder checkpoint-000100 with the trained weights, the moments, trainer_state.json and, written
last, COMPLETE. It says nothing that only one backend could read, and holds no pickle.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsft.errors import UserError
from dsft.files import is_refusal, make_readable, reason, sync, write_text

COMPLETE, STATE, CONFIG = "COMPLETE", "trainer_state.json", "config.yaml"
ADAPTER, MODEL, OPTIMIZER = "adapter_model", "model", "optimizer"
NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass
class TrainerState:
    """Where a run stands."""

    step: int
    total_steps: int
    """Where the run ends."""
    epoch: float
    backend: str
    world_size: int
    data: str
    """Fingerprint of the tokenised training rows."""
    val_loss: float | None = None
    best_step: int | None = None
    best_val_loss: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run, in its output folder. Only rank 0 calls the methods that write."""

    def __init__(self, output_dir: str | Path) -> None:
        self.root = Path(output_dir)

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

    def remove_unfinished(self) -> None:
        """Delete what a killed run left half-written."""
        for path in self.root.iterdir():
            # A folder of that name in a folder that is no run of dsft may be another program's: it is left alone.
            ours = NAME.fullmatch(path.name) and (self.root / CONFIG).is_file()
            if (ours and not (path / COMPLETE).is_file()) or re.fullmatch(r"\.checkpoint-\d+\.tmp", path.name):
                shutil.rmtree(path)
            elif re.fullmatch(r"\..+\.tmp", path.name) and (path.is_symlink() or path.is_file()):
                path.unlink()

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to fill; it becomes checkpoint-<step> when the block ends, or vanishes if it fails.

        Raises:
            UserError: the disk is full or not writable. Older checkpoints are as they were.
        """
        target = self.path(step)
        unfinished = self.root / f".{target.name}.tmp"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            yield unfinished
            for path in unfinished.iterdir():
                make_readable(path)
                sync(path)
            write_text(unfinished / COMPLETE, "")
            sync(unfinished)
            (target / COMPLETE).unlink(missing_ok=True)  # there is one if a run is repeated from an older checkpoint
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            sync(self.root)
        except Exception as error:
            if not is_refusal(error):
                raise
            latest = self.latest()
            keeps = f"{latest} is still valid" if latest else "there is no older checkpoint"
            raise UserError(
                f"cannot save {target}: {reason(error)}; {keeps}; make room and start the same command again"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # renamed already where all went well

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


def step_of(checkpoint: Path) -> int:
    """Optimizer steps taken when a checkpoint was written, from its name."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def find_checkpoint(path: str, flag: str) -> Path:
    """A user's path as one complete checkpoint: the folder itself, or a run's best or latest.

    Raises:
        UserError: it is neither.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"--{flag} {path}: no such folder; name a run's folder, or one of its checkpoints")
    if (folder / COMPLETE).is_file():
        return folder.resolve()
    if (folder / STATE).is_file():
        raise UserError(
            f"--{flag} {path}: the checkpoint has no {COMPLETE} file; its writing was interrupted; name another"
        )
    run = CheckpointFolder(folder)
    found = run.best() or run.latest()
    if found is None:
        raise UserError(f"--{flag} {path}: the folder holds no complete checkpoint; name one that does")
    return found


def write_state(folder: Path, state: TrainerState) -> None:
    """trainer_state.json."""
    write_text(folder / STATE, json.dumps(asdict(state), indent=2) + "\n")


def read_state(checkpoint: Path) -> TrainerState:
    """Raises UserError where trainer_state.json is damaged."""
    try:
        return TrainerState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE} is damaged ({error}); {another_checkpoint(checkpoint)}") from error


def another_checkpoint(checkpoint: Path) -> str:
    """The remedy where a checkpoint is damaged."""
    return f"delete {checkpoint} to go on from an older checkpoint, or name one with --resume"
