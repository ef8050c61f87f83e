"""Errors that a user can cause, and nothing else."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input. Its text is one line: what is wrong, where, and how to mend it.

    Command lines print the text and exit with status 1; a traceback is shown with --debug only.
    Several problems found together stand on a line each.
    """

    status = 1
    """What the command exits with."""
    is_agreed = False
    """Whether all ranks know of it, so that the one that has it is the one that prints it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest known name as ' (did you mean "x"?)', or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def did_you_mean_path(path: str | Path, more: Iterable[str] = ()) -> str:
    """The same for a path where nothing is: the closest of the names beside it, and of `more`."""
    path = Path(path)
    if path.exists():
        return ""
    beside = {other.name: str(path.with_name(other.name)) for other in sorted(path.parent.glob("*"))}
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)  # whole paths would all be alike
    return did_you_mean(str(path), more) or (f" (did you mean '{beside[close[0]]}'?)" if close else "")
