"""From a command line to a checked config: Fire splits the arguments, the declared types convert the values.

Fire itself calls a function before it complains about unknown flags, and guesses types from the values. So Fire gets
a function that only collects, and the config class interprets the values.
"""

import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import fire
from fire.decorators import SetParseFn

from dsft.config.values import SECTION, Config, build, default_text, meanings, read_yaml, type_text
from dsft.errors import UserError, did_you_mean, print_error, run_and_report, wait_for_peers

LAUNCHER_FLAGS = {"local_rank"}  # added by the DeepSpeed launcher; LOCAL_RANK has the same value


def main(config_class: type[Any], run: Callable[[Any], None], argv: Sequence[str] | None = None) -> None:
    """The body of every command: parse, run, report errors as one line and an exit status."""
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
    if not config.debug:  # before torch is imported, which reads them
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "2")
    if status := run_and_report(lambda: run(config), debug=config.debug):
        sys.exit(status)


def command(config_class: type[Any]) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Turn a function of a config into a command, which reads the config from the command line."""

    def decorate(run: Callable[[Any], None]) -> Callable[[], None]:
        return wraps(run)(lambda: main(config_class, run))

    return decorate


@contextmanager
def closing_pipe() -> Iterator[None]:
    """Print within; the reader of a pipe, such as head, may have seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(config_class: type[Config], argv: Sequence[str]) -> Config:
    """Flags take precedence over the YAML file, which takes precedence over the defaults.

    Raises:
        UserError: all unknown flags, invalid values and missing flags together.
    """
    problems: list[str] = []
    values: dict[str, Any] = _collect(config_class, argv, problems)
    if values.get("config"):
        values = _merge(read_yaml(config_class, values["config"], problems), values)
    return build(config_class, values, problems)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` updated with `above`; sections are merged flag by flag."""
    sections = {k: below[k] | above[k] for k in above if isinstance(above[k], dict) and isinstance(below.get(k), dict)}
    return below | above | sections


def _collect(config_class: type, argv: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Flag name -> string, or a dict of these for a section. Unknown flags and missing values go to `problems`."""
    hints = typing.get_type_hints(config_class)
    argv = [word for word in argv if not (_is_flag(word) and _name(word) in LAUNCHER_FLAGS)]
    words = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        name = _name(word)
        if _is_flag(word) and not name:
            problems.append(_unexpected(word))
        elif not _is_flag(word) or "=" in word or not _is_flag(following):
            words.append(word)
        elif _is_switch(hints.get(name)):  # Fire would read even --nomodel as model=False
            words.append(f"--{name}=True")
        elif name.startswith("no") and _is_switch(hints.get(name[2:])):
            words.append(f"--{name[2:]}=False")
        elif name in hints:
            problems.append(f"--{name} needs a value ({type_text(hints[name])})")
        else:
            words.append(f"--{name}=")
    collected: dict[str, Any] = {}
    positional = [f.name for f in dataclasses.fields(config_class) if f.metadata["positional"]]

    @SetParseFn(str)
    def collect(*words: str, **flags: str) -> None:
        free = [name for name in positional if name not in flags]
        if len(free) == 1 and typing.get_origin(hints[free[0]]) is list and words:
            collected[free[0]], words = list(words), ()
        problems.extend(map(_unexpected, words[len(free) :]))
        collected.update(zip(free, words, strict=False))
        collected.update(flags)

    # Arguments after the last "--" are Fire's own. Its default separator would end our flags at an argument "-".
    fire.Fire(collect, command=[*words, "--", "--separator", "\0"])
    for name in [name for name in collected if hints.get(name.partition(".")[0]) == SECTION]:
        section, _, of_section = name.partition(".")
        if of_section:  # --train.lr 1e-3
            collected.setdefault(section, {})[of_section] = collected.pop(name)
    unknown = [name for name in collected if name not in hints]
    problems += [f"unknown flag --{name}{did_you_mean(name, hints)}; --help lists all flags" for name in unknown]
    return collected


def _unexpected(word: str) -> str:
    return f"unexpected argument '{word}'; write flags as --name value"


def _is_switch(kind: Any) -> bool:
    """Whether a flag may be given without a value."""
    return kind is bool or bool in typing.get_args(kind)


def _is_flag(word: str) -> bool:
    """As Fire decides it: -1e-4 is a value."""
    return re.match(r"--|-[a-zA-Z]", word) is not None


def _name(word: str) -> str:
    return word.lstrip("-").split("=")[0].replace("-", "_")


def help_text(config_class: type) -> str:
    """The text of --help: every flag with type, default and meaning, in the order of the config class."""
    hints, meaning = typing.get_type_hints(config_class), meanings(config_class)
    lines = [inspect.cleandoc(config_class.__doc__ or ""), "", "Flags (--name value or --name=value):"]
    for f in dataclasses.fields(config_class):
        if f.metadata["section"]:
            lines += ["", f.metadata["section"]]
        lines.append(f"  --{f.name}  ({type_text(hints[f.name])}; {default_text(f)})")
        lines.append(f"      {meaning[f.name]}")
    return "\n".join(lines)
