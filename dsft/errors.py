"""Errors caused by the user or the machine, and how a command reports them."""

import difflib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Invalid input. The message is one line: what is wrong, where, and how to fix it.

    Commands print it and exit with status 1; a traceback is shown only with --debug.
    Several problems found together are one message with a line each. docs/errors.yaml lists all messages.
    """

    status = 1
    """The command's exit status."""
    is_agreed = False
    """Whether all ranks know about it; then only the rank that raises it prints it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest known name as " (did you mean 'x'?)", or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def did_you_mean_path(path: str | Path, more: Iterable[str] = ()) -> str:
    """The same for a path that does not exist: the closest name in its folder, or among `more`."""
    path = Path(path)
    if path.exists():
        return ""
    beside = {other.name: str(path.with_name(other.name)) for other in sorted(path.parent.glob("*"))}
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)  # full paths would all be similar
    return did_you_mean(str(path), more) or (f" (did you mean '{beside[close[0]]}'?)" if close else "")


def run_and_report(work: Callable[[], Any], *, debug: bool) -> int:
    """Run a command's work and return its exit status; an error is printed as one line, without a traceback."""
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
        print("stopped", file=sys.stderr)
        return 130  # as a shell does
    except Exception as error:
        if debug:
            raise
        where = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        reason = " ".join(str(error).split())
        print_error(UserError(f"{where}{type(error).__name__}: {reason[:400]} (--debug shows the traceback)"))
        return 1
    return 0


def wait_for_peers() -> None:
    """Let the first rank of each machine report an error that all ranks probably have, before they can communicate.

    When that rank exits, its launcher stops the others, here with status 1. A rank that is still running after that
    was the only one with the error and reports it itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_quietly()


def end_quietly(seconds: float = 5) -> None:
    """Wait for the launcher to stop this process, with status 1; return if none does."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    time.sleep(seconds)


def print_error(error: UserError) -> None:
    """Print a user error on stderr, line by line."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
