"""Command line: generate -> train -> merge the best checkpoint -> validate."""

import sys

from dsft.cli import main as command_line
from dsft.config import PipelineConfig
from dsft.errors import run_and_report


def run(config: PipelineConfig) -> None:
    """Run the remaining steps and print the table of results."""

    def work() -> None:
        from dsft.orchestration import Pipeline

        for line in Pipeline(config).run():
            print(line)

    sys.exit(run_and_report(work, debug=config.debug))


def main() -> None:
    """The dsft-pipeline command."""
    command_line(PipelineConfig, run)


if __name__ == "__main__":
    main()
