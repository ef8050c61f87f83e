"""Flags of dsft.checkpoint."""

from dataclasses import dataclass

from dsft.config.flags import CommonFlags, flag


@dataclass(kw_only=True)
class CheckpointConfig(CommonFlags):
    """Show what a checkpoint or a run's folder contains, and verify it. Nothing is changed."""

    checkpoint: str = flag(required=True, section="Checkpoint", positional=True)
    """A checkpoint or a run's output folder. The flag name may be left out: python -m dsft.checkpoint PATH."""
    verify: bool = flag(True)
    """Read all files and compare their checksums; the exit status is 1 if one differs."""
