"""Command line: report on one or more runs, as HTML and Markdown."""

import sys

from dsft.cli import main as command_line
from dsft.config import ReportConfig
from dsft.errors import run_and_report


def run(config: ReportConfig) -> None:
    """Write the report and print its paths."""

    def work() -> None:
        from dsft.reporting.report import write_report

        for path in write_report(config):
            print(f"report   {path}")

    sys.exit(run_and_report(work, debug=config.debug))


def main() -> None:
    """The dsft-report command."""
    command_line(ReportConfig, run)


if __name__ == "__main__":
    main()
