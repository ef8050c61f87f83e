"""Flag values: parsed by their declared types from a command line or YAML, and written back."""

import ast
import dataclasses
import inspect
import itertools
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from dsft.config.sources import SourceError, as_entry
from dsft.errors import UserError, did_you_mean, did_you_mean_path

Config = TypeVar("Config")
SECTION = dict[str, Any]
"""Type of a field that contains the flags of another command: --train.lr 1e-3, or a section in the YAML file."""


def build(config_class: type[Config], values: dict[str, Any], problems: Sequence[str] = ()) -> Config:
    """A checked config from strings or native values by flag name; `problems` found earlier are reported as well.

    Raises:
        UserError: a line for each invalid value and each missing required flag; if there are none, a line for each
            value that the config's own check rejects.
    """
    reported = {problem.split()[0] for problem in problems}
    problems, known = list(problems), {}
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if f.name in values:
            try:
                known[f.name] = read_value(values[f.name], hints[f.name])
            except SourceError as error:
                problems.append(f"{f.name}: a source {error}")
            except ValueError:
                value, kind = values[f.name], hints[f.name]
                suggestion = did_you_mean(value, choices_of(kind)) if isinstance(value, str) else ""
                problems.append(f"{f.name}: expected {type_text(kind)}, got {value!r}{suggestion}")
        elif f.metadata["required"] and f"--{f.name}" not in reported:
            problems.append(f"--{f.name} is required: {meanings(config_class)[f.name]}")
    if problems:
        raise UserError("\n".join(problems))
    config = config_class(**known)
    config.check()  # type: ignore[attr-defined]
    return config


def as_yaml(config: Any) -> str:
    """The config as YAML that --config reads back to the same values."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def choices_of(kind: Any) -> list[str]:
    """The strings that a declared type allows by name."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [choice for inner in typing.get_args(kind) for choice in choices_of(inner)]


def read_yaml(config_class: type, path: str, problems: list[str]) -> dict[str, Any]:
    """The values of a --config file by flag name; unknown flags are appended to `problems`.

    Raises:
        UserError: the file cannot be read, or does not contain flags.
    """
    hints = typing.get_type_hints(config_class)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}{did_you_mean_path(path)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must contain 'flag: value' lines, got a {type(values).__name__}")
    problems += [f"{path}: unknown flag '{n}'{did_you_mean(str(n), hints)}" for n in values if n not in hints]
    return values


def read_value(value: Any, kind: Any) -> Any:
    """Convert a string from a command line, or a native YAML value, to the declared type.

    Raises:
        ValueError: the value does not have that type; a SourceError says why.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or value == "None"):
            return None
        for choice in arguments:
            if choice is not type(None):
                try:
                    return read_value(value, choice)
                except SourceError:
                    raise
                except ValueError:
                    continue
        raise ValueError
    if origin is Literal:
        if value is False and "off" in arguments:  # YAML reads an unquoted off as False
            return "off"
        if value in arguments:
            return value
        raise ValueError
    if origin in (list, tuple):
        if isinstance(value, str):
            if value[:1] + value[-1:] in ("[]", "()"):  # only as a pair: "data (1)" and "[ab].parquet" are file names
                value = value[1:-1]
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, (list, tuple)):
            raise ValueError
        items = [item for item in value if item != ""]
        if kind == list[str]:
            items = [as_entry(item) if isinstance(item, dict) else item for item in items]
        if origin is list:
            return [read_value(item, arguments[0]) for item in items]
        return tuple(read_value(item, argument) for item, argument in zip(items, arguments, strict=True))
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0"):
            raise ValueError
        return text in ("true", "1")
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, kind, str)):
            raise ValueError
        number = kind(value)
        if number != number or abs(number) == float("inf"):
            raise ValueError
        return number
    if origin is dict:
        if isinstance(value, str) and kind != SECTION:
            value = json.loads(value)  # its JSONDecodeError is a ValueError
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError
        return value
    assert kind is str, kind
    if value is None or isinstance(value, (list, dict)):
        raise ValueError
    return str(value)


def as_words(config: Any) -> list[str]:
    """The command line arguments that give every flag whose value is not the default."""
    words = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata["required"] or value != _default(f):
            words += [f"--{f.name}", value_text(value)]
    return words


def value_text(value: Any) -> str:
    """A flag's value as it is typed."""
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def type_text(kind: Any) -> str:
    """A declared type as --help shows it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return " or ".join(f'"{a}"' for a in arguments) if len(arguments) < 2 else f"one of {', '.join(arguments)}"
    if origin is list:
        return "list"
    if origin is tuple:
        return f"{len(arguments)} floats"
    if origin is dict:
        return "flags" if kind == SECTION else "JSON object"
    return str(kind.__name__)


def meanings(config_class: type) -> dict[str, str]:
    """The docstring under each field of a config class and its bases."""
    found = {}
    for part in reversed(config_class.__mro__[:-1]):  # shared flags are defined in base classes
        body = ast.parse(inspect.getsource(part)).body[0].body  # type: ignore[attr-defined]
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[statement.target.id] = following.value.value  # type: ignore[union-attr,attr-defined]
    return found


def default_text(f: "dataclasses.Field[Any]") -> str:
    """A field's default as a user would type it, or "required"."""
    if f.metadata["required"]:
        return "required"
    default = _default(f)
    return "none" if isinstance(default, dict) else value_text(default)
