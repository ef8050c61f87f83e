"""What is on disk: layout, atomic writing, latest, best, rotation.

A checkpoint is a folder checkpoint-000100 with the trained weights, the moments, trainer_state.json and, written
last, COMPLETE. It says nothing that only one backend could read, and holds no pickle.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsft.errors import UserError
from dsft.files import is_refusal, make_readable, reason, sync, write_text

COMPLETE, STATE, CONFIG = "COMPLETE", "trainer_state.json", "config.yaml"
ADAPTER, MODEL, OPTIMIZER = "adapter_model", "model", "optimizer"
SHARD_BYTES = 4 * 2**30
NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass
class TrainerState:
    """Where a run stands."""

    step: int
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
        raise UserError(f"{checkpoint / STATE} is damaged ({error}); {_another(checkpoint)}") from error


def write_tensors(folder: Path | None, stem: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write named tensors as they come, as stem.safetensors or, above SHARD_BYTES, in numbered files with an index.

    Args:
        folder: where to; None goes through the tensors without writing (they come from collectives).
        stem: name of the files.
        tensors: consumed once, to the end, even when writing has failed.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    failure: Exception | None = None

    def flush() -> None:
        nonlocal failure
        assert folder is not None
        try:
            save_file(pending, folder / f"{stem}.part{len(shards):05d}", metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            failure = error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if folder is None or failure is not None:
            continue
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
    if folder is None:
        return
    if failure is None:
        flush()
    if failure is not None:
        raise failure
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        whole = len(shards) == 1
        file = f"{stem}.safetensors" if whole else f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}.part{index:05d}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
        write_text(folder / f"{stem}.safetensors.index.json", index_text)


class TensorReader:
    """Reads tensors one at a time from what write_tensors has written."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Raises:
        UserError: missing or damaged files.
        """
        self.folder, self.stem = folder, stem
        self._file_of: dict[str, Path] = {}
        files = sorted(folder.glob(f"{stem}.safetensors")) or sorted(folder.glob(f"{stem}-*.safetensors"))
        if not files:
            raise UserError(f"{folder / stem}.safetensors is missing; {_another(folder)}")
        count = 1 if files[0].name == f"{stem}.safetensors" else int(files[0].stem.rsplit("-", 1)[1])
        if len(files) < count:
            missing = f"{count - len(files)} of the {count} files {folder / stem}-*.safetensors"
            raise UserError(f"missing: {missing}; {_another(folder)}")
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    self._file_of |= dict.fromkeys(handle.keys(), file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} is damaged ({error}); {_another(folder)}") from error

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless every one of the named tensors is there, in its shape."""
        for name, shape in shapes.items():
            stored = self._shape_of(name)
            if stored != shape:
                raise UserError(
                    f"{self.folder / self.stem}.safetensors holds {'no' if stored is None else 'another shape of'} "
                    f"'{name}', so it belongs to another model; {_another(self.folder)}"
                )

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        if name not in self._file_of:
            return None
        with safe_open(self._file_of[name], framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def __call__(self, name: str) -> torch.Tensor:
        """One tensor, on CPU.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self._file_of:
            raise UserError(f"{self.folder / self.stem}.safetensors holds no '{name}'; it belongs to another model")
        with safe_open(self._file_of[name], framework="pt") as handle:
            return handle.get_tensor(name)


def _another(checkpoint: Path) -> str:
    return f"delete {checkpoint} to go on from an older checkpoint, or name one with --resume"
