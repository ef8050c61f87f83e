"""Command line: generate -> train -> merge the best -> validate."""

import sys

from dsft.cli import main as command_line
from dsft.cli import run_and_report
from dsft.config import PipelineConfig


def run(config: PipelineConfig) -> None:
    """Run the steps that are left, and print the table last."""
    from dsft.orchestration import Pipeline, StepFailedError

    failed = []

    def work() -> None:
        try:
            lines = Pipeline(config).run()
        except StepFailedError as error:
            failed.append(error.status)
            raise
        print(f"report   {config.output_dir}/report.md")
        print("\n".join(lines))

    status = run_and_report(work, debug=config.debug)
    sys.exit(failed[0] if failed else status)


def main() -> None:
    """The dsft-pipeline command."""
    command_line(PipelineConfig, run)


if __name__ == "__main__":
    main()
