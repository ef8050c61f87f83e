"""Command line: what a checkpoint or a run contains, and whether it is intact."""

from dsft import cli
from dsft.config import CheckpointConfig
from dsft.errors import UserError


@cli.command(CheckpointConfig)
def main(config: CheckpointConfig) -> None:
    """Print the contents, then what is wrong, if anything."""
    from dsft.checkpointing.inspection import inspect

    report = inspect(config.checkpoint, verify=config.verify)
    with cli.closing_pipe():
        print("\n".join(report.lines))
    if report.problem is not None:
        raise UserError(report.problem)


if __name__ == "__main__":
    main()
