"""Command line: what a training run will see, before it starts."""

import io
import sys

from dsft import cli
from dsft.config import PreviewConfig
from dsft.errors import UserError


@cli.command(PreviewConfig)
def main(config: PreviewConfig) -> None:
    """Show everything, then end with an error line if training would refuse something."""
    from dsft.previewing.preview import make_preview
    from dsft.previewing.render import show, write_files

    preview = make_preview(config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rows may have characters that the terminal lacks
    with cli.closing_pipe():
        show(preview, sys.stdout)
    write_files(preview, config.html, config.json)
    if preview.problem is not None:
        raise UserError(preview.problem)


if __name__ == "__main__":
    main()
