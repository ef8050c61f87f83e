"""Command line: report on one or more runs, as HTML and Markdown."""

from dsft import cli
from dsft.config import ReportConfig


@cli.command(ReportConfig)
def main(config: ReportConfig) -> None:
    """Write the report and print its paths."""
    from dsft.reporting.report import write_report

    for path in write_report(config):
        print(f"report   {path}")


if __name__ == "__main__":
    main()
