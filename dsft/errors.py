"""Errors that a user can cause, and how a command reports them."""

import difflib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


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
        return report_interrupt()
    except Exception as error:
        if debug:
            raise
        where = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        reason = " ".join(str(error).split())
        print_error(UserError(f"{where}{type(error).__name__}: {reason[:400]} (--debug shows where)"))
        return 1
    return 0


def report_interrupt() -> int:
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
