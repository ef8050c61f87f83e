"""Command line: write an expert's episodes of a game as train.parquet and test.parquet."""

import sys

from dsft.cli import main as command_line
from dsft.config import GenerateConfig
from dsft.errors import run_and_report


def run(config: GenerateConfig) -> None:
    """Generate the data and print a summary."""

    def work() -> None:
        from dsft.envs.expert_data import generate

        for line in generate(config).lines():
            print(line)

    sys.exit(run_and_report(work, debug=config.debug))


def main() -> None:
    """The dsft-generate command."""
    command_line(GenerateConfig, run)


if __name__ == "__main__":
    main()
