"""Child processes that end when their parent does, however it ends; and Ctrl-C at chosen places only."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Ask the kernel to send this process a signal when its parent dies. Linux only; elsewhere nothing happens.

    Args:
        parent: the parent's process id, which it has taken down before the start.
        number: the signal.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), number)


class HeldInterrupt:
    """Within the block Ctrl-C raises KeyboardInterrupt where it is let through; elsewhere it is remembered until then.

    Raised between any two instructions, it can leave a library's lock taken for ever, get lost in a destructor, or cut
    a clean-up short.
    """

    def __init__(self) -> None:
        self._received = self._is_let_through = False

    def __enter__(self) -> "HeldInterrupt":
        # Where a shell has started the command in the background, SIGINT is ignored, and stays so.
        self._holds = (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and threading.current_thread() is threading.main_thread()
        )
        if self._holds:
            signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Here it is raised, also where it came before."""
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
