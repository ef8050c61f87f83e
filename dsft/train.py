"""Command line: flags -> TrainConfig -> Trainer. Runs as a module and, under both launchers, by path."""

import sys
from pathlib import Path

if not __package__ and sys.path[0] == str(Path(__file__).resolve().parent):
    # Run by path, Python puts dsft/ itself first: its modules would shadow the standard library's for everyone.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dsft import cli, processes  # processes records the parent, which may be gone when torch has loaded
from dsft.config import TrainConfig


@cli.command(TrainConfig)
def main(config: TrainConfig) -> None:
    """Train; torch is imported only here, when the flags are known to be good."""
    processes.restart_with_compact_heap()
    from dsft.distributed import runtime

    def work() -> None:
        from dsft.training.trainer import Trainer

        Trainer(config).train()

    runtime.run_to_exit(work, debug=config.debug)


if __name__ == "__main__":
    main()
