"""Flags of dsft.report."""

from dataclasses import dataclass
from pathlib import Path

from dsft.config.flags import CommonFlags, flag, too_small
from dsft.errors import UserError

HTML = ".html"


@dataclass(kw_only=True)
class ReportConfig(CommonFlags):
    """Tell of one run or of several: one HTML page that needs no network, and the same as Markdown beside it."""

    runs: list[str] = flag(required=True, section="Report", positional=True)
    """Output folders of runs or pipelines. The flag may be left out: python -m dsft.report OUT OUT2."""
    judgements: list[str] | None = flag(None)
    """Reports of dsft.validate (.json), besides those in the folders themselves."""
    samples: int = flag(3)
    """Prompts of each task whose answers before and after training are shown."""
    output: str | None = flag(None)
    """The HTML file, whose neighbour ends in .md; report.html in the first folder by default. Overwritten."""

    def check(self) -> None:
        """Raise UserError with every problem that can be seen before a folder is read."""
        problems = [] if self.runs else ["--runs names no folder; name a run's output folder"]
        problems += too_small(self, 0, "samples")
        if self.output is not None and (Path(self.output).suffix != HTML or Path(self.output).is_dir()):
            problems.append(f"output must be the name of a {HTML} file, got {self.output}")
        if problems:
            raise UserError("\n".join(problems))
