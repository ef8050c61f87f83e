"""Command line: what a training run will see, before it starts."""

import io
import os
import sys

from dsft.cli import main as command_line
from dsft.config import PreviewConfig
from dsft.errors import UserError, run_and_report


def run(config: PreviewConfig) -> None:
    """Show everything, then end with an error line if training would refuse something."""

    def work() -> None:
        from dsft.previewing.preview import make_preview
        from dsft.previewing.render import show, write_files

        preview = make_preview(config)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # rows may have characters that the terminal lacks
        try:
            show(preview, sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        write_files(preview, config.html, config.json)
        if preview.problem is not None:
            raise UserError(preview.problem)

    sys.exit(run_and_report(work, debug=config.debug))


def main() -> None:
    """The dsft-preview command."""
    command_line(PreviewConfig, run)


if __name__ == "__main__":
    main()
