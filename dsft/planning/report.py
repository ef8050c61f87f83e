"""What a dry run and the start of a run say of memory, time and disk."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsft.config import TrainConfig
from dsft.errors import UserError
from dsft.files import guard_disk, write_text
from dsft.planning.prediction import (
    GIB,
    WITHIN,
    Prediction,
    checkpoint_bytes,
    checkpoints_kept,
    gib,
    is_out_of_memory,
)
from dsft.units import duration

REPORT = "dry_run.json"


@dataclass(frozen=True)
class DryRun:
    """What a dry run has found."""

    prediction: Prediction
    measured: float
    """Peak of the largest rank after one forward and backward pass, bytes."""
    room: float
    """Bytes that a rank may have."""
    step_seconds: float
    steps: int
    """Of an epoch."""
    total_steps: int

    def lines(self) -> list[str]:
        """For the console."""
        predicted = self.prediction.before_first_step
        return [
            f"dry run  one forward and backward pass of {self.prediction.tokens} tokens; no weight has changed",
            f"measured {gib(self.measured)} a rank, {gib(predicted)} predicted for this pass "
            f"({predicted / self.measured - 1:+.0%}); {gib(self.prediction.peak)} for the run",
            time_line(self.step_seconds, self.steps, self.total_steps).replace("predicted", "by this pass"),
        ]

    def write(self, folder: Path) -> None:
        """The report, as JSON. Raises UserError where it cannot be written."""
        predicted = self.prediction
        values = {
            "tokens": predicted.tokens,
            "measured_bytes": self.measured,
            "predicted_bytes": predicted.before_first_step,
            "predicted_run_bytes": predicted.peak,
            "predicted_parts": predicted.parts(),
            "room_bytes": self.room,
            "seconds_per_step": self.step_seconds,
            "seconds_per_epoch": self.step_seconds * self.steps,
            "seconds_of_run": self.step_seconds * self.total_steps,
            "steps_per_epoch": self.steps,
            "total_steps": self.total_steps,
        }
        path = folder / REPORT
        guard_disk(lambda: write_text(path, json.dumps(values, indent=2) + "\n"), path)


def memory_lines(prediction: Prediction, room: float, fitting: list[str]) -> list[str]:
    """The start-up block's lines of memory."""
    lines = [f"memory   {memory_text(prediction.peak, prediction.parts(), room)}"]
    if prediction.peak > room:
        lines.append(f"         that is more than there is; {fits(fitting)}")
    return lines


def memory_text(peak: float, parts: dict[str, float], room: float) -> str:
    """Predicted memory of a rank, in words; all in bytes."""
    named = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size > GIB / 200)
    return f"{gib(peak)} a rank predicted ({named}), {gib(room)} there"


def time_line(step_seconds: float, steps: int, left: int) -> str:
    """The start-up block's line of time."""
    return f"time     {time_text(step_seconds, steps, left)}"


def time_text(step_seconds: float, steps: int, left: int) -> str:
    """Predicted time of a step, of an epoch's steps and of the steps that are left, in words."""
    epoch, run = duration(step_seconds * steps), duration(step_seconds * left)
    return f"{duration(step_seconds)} a step predicted, {epoch} an epoch, {run} for {left} {_steps(left)}"


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"


def fits(fitting: list[str]) -> str:
    """Settings that would fit, in words."""
    if not fitting:
        return "no setting known here would fit; take a smaller model, or a machine with more memory"
    return f"by prediction these fit: {'; or '.join(fitting)}"


def refuse(prediction: Prediction, room: float, fitting: list[str]) -> None:
    """Raise UserError where a run would run out of memory even if the prediction is too high by its stated error."""
    if prediction.peak * (1 - WITHIN) > room:
        raise UserError(
            f"the run would need {gib(prediction.peak)} a rank by prediction, and has {gib(room)}; {fits(fitting)}"
        )


def disk_warning(config: TrainConfig, trained: int, total_steps: int, steps: int, folder: Path) -> str | None:
    """What to say where the checkpoints of a run will not fit on the disk of its folder.

    Args:
        config: the flags.
        trained: values.
        total_steps: of the run.
        steps: of an epoch.
        folder: that is there.
    """
    size = checkpoint_bytes(trained)
    kept = checkpoints_kept(total_steps, steps, config.save_steps, config.max_checkpoints)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return None
    if size * kept <= free:
        return None
    return (
        f"{kept} checkpoints of {gib(size)} need {gib(size * kept)}, and {folder} has {gib(free)} free; "
        "make room, save less often (--save_steps), or keep fewer (--max_checkpoints)"
    )


@contextmanager
def out_of_memory(config: TrainConfig, fitting: Callable[[], list[str]]) -> Iterator[None]:
    """Turn a refusal of memory within into a UserError.

    Args:
        config: the flags.
        fitting: gives settings that would fit, where some are known by then.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if config.debug or not is_out_of_memory(error):
            raise
        known = fitting()
        if known:
            remedy = fits(known)
        else:
            smaller = ["a lower --max_tokens_per_micro_batch"]
            smaller += ["--gradient_checkpointing True"] if config.gradient_checkpointing is not True else []
            smaller += ["--dtype bfloat16"] if config.dtype != "bfloat16" else []
            smaller += ["--lora_rank 16"] if not config.lora_rank else []
            remedy = f"try {', '.join([*smaller, 'more ranks'])}"
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"memory ran out ({type(error).__name__}: {reason}); {remedy}") from error
