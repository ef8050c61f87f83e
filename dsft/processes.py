"""Processes: ending with the parent, Ctrl-C at chosen places, work in several of them, the command a user typed."""

import ctypes
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil

from dsft.errors import UserError

PARENT = os.getppid()
"""Who started this process; os.getppid() is another once it has died. Import early: loading torch takes seconds."""
LAUNCHER_VARIABLES = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}  # torchrun's; DeepSpeed's launcher on each machine
COMPACT_HEAP = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
SECONDS_TO_END = 5  # for a process that was killed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NAMES = "(train|merge|generate|validate|pipeline|checkpoint|preview|report)"
COMMAND = rf"dsft[.-]{NAMES}|(.*/)?dsft/{NAMES}\.py"
CONSOLE_SCRIPT = rf"torchrun|deepspeed|dsft-{NAMES}"
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Ask the kernel to send this process a signal when its parent dies. Linux only; elsewhere nothing happens.

    `parent` is the parent's process id, which it has taken down before the start.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), number)


def restart_with_compact_heap() -> None:
    """Restart this command, before it loads torch, with a malloc that merges small blocks as soon as they are freed.

    glibc caches them otherwise, also the gaps between tensors, and a tensor freed beside a cached gap leaves a hole
    too short for the next one of its size. The setting is read only when a process starts. Nothing happens on a machine
    with a GPU, or if the user has set GLIBC_TUNABLES. See docs/preflight.md.
    """
    is_script = hasattr(sys.modules["__main__"], "__file__")  # else its text came from standard input
    wanted = is_script and "torch" not in sys.modules and not Path("/dev/nvidiactl").exists()
    if wanted and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = COMPACT_HEAP
        os.execv(sys.executable, sys.orig_argv)


def this_machine() -> str:
    """A machine since its last boot, and a container on it that has its own process ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii") + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def state_of(process: psutil.Process) -> str:
    """Its status in the process table; STATUS_DEAD if it is gone. A table that cannot be read counts as running."""
    try:
        status = process.status() if process.is_running() else psutil.STATUS_DEAD
        return psutil.STATUS_DEAD if status == psutil.STATUS_ZOMBIE else status
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
    except psutil.Error:
        return psutil.STATUS_RUNNING


class HeldInterrupt:
    """Within the block Ctrl-C raises KeyboardInterrupt where it is let through; elsewhere it is remembered until then.

    Raised between any two instructions, it can leave a library's lock taken for ever, get lost in a destructor or in
    what Python does around a fork, or cut a clean-up short.
    """

    def __init__(self, *others: signal.Signals) -> None:
        """`others` are signals that do the same."""
        self._numbers = (signal.SIGINT, *others)
        self._received = self._is_let_through = False

    def __enter__(self) -> "HeldInterrupt":
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                # Where a shell has started the command in the background, SIGINT is ignored, and stays so.
                if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def let_through(self, *, another: bool = False) -> Iterator[None]:
        """Here it is raised, also where it came before, unless only `another` one is to be."""
        self._received = self._received and not another
        self._is_let_through = True
        try:
            if self._received:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_let_through = False

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
        if self._is_let_through:
            raise KeyboardInterrupt


@contextmanager
def parallel(
    work: Callable[[int, int], Iterable[Any]],
    processes: int,
    lost: str,
    *,
    method: Literal["fork", "spawn"] = "spawn",
    interrupt: HeldInterrupt | None = None,
) -> Iterator[Iterator[Any]]:
    """What several processes make, in order, until the block is left: the first of each, then the second of each, …

    Each has a pipe of its own, which blocks it when it is far ahead. (A ProcessPoolExecutor has threads and locks: it
    hung when Ctrl-C came while one was being taken.)

    Args:
        work: called in each process with its number and the number of processes. The first end of one ends all.
        processes: how many.
        lost: the UserError where one was killed.
        method: fork is fast; it needs a process in which no library has started threads.
        interrupt: lets Ctrl-C through while this waits.
    """
    context: Any = multiprocessing.get_context(method)
    workers, readers = [], []
    try:
        for number in range(processes):
            reader, writer = context.Pipe(duplex=False)
            arguments = (work, number, processes, writer, os.getpid())
            workers.append(context.Process(target=_send_all, args=arguments, daemon=True))
            workers[-1].start()
            writer.close()  # so that the process has the only writing end, and its death ends the pipe
            readers.append(reader)
        yield _received(readers, lost, interrupt)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(SECONDS_TO_END)


def _received(readers: Sequence[Connection], lost: str, interrupt: HeldInterrupt | None) -> Iterator[Any]:
    for reader in cycle(readers):
        try:
            with interrupt.let_through() if interrupt else nullcontext():
                made = reader.recv()
        except (EOFError, OSError) as error:
            raise UserError(lost) from error
        if isinstance(made, Exception):
            raise made
        if isinstance(made, _Ended):
            return
        yield made


class _Ended:
    """Sent after the last thing that was made."""


def _send_all(
    work: Callable[[int, int], Iterable[Any]], number: int, processes: int, writer: Connection, parent: int
) -> None:
    """The body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    end_with_parent(parent, signal.SIGKILL)
    with suppress(BrokenPipeError):  # the parent has gone
        try:
            for made in work(number, processes):
                writer.send(made)
            writer.send(_Ended())
        except BrokenPipeError:
            raise
        except Exception as error:
            error.add_note(traceback.format_exc())  # for --debug; the traceback itself stays here
            writer.send(error)


def launchers() -> list[tuple[psutil.Process, list[str]]]:
    """The processes, each with its words, through which this one was started, from its parent to what a user typed.

    A parent belongs to them as long as a word of its command line is the script or module that runs here, or
    another command of ours.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    script = main.name if main is not None else sys.argv[0]
    found = []
    with suppress(psutil.Error):  # a parent that is gone or not ours to read ends the climb
        parent = psutil.Process().parent()
        while parent is not None and any(word == script or _is_command(word) for word in parent.cmdline()):
            found.append((parent, parent.cmdline()))
            parent = parent.parent()
    return found


class Launcher:
    """What has started this rank: torchrun, or DeepSpeed's launcher on this machine and the command above that."""

    def __init__(self) -> None:
        self.pid = PARENT if LAUNCHER_VARIABLES & os.environ.keys() else None
        """None if the rank was started without one."""
        started_by = launchers()
        is_inner = len(started_by) > 1 and "deepspeed.launcher.launch" in started_by[0][1]
        self._outer = started_by[1][0] if is_inner else None

    def has_died(self) -> bool:
        """Whether there is one no more."""
        if self.pid is None:
            return False
        return os.getppid() != self.pid or (self._outer is not None and state_of(self._outer) == psutil.STATUS_DEAD)


def launch_command(without: Sequence[str] = ()) -> str:
    """The command line that a user typed to start this run, in a shell's words, less the flags in `without`.

    Call it while the launchers live: without them it is this process's own, which starts one rank.
    """
    started_by = launchers()
    words = started_by[-1][1] if started_by else sys.orig_argv
    if len(words) > 1 and re.fullmatch(CONSOLE_SCRIPT, Path(words[1]).name):
        words = words[1:]  # the system puts its interpreter before it
    for flag in without:
        text = "\0".join(["", *words, ""])
        words = re.sub(rf"\0--{flag}(=|\0)[^\0]*(?=\0)", "", text)[1:-1].split("\0")
    name = Path(words[0]).name
    return shlex.join([name if shutil.which(name) == words[0] else words[0], *words[1:]])


def _is_command(word: str) -> bool:
    """Whether a word of a command line names one of this project's commands or scripts."""
    path = Path(word)
    is_script = path.suffix in (".sh", ".py") and (SCRIPTS / path.name).is_file()
    return is_script or re.fullmatch(COMMAND, word) is not None or re.fullmatch(COMMAND, path.name) is not None
