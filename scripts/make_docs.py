#!/usr/bin/env python
"""Write docs/flags.md from dsft/config, and docs/errors.md from docs/errors.yaml.

python scripts/make_docs.py [--check]

With --check nothing is written; the exit status is 1 if a page is out of date.
"""

import re
import sys
import typing
from dataclasses import fields
from pathlib import Path

import yaml

from dsft import config
from dsft.config.values import default_text, meanings, type_text

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = ("train", "preview", "merge", "checkpoint", "report", "generate", "validate", "pipeline")
EXTENDS = {"preview": "train"}
"""Commands that take all flags of another one; only their own flags are listed."""


def config_of(command: str) -> type:
    """The config class that defines a command's flags."""
    return getattr(config, f"{command.title()}Config")


def flags_page() -> str:
    """A table per command and section."""
    lines = ["# Flags", "", "Generated from dsft/config by `python scripts/make_docs.py`; do not edit.", ""]
    for command in COMMANDS:
        own = config_of(command)
        hints, meaning = typing.get_type_hints(own), meanings(own)
        inherited = meanings(config_of(EXTENDS[command])) if command in EXTENDS else {}
        lines += [f"## dsft.{command}", "", own.__doc__ or "", ""]
        listed = [f for f in fields(own) if inherited.get(f.name) != meaning[f.name]]
        for index, f in enumerate(listed):
            if f.metadata["section"]:
                lines += [*([""] if index else []), f"### {f.metadata['section']}", ""]
            if f.metadata["section"] or index == 0:
                lines += ["| flag | type | default | meaning |", "| --- | --- | --- | --- |"]
            lines.append(f"| `--{f.name}` | {type_text(hints[f.name])} | {default_text(f)} | {meaning[f.name]} |")
        lines.append("")
    return "\n".join(lines)


def errors_page() -> str:
    """Every message with the values that stand in its holes as examples, and its remedy."""
    lines = []
    for title, entries in yaml.safe_load((DOCS / "errors.yaml").read_text(encoding="utf-8")).items():
        lines += [f"# {title}" if title == "Errors" else f"## {title}", ""]
        lines += [entries.pop("about"), ""] if "about" in entries else []
        for code, entry in entries.items():
            message = re.sub(r"([{}])\1|[{}]", r"\1", entry["message"])
            lines.append(f'- <a id="{code}"></a>`{message}`\n  {entry["remedy"]}')
        lines += [""] if entries else []
    return "\n".join(lines)


def main() -> None:
    """Write, or check."""
    for path, text in ((DOCS / "flags.md", flags_page()), (DOCS / "errors.md", errors_page())):
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"error: {path} is out of date; run python scripts/make_docs.py")


if __name__ == "__main__":
    main()
