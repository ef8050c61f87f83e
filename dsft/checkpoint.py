"""Command line: what a checkpoint or a run contains, and whether it is intact."""

import os
import sys

from dsft.cli import main as command_line
from dsft.config import CheckpointConfig
from dsft.errors import UserError, run_and_report


def run(config: CheckpointConfig) -> None:
    """Print the contents, then what is wrong, if anything."""

    def work() -> None:
        from dsft.checkpointing.inspection import inspect

        report = inspect(config.checkpoint, verify=config.verify)
        try:
            print("\n".join(report.lines), flush=True)
        except BrokenPipeError:  # by head, for instance
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if report.problem is not None:
            raise UserError(report.problem)

    sys.exit(run_and_report(work, debug=config.debug))


def main() -> None:
    """The dsft-checkpoint command."""
    command_line(CheckpointConfig, run)


if __name__ == "__main__":
    main()
