"""Flags of dsft.report."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsft.config.flags import CommonFlags, flag

HTML = ".html"


@dataclass(kw_only=True)
class ReportConfig(CommonFlags):
    """Report on one or more runs: a self-contained HTML page, and the same as Markdown next to it."""

    runs: list[str] = flag(required=True, section="Report", positional=True)
    """Output folders of runs or pipelines. The flag name may be left out: python -m dsft.report OUT OUT2."""
    eval_reports: list[str] | None = flag(None)
    """More reports of dsft.validate (.json); those in the runs' folders are found."""
    samples: int = flag(3, must_be="0 or more")
    """Prompts per task whose answers before and after training are shown."""
    output: str | None = flag(None)
    """The HTML file, with the .md next to it; report.html in the first folder by default. Overwritten."""

    def problems(self) -> Iterator[str]:
        if not self.runs:
            yield "--runs is empty; name a run's output folder"
        if self.output is not None and (Path(self.output).suffix != HTML or Path(self.output).is_dir()):
            yield f"output must be a {HTML} file, got {self.output}"
