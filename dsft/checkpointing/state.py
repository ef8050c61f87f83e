"""trainer_state.json and config.yaml: a run's progress and its flags."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsft.config.train import VAL_LOSS
from dsft.errors import UserError
from dsft.text import visible_text

STATE, CONFIG = "trainer_state.json", "config.yaml"
COMMAND = "# command: "
"""How the first line of a run's config.yaml starts; the command that started the run follows."""


@dataclass
class TrainerState:
    """The progress of a run."""

    step: int
    total_steps: int
    """After which the run is complete."""
    epoch: float
    backend: str
    world_size: int
    data: str
    """Fingerprint of the tokenized training rows."""
    position: tuple[int, int] = (0, 0)
    """Completed epochs, and completed global batches of the current one."""
    val_losses: dict[str, float] = field(default_factory=dict)
    """val/loss, and val/loss/NAME of each source; empty if this step was not validated."""
    validation_due: bool = False
    """The run was stopped before this step's validation; a resume starts with it."""
    best_step: int | None = None
    best_loss: float | None = None
    best_by: str = VAL_LOSS
    """The metric that `best_loss` is a value of."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def val_loss(self) -> float | None:
        """The validation loss of this step."""
        return self.val_losses.get(VAL_LOSS)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_state(checkpoint: Path) -> TrainerState:
    """Raises UserError if trainer_state.json is damaged."""
    try:
        values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        state = TrainerState(**values | {"position": tuple(values["position"])})
        _check(state)
        return state
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{checkpoint / STATE} is damaged ({error}); choose another checkpoint") from error


def _check(state: TrainerState) -> None:
    best = [] if state.best_step is None else [state.best_step]
    counts = [state.step, state.total_steps, state.world_size, *state.position, *best]
    losses = [*state.val_losses.values(), *([] if state.best_loss is None else [state.best_loss])]
    if not all(type(count) is int and count >= 0 for count in counts) or len(state.position) != 2:
        raise ValueError("a step or a count is not an int")
    if not all(isinstance(number, (int, float)) for number in (state.epoch, *losses)):
        raise ValueError("a loss or the epoch is not a number")
    if best and state.best_loss is None:
        raise ValueError("the best step has no loss")
    if not isinstance(state.data, str) or not isinstance(state.versions, dict):
        raise ValueError("the fingerprint is not a str, or the versions are not a dict")


def read_flags(checkpoint: Path) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint. Raises UserError if config.yaml is damaged."""
    path = checkpoint / CONFIG
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("not a mapping of flags")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); choose another checkpoint") from error
    return stored


def with_command(config: str, command: str) -> str:
    """The text of a run's config.yaml: the command on one line, in characters that YAML allows, then the flags."""
    return f"{COMMAND}{visible_text(' '.join(command.splitlines()))}\n{config}"


def read_command(folder: Path) -> str | None:
    """The command that started a run, or None if its config.yaml does not have it."""
    try:
        first, _, _ = (folder / CONFIG).read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return first.removeprefix(COMMAND) if first.startswith(COMMAND) else None
