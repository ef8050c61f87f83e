"""Which checkpoint a run resumes from, or takes its first weights from, and whether it may."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsft.checkpointing.folder import ADAPTER, LOCK, METRICS, CheckpointFolder, find_checkpoint, is_checkpoint, step_of
from dsft.checkpointing.models import resolve_model
from dsft.checkpointing.state import read_flags, read_state
from dsft.config import TrainConfig
from dsft.config.values import as_yaml
from dsft.errors import UserError
from dsft.files import guard_disk


def find_resume(config: TrainConfig, folder: CheckpointFolder, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from. Rank 0 only; it holds the lock of the output folder from here on, if that exists.

    A dry run changes nothing in it: it renames no damaged checkpoint, and makes no lock file.

    Raises:
        UserError: the folder belongs to another run, or no checkpoint is sound.
    """
    if folder.root.is_dir() and (not config.dry_run or (folder.root / LOCK).exists()):
        folder.lock()
    if config.resume == "never":
        latest = folder.latest()
        if latest is not None:
            raise UserError(
                f"{config.output_dir} contains {latest.name} but --resume is never; choose another --output_dir"
            )
        return None
    if config.resume == "auto":
        found = folder.newest_sound(warn, rename=not config.dry_run)
    else:
        found = find_checkpoint(config.resume, "resume")
        latest = folder.latest()
        if latest is not None and found.parent != latest.parent.resolve():
            raise UserError(
                f"{config.output_dir} contains {latest.name} of its own, and --resume {config.resume} is of another "
                "folder; leave --resume out to resume from it, or choose another --output_dir"
            )
    if found is not None:
        _check_same_run(found, config)
    return found


def _check_same_run(checkpoint: Path, config: TrainConfig) -> None:
    stored = read_flags(checkpoint)
    now = yaml.safe_load(as_yaml(config))
    allowed = set(config.resume_override or [])
    names = [name for name in config.run_identity() if name not in allowed]
    changed = [
        f"{n} was {stored.get(n)}, is {now[n]}" for n in names if not config.is_same_run(n, stored.get(n), now[n])
    ]
    if changed:
        raise UserError(
            f"{checkpoint} is of a run with other flags: {'; '.join(changed)}; use its values or another --output_dir, "
            f"or accept the new ones with --resume_override {','.join(c.split()[0] for c in changed)}"
        )


def read_history(checkpoint: Path) -> str:
    """The lines of metrics.jsonl up to a checkpoint. Raises UserError where they cannot be read."""
    path = checkpoint / METRICS
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another checkpoint") from error


def open_output(folder: CheckpointFolder, resumed: Path | None, warn: Callable[[str], None]) -> None:
    """Make the output folder ready for this run. Rank 0 only.

    Raises:
        UserError: it cannot be written, or another run has begun there meanwhile.
    """
    root = folder.root
    guard_disk(lambda: root.mkdir(parents=True, exist_ok=True), root)
    if not folder.is_locked:  # it was not there when this run looked for a checkpoint
        folder.lock()
        if folder.all():
            raise UserError(
                f"another run has begun in {root} meanwhile; rerun to resume from it, or choose another --output_dir"
            )
    guard_disk(folder.remove_unfinished, root)
    if resumed is None:
        return
    step = read_state(resumed).step  # it may have been set aside itself, and have another name
    for later in folder.all():
        if step_of(later) >= step and later.resolve() != resumed.resolve():
            aside = folder.set_aside(later, "superseded")
            warn(f"{later.name} is of steps that are taken again from {resumed.name}; it is now {aside.name}")


@dataclass(frozen=True)
class InitialWeights:
    """What --init_from names: the LoRA weights of a checkpoint, or a whole model."""

    folder: Path
    is_adapter: bool


def find_initial_weights(
    config: TrainConfig, model: str, resumed: Path | None, *, check: bool = True
) -> InitialWeights | None:
    """What the run starts from beside --model.

    Args:
        model: folder or Hub name of --model.
        resumed: the checkpoint that the run goes on from. It has the weights of its own; --init_from is needed only
            where it names the model under LoRA.
        check: compare the checksums of --init_from; see `find_checkpoint`.

    Raises:
        UserError: there is nothing of the kind, or it goes with neither --model nor the LoRA flags.
    """
    if config.init_from is None:
        return None
    if resumed is not None:
        if not config.lora_rank:
            return InitialWeights(resumed, is_adapter=False)
        if _adapter_config(resumed, "checkpoint")["base_model_name_or_path"] in (config.model, model):
            return None
    given = Path(config.init_from).expanduser()
    if (given / "config.json").is_file() and not is_checkpoint(given):
        return _whole_model(given.resolve(), model, config)  # what dsft.merge or transformers has written
    found = find_checkpoint(config.init_from, "init_from", check=check)
    if not (found / f"{ADAPTER}.safetensors").is_file():
        return _whole_model(found, model, config)
    if not config.lora_rank:
        raise UserError(
            f"--init_from {config.init_from}: {found.name} contains LoRA weights, but --lora_rank is 0; "
            "name its merged model (python -m dsft.merge), or give the flags of its LoRA"
        )
    adapter = _adapter_config(found, "--init_from")
    stored = {
        "lora_rank": adapter["r"],
        "lora_alpha": adapter["lora_alpha"],
        "use_rslora": adapter["use_rslora"],
        "use_dora": adapter["use_dora"],
    }
    changed = [f"--{n} {value}" for n, value in stored.items() if getattr(config, n) != value]
    if changed:
        raise UserError(
            f"--init_from {config.init_from}: its weights were trained with {' '.join(changed)}; give the same values"
        )
    return InitialWeights(found, is_adapter=True)


def _adapter_config(checkpoint: Path, what: str) -> dict[str, Any]:
    """PEFT's adapter_config.json. Raises UserError where it is none; then another of `what` should be named."""
    path = checkpoint / "adapter_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {key: stored[key] for key in ("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another {what}") from error


def _whole_model(folder: Path, model: str, config: TrainConfig) -> InitialWeights:
    """A model of the same architecture as --model's, where that one is a folder."""
    resolve_model(str(folder), check=False)  # it has been, where it is a checkpoint

    def shape(path: Path) -> dict[str, Any]:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return {key: stored.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}); choose another --init_from") from error

    theirs = Path(model) / "config.json"
    if theirs.is_file():
        changed = [f"{k} {v}" for k, v in shape(folder / "config.json").items() if v != shape(theirs)[k]]
        if changed:
            raise UserError(
                f"--init_from {config.init_from} is not the same model as --model {config.model}: {', '.join(changed)}"
                "; use the model that it was trained from"
            )
    return InitialWeights(folder, is_adapter=False)
