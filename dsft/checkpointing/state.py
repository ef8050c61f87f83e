"""trainer_state.json: where a run stands."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsft.errors import UserError

STATE = "trainer_state.json"


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
    position: tuple[int, int] = (0, 0)
    """Whole epochs done, and global batches done in the running one."""
    val_loss: float | None = None
    validation_due: bool = False
    """The run was stopped before the validation of this step; a resume begins with it."""
    best_step: int | None = None
    best_val_loss: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_state(checkpoint: Path) -> TrainerState:
    """Raises UserError where trainer_state.json is damaged."""
    try:
        values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return TrainerState(**values | {"position": tuple(values["position"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{checkpoint / STATE} is damaged ({error}); name another checkpoint") from error
