"""Flags of dsft.checkpoint."""

from dataclasses import dataclass

from dsft.config.flags import CommonFlags, flag


@dataclass(kw_only=True)
class CheckpointConfig(CommonFlags):
    """Say what a checkpoint or a run's folder holds, and whether it is what was written. Nothing is changed."""

    checkpoint: str = flag(required=True, section="Checkpoint", positional=True)
    """One checkpoint, or a run's output folder. The flag may be left out: python -m dsft.checkpoint PATH."""
    verify: bool = flag(True)
    """Read all files and compare their checksums; the exit status is 1 where one is not as it was written."""

    def check(self) -> None:
        """Nothing can be wrong with these flags before the folder is read."""
