"""What the checkpoints of a run take on the disk."""

import shutil
from pathlib import Path

from dsft.config import TrainConfig
from dsft.planning.plan import Needs
from dsft.planning.prediction import checkpoint_bytes
from dsft.units import gib


def checkpoints_kept(total_steps: int, steps: int, save_steps: int | str, most: int | None) -> int:
    """The most checkpoints on disk at once: with --max_checkpoints `most`, also the best and the one being written.

    `steps` are those of an epoch.
    """
    every = steps if isinstance(save_steps, str) else save_steps
    count = -(-total_steps // every) if every else 1
    return count if most is None else min(count, most + 2)


def disk_warning(config: TrainConfig, trained: int, needs: Needs, folder: Path) -> str | None:
    """A line if the checkpoints of `trained` values will not fit on the disk of an existing folder, else None."""
    size = checkpoint_bytes(trained)
    count = checkpoints_kept(needs.total_steps, needs.steps_per_epoch, config.save_steps, config.max_checkpoints)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return None
    if size * count <= free:
        return None
    return (
        f"{count} checkpoints of {gib(size)} need {gib(size * count)}, and {folder} has {gib(free)} free; "
        "free some space, save less often (--save_steps), or keep fewer (--max_checkpoints)"
    )
