"""Flags of dsft.report."""

from dataclasses import dataclass
from pathlib import Path

from dsft.config.flags import CommonFlags, flag, too_small
from dsft.errors import UserError

HTML = ".html"


@dataclass(kw_only=True)
class ReportConfig(CommonFlags):
    """Report on one or more runs: a self-contained HTML page, and the same as Markdown next to it."""

    runs: list[str] = flag(required=True, section="Report", positional=True)
    """Output folders of runs or pipelines. The flag name may be left out: python -m dsft.report OUT OUT2."""
    eval_reports: list[str] | None = flag(None)
    """More reports of dsft.validate (.json); those in the runs' folders are found."""
    samples: int = flag(3)
    """Prompts per task whose answers before and after training are shown."""
    output: str | None = flag(None)
    """The HTML file, with the .md next to it; report.html in the first folder by default. Overwritten."""

    def check(self) -> None:
        """Raise UserError with every problem found before a folder is read."""
        problems = [] if self.runs else ["--runs is empty; name a run's output folder"]
        problems += too_small(self, 0, "samples")
        if self.output is not None and (Path(self.output).suffix != HTML or Path(self.output).is_dir()):
            problems.append(f"output must be a {HTML} file, got {self.output}")
        if problems:
            raise UserError("\n".join(problems))
