"""From a command line to a checked config: Fire splits the words, the declared types read the values.

Fire alone calls a function first and complains about unknown flags after it returns, and guesses types from
the text. So Fire is given a function that only collects, and the config decides what the values mean.
"""

import ast
import dataclasses
import inspect
import itertools
import os
import re
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import fire
import yaml
from fire.decorators import SetParseFn

from dsft.errors import UserError, did_you_mean, did_you_mean_path

Config = TypeVar("Config")
SECTION = dict[str, Any]
"""Type of a field that holds the flags of another command: --train.lr 1e-3, or a section in the YAML file."""
LAUNCHER_FLAGS = {"local_rank"}  # the DeepSpeed launcher puts it before the user's flags; LOCAL_RANK says the same


def main(config_class: type[Config], run: Callable[[Config], None], argv: Sequence[str] | None = None) -> None:
    """Parse, run, and turn errors into one line and an exit status. The body of every command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class))
        return
    try:
        config = parse(config_class, argv)
    except UserError as error:
        wait_for_peers()
        print_error(error)
        sys.exit(1)
    if not getattr(config, "debug", False):  # here, because torch reads them while it is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        run(config)
    except KeyboardInterrupt:  # while the libraries are loaded; later the command's own work sees it
        sys.exit(_stopped())


def run_and_report(work: Callable[[], Any], *, debug: bool) -> int:
    """Run a command's work and return the exit status; an error becomes one line, no traceback."""
    try:
        work()
    except UserError as error:
        if debug:
            raise
        if not error.is_agreed:
            wait_for_peers()
        print_error(error)
        return error.status
    except KeyboardInterrupt:
        return _stopped()
    except Exception as error:
        if debug:
            raise
        where = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        reason = " ".join(str(error).split())
        print_error(UserError(f"{where}{type(error).__name__}: {reason[:400]} (--debug shows where)"))
        return 1
    return 0


def _stopped() -> int:
    """What Ctrl-C gives: a word and the shell's status for it."""
    print("stopped", file=sys.stderr)
    return 130


def wait_for_peers() -> None:
    """Let the first rank of a machine speak for all that have met the same error and cannot ask each other.

    Once it has ended, its launcher ends the others, here with status 1. A rank that still lives after that was
    alone with its error, and says so itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_quietly()


def end_quietly(seconds: float = 5) -> None:
    """Wait for the launcher to end this process, with status 1; return where none does."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    time.sleep(seconds)


def print_error(error: UserError) -> None:
    """Print a user error as the lines it has, on standard error."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)


def parse(config_class: type[Config], argv: Sequence[str]) -> Config:
    """Flags over the YAML file over the defaults, each value read by its declared type.

    Raises:
        UserError: unknown flags, unreadable values and missing flags, all of them at once.
    """
    problems: list[str] = []
    values: dict[str, Any] = _collect(config_class, argv, problems)
    if values.get("config"):
        values = _merge(_read_yaml(config_class, values["config"], problems), values)
    return build(config_class, values, problems)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values over values; sections flag by flag."""
    sections = {k: below[k] | above[k] for k in above if isinstance(above[k], dict) and isinstance(below.get(k), dict)}
    return below | above | sections


def build(config_class: type[Config], values: dict[str, Any], problems: Sequence[str] = ()) -> Config:
    """A checked config from text or native values.

    Args:
        config_class: whose fields are the flags.
        values: by flag name.
        problems: found before, told together with those found here.

    Raises:
        UserError: a line for each value that cannot be read, or a required one that is missing; where there is
            none of these, a line for each value that the config's own check refuses.
    """
    told = {problem.split()[0] for problem in problems}
    problems, known = list(problems), {}
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if f.name in values:
            try:
                known[f.name] = read_value(values[f.name], hints[f.name])
            except ValueError:
                value, kind = values[f.name], hints[f.name]
                suggestion = did_you_mean(value, _choices(kind)) if isinstance(value, str) else ""
                problems.append(f"{f.name} must be {type_text(kind)}, got {value!r}{suggestion}")
        elif f.metadata["required"] and f"--{f.name}" not in told:
            problems.append(f"--{f.name} is required: {meanings(config_class)[f.name]}")
    if problems:
        raise UserError("\n".join(problems))
    config = config_class(**known)
    config.check()  # type: ignore[attr-defined]
    return config


def as_yaml(config: Any) -> str:
    """The resolved config as YAML that --config reads back to the same values."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _collect(config_class: type, argv: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Flag name -> text, or a dict of such for a section. Appends to `problems` what is no flag, or lacks a value."""
    hints = typing.get_type_hints(config_class)
    argv = [word for word in argv if not (_is_flag(word) and _name(word) in LAUNCHER_FLAGS)]
    words = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        name = _name(word)
        if _is_flag(word) and not name:
            problems.append(f"'{word}' belongs to no flag; write --name value")
        elif not _is_flag(word) or "=" in word or not _is_flag(following):
            words.append(word)
        elif _is_switch(hints.get(name)):  # a flag without a value; Fire would take even --nomodel as model=False
            words.append(f"--{name}=True")
        elif name.startswith("no") and _is_switch(hints.get(name[2:])):
            words.append(f"--{name[2:]}=False")
        elif name in hints:
            problems.append(f"--{name} needs a value: {type_text(hints[name])}")
        else:
            words.append(f"--{name}=")
    collected: dict[str, Any] = {}
    take_words = [f.name for f in dataclasses.fields(config_class) if f.metadata["lone_word"]]

    @SetParseFn(str)
    def collect(*words: str, **flags: str) -> None:
        free = [name for name in take_words if name not in flags]
        if len(free) == 1 and typing.get_origin(hints[free[0]]) is list and words:
            collected[free[0]], words = list(words), ()
        problems.extend(f"'{word}' belongs to no flag; write --name value" for word in words[len(free) :])
        collected.update(zip(free, words, strict=False))
        collected.update(flags)

    # What follows the last "--" is for Fire itself. Its separator would end our flags at a word "-".
    fire.Fire(collect, command=[*words, "--", "--separator", "\0"])
    for name in [name for name in collected if hints.get(name.partition(".")[0]) == SECTION]:
        section, _, of_section = name.partition(".")
        if of_section:  # --train.lr 1e-3
            collected.setdefault(section, {})[of_section] = collected.pop(name)
    unknown = [name for name in collected if name not in hints]
    problems += [f"unknown flag --{name}{did_you_mean(name, hints)}; --help lists all flags" for name in unknown]
    return collected


def _is_switch(kind: Any) -> bool:
    """Whether a flag may stand without a value."""
    return kind is bool or bool in typing.get_args(kind)


def _choices(kind: Any) -> list[str]:
    """The words that a declared type names."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [choice for inner in typing.get_args(kind) for choice in _choices(inner)]


def _is_flag(word: str) -> bool:
    """As Fire sees it: -1e-4 is a value."""
    return re.match(r"--|-[a-zA-Z]", word) is not None


def _name(word: str) -> str:
    return word.lstrip("-").split("=")[0].replace("-", "_")


def _read_yaml(config_class: type, path: str, problems: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}{did_you_mean_path(path)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold 'flag: value' lines, got a {type(values).__name__}")
    problems += [f"{path}: unknown flag '{n}'{did_you_mean(str(n), hints)}" for n in values if n not in hints]
    return values


def read_value(value: Any, kind: Any) -> Any:
    """Read text from a command line, or a native YAML value, as the declared type.

    Raises:
        ValueError: the value is not of that type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or value == "None"):
            return None
        for choice in arguments:
            if choice is not type(None):
                try:
                    return read_value(value, choice)
                except ValueError:
                    continue
        raise ValueError
    if origin is Literal:
        if value is False and "off" in arguments:  # YAML reads an off without quotes so
            return "off"
        if value in arguments:
            return value
        raise ValueError
    if origin in (list, tuple):
        if isinstance(value, str):
            if value[:1] + value[-1:] in ("[]", "()"):  # both or none: "data (1)" and "[ab].parquet" are file names
                value = value[1:-1]
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, (list, tuple)):
            raise ValueError
        items = [item for item in value if item != ""]
        if origin is list:
            return [read_value(item, arguments[0]) for item in items]
        if len(items) != len(arguments):
            raise ValueError
        return tuple(read_value(item, argument) for item, argument in zip(items, arguments, strict=True))
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0"):
            raise ValueError
        return text in ("true", "1")
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError
        return int(value)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        if number != number or abs(number) == float("inf"):
            raise ValueError
        return number
    if kind == SECTION:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError
        return value
    assert kind is str, kind
    if value is None or isinstance(value, (list, dict)):
        raise ValueError
    return str(value)


def as_words(config: Any) -> list[str]:
    """The flags that differ from their defaults as a command line."""
    words = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata["required"] or value != _default(f):
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words += [f"--{f.name}", text]
    return words


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def type_text(kind: Any) -> str:
    """A declared type as a user reads it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return " or ".join(f'"{a}"' for a in arguments) if len(arguments) < 2 else f"one of {', '.join(arguments)}"
    if origin is list:
        return "a list"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict:
        return "flags"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]


def meanings(config_class: type) -> dict[str, str]:
    """The string that stands under each field of a config class and its bases."""
    found = {}
    for part in reversed(config_class.__mro__[:-1]):  # flags that several commands have stand in base classes
        body = ast.parse(inspect.getsource(part)).body[0].body  # type: ignore[attr-defined]
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[statement.target.id] = following.value.value  # type: ignore[union-attr,attr-defined]
    return found


def default_text(f: "dataclasses.Field[Any]") -> str:
    """A field's default as it would be typed, or "required"."""
    if f.metadata["required"]:
        return "required"
    default = _default(f)
    if isinstance(default, dict):
        return "none"
    return ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def help_text(config_class: type) -> str:
    """--help: every flag with type, default and meaning, in the order of the config class."""
    hints, meaning = typing.get_type_hints(config_class), meanings(config_class)
    lines = [inspect.cleandoc(config_class.__doc__ or ""), "", "Flags (--name value or --name=value):"]
    for f in dataclasses.fields(config_class):
        if f.metadata["section"]:
            lines += ["", f.metadata["section"]]
        lines.append(f"  --{f.name}  ({type_text(hints[f.name])}; {default_text(f)})")
        lines.append(f"      {meaning[f.name]}")
    return "\n".join(lines)
