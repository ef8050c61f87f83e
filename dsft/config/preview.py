"""Flags of dsft.preview: those of dsft.train, and what to show."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsft.config.flags import flag
from dsft.config.train import TrainConfig


@dataclass(kw_only=True)
class PreviewConfig(TrainConfig):
    """Show what a training run will see, with the flags of dsft.train: rows, statistics, and faults."""

    output_dir: str = flag("", section="Output")
    """Not needed, as nothing is written there; accepted so that the flags of dsft.train can be reused."""

    rows: int = flag(3, section="Preview", must_be="0 or more")
    """Training rows to show: the first, the longest, then evenly spaced ones."""
    row_numbers: list[int] | None = flag(None)
    """Show these training rows instead, counted from 0 over all files together."""
    ranks: int = flag(1, must_be="1 or more")
    """Number of ranks that training would have, for micro-batches, memory and time; preview itself is one process."""
    nodes: int = flag(1, must_be="1 or more")
    """Number of nodes that share the ranks evenly."""
    device_memory: float | None = flag(None, must_be="above 0")
    """GiB of a GPU: predict memory on such GPUs, for every sharding, instead of on this machine."""
    html: str | None = flag(None)
    """Also write everything to this file, as one self-contained page of HTML."""
    json: str | None = flag(None)
    """Also write statistics and findings to this file, as JSON."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if any(number < 0 for number in self.row_numbers or []):
            yield f"row_numbers must be 0 or more, got {','.join(map(str, self.row_numbers or []))}"
        if self.ranks % self.nodes:
            yield f"ranks must be a multiple of nodes, got {self.ranks} ranks on {self.nodes} nodes"
        for name, path in (("html", self.html), ("json", self.json)):
            if path is not None and (not path or Path(path).is_dir()):
                yield f"{name} must be a file name, got '{path}'"
        if self.html is not None and self.html == self.json:
            yield f"html and json are the same file, {self.html}; choose two"
