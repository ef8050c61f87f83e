"""The sources of a mixture: names and weights within --train_files and --val_files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsft.errors import UserError, did_you_mean

NAME = re.compile(r"\w[\w.-]*")
WEIGHT = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
MOST = 1000  # copies of a row in an epoch; more is a typing error
ENTRY = re.compile(rf"(?:(?P<name>{NAME.pattern})=)?(?P<path>.*?)(?:\*(?P<weight>{WEIGHT}))?", re.DOTALL)


class SourceError(ValueError):
    """What is wrong with a mapping, as the end of a sentence about a source."""


@dataclass(frozen=True)
class Source:
    """Files whose rows are weighted together and have a loss of their own.

    name: empty for rows that have no loss of their own
    paths: files, globs, folders, or datasets of the Hub
    weight: how often a row is seen in an epoch
    """

    name: str
    paths: tuple[str, ...]
    weight: float = 1.0


def read_sources(entries: Sequence[str], flag: str) -> list[Source]:
    """The sources of entries such as PATH, PATH*2 or NAME=PATH*0.5.

    If none of them has a name or a weight, all are one source without a name. Otherwise an entry without a name is
    named after its file, and entries with the same name are one source.

    Raises:
        UserError: a weight is out of range, a path or a name is missing, or a source's entries differ.
    """
    parts = [match.groupdict() for entry in entries if (match := ENTRY.fullmatch(entry))]
    if not any(part["name"] or part["weight"] for part in parts):
        return [Source("", tuple(entries))]
    sources: dict[str, Source] = {}
    for part in parts:
        name = part["name"] or part["path"].rstrip("/").split("/")[-1].split(".")[0]
        weight = float(part["weight"] or 1)
        if not part["path"]:
            raise UserError(f"{flag}: source {name} has no path; write NAME=PATH")
        if not NAME.fullmatch(name) or (not part["name"] and name in sources):
            raise UserError(f"{flag}: {part['path']} needs a name beside other sources; write NAME={part['path']}")
        if not 0 < weight <= MOST:
            raise UserError(f"{flag}: the weight of {name} is {weight:g}; give one above 0, at most {MOST}")
        before = sources.setdefault(name, Source(name, (), weight))
        if before.weight != weight:
            raise UserError(f"{flag}: the weight of {name} is {before.weight:g} and {weight:g}; give it only one")
        sources[name] = replace(before, paths=(*before.paths, part["path"]))
    return list(sources.values())


def as_entry(value: Mapping[str, Any]) -> str:
    """The entry of a YAML mapping with path, name and weight.

    Raises:
        SourceError: it has other keys, no path, or values of another kind.
    """
    for key in value:
        if key not in (known := ("path", "name", "weight")):
            raise SourceError(f"has path, name and weight, got {key}{did_you_mean(str(key), known)}")
    path, name, weight = value.get("path"), value.get("name"), value.get("weight", 1)
    if not isinstance(path, str) or not path:
        raise SourceError(f"needs a path, got {dict(value)}")
    if name is not None and not NAME.fullmatch(str(name)):
        raise SourceError(f"has a name of letters, digits and any of _.-, got '{name}'")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= MOST:
        raise SourceError(f"has as weight a number above 0, at most {MOST}, got {weight!r}")
    return (f"{name}=" if name is not None else "") + path + (f"*{weight}" if "weight" in value else "")
