"""docs/errors.yaml as patterns: which entry an error message belongs to.

In a message of the table, {value} is a hole with an example of what fills it; {{ and }} are braces.
"""

import re
from dataclasses import dataclass
from functools import cache

import yaml

from tests.helpers import ROOT

HOLE = re.compile(r"\{\{|\}\}|\{(?:\{\{|\}\}|[^{}])*\}")


@dataclass(frozen=True)
class Entry:
    """One message of the table."""

    code: str
    message: str
    examples: tuple[str, ...]
    """Command lines, or tests (file::name) that produce it."""

    @property
    def pattern(self) -> str:
        """The message with anything in its holes."""
        fixed = [re.escape(part) for part in HOLE.split(self.message)]
        between = [re.escape(hole[0]) if hole in ("{{", "}}") else ".*" for hole in HOLE.findall(self.message)]
        return "".join(part + hole for part, hole in zip(fixed, [*between, ""], strict=True))

    @property
    def shown(self) -> str:
        """The message with its examples, as docs/errors.md shows it."""
        return re.sub(r"([{}])\1|[{}]", r"\1", self.message)


@cache
def entries() -> dict[str, Entry]:
    """By code; those with more fixed text first."""
    found = []
    for section in yaml.safe_load((ROOT / "docs" / "errors.yaml").read_text(encoding="utf-8")).values():
        for code, entry in section.items():
            if code != "about":
                examples = entry["example"] if isinstance(entry["example"], list) else [entry["example"]]
                found.append(Entry(code, entry["message"], tuple(examples)))
    codes = {entry.code: entry for entry in sorted(found, key=lambda e: -len(HOLE.sub("", e.message)))}
    assert len(codes) == len(found), "a code stands twice in docs/errors.yaml"
    return codes


@cache
def patterns() -> dict[str, re.Pattern[str]]:
    return {code: re.compile(entry.pattern) for code, entry in entries().items()}


def code_of(line: str) -> str | None:
    """The entry that a line belongs to: of several, the one with the most fixed text.

    What dsft.pipeline and dsft.preview put before the message of a step is not part of it.
    """
    line = re.sub(r"^(--(generate|train|merge|validate)|training would refuse this): ", "", line)
    return next((code for code, pattern in patterns().items() if pattern.fullmatch(line)), None)
