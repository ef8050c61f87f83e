#!/usr/bin/env python
"""Write docs/flags.md from dsft/config.

python scripts/make_flag_docs.py [--check]

With --check nothing is written; the exit status is 1 where the file is out of date.
"""

import sys
import typing
from dataclasses import fields
from pathlib import Path

from dsft.config import (
    CheckpointConfig,
    GenerateConfig,
    MergeConfig,
    PipelineConfig,
    PreviewConfig,
    ReportConfig,
    TrainConfig,
    ValidateConfig,
)
from dsft.config.values import default_text, meanings, type_text

COMMANDS = {
    "train": TrainConfig,
    "preview": PreviewConfig,
    "merge": MergeConfig,
    "checkpoint": CheckpointConfig,
    "report": ReportConfig,
    "generate": GenerateConfig,
    "validate": ValidateConfig,
    "pipeline": PipelineConfig,
}
TARGET = Path(__file__).resolve().parent.parent / "docs" / "flags.md"


BESIDE = {"preview": TrainConfig}
"""Commands that take all flags of another one, of which the table lists only those that are theirs."""


def table(title: str, config_class: type, beside: type | None = None) -> list[str]:
    """One command's flags as a Markdown table per section, without those that mean the same in `beside`."""
    hints, meaning = typing.get_type_hints(config_class), meanings(config_class)
    lines = [f"## {title}", "", config_class.__doc__ or "", ""]
    header = ["| flag | type | default | meaning |", "| --- | --- | --- | --- |"]
    known = meanings(beside) if beside is not None else {}
    own = [f for f in fields(config_class) if known.get(f.name) != meaning[f.name]]
    for index, f in enumerate(own):
        if f.metadata["section"]:
            lines += [*([""] if index else []), f"### {f.metadata['section']}", "", *header]
        elif index == 0:
            lines += header
        lines.append(f"| `--{f.name}` | {type_text(hints[f.name])} | {default_text(f)} | {meaning[f.name]} |")
    return [*lines, ""]


def main() -> None:
    """Write, or check."""
    lines = ["# Flags", "", "Made from dsft/config by `python scripts/make_flag_docs.py`; do not edit.", ""]
    for command, config_class in COMMANDS.items():
        lines += table(f"dsft.{command}", config_class, BESIDE.get(command))
    text = "\n".join(lines)
    if "--check" in sys.argv[1:]:
        sys.exit(TARGET.read_text(encoding="utf-8") != text and f"error: {TARGET} is out of date; run this script")
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
