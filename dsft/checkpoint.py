"""Command line: what a checkpoint or a run contains, and whether it is intact."""

from dsft import cli
from dsft.config import CheckpointConfig
from dsft.errors import UserError


def run(config: CheckpointConfig) -> None:
    """Print the contents, then what is wrong, if anything."""
    from dsft.checkpointing.inspection import inspect

    report = inspect(config.checkpoint, verify=config.verify)
    with cli.closing_pipe():
        print("\n".join(report.lines))
    if report.problem is not None:
        raise UserError(report.problem)


def main() -> None:
    """The dsft-checkpoint command."""
    cli.main(CheckpointConfig, run)


if __name__ == "__main__":
    main()
