"""dsft/train.py with a fault at a chosen file operation of a save. See fault_drills.py.

It replaces dsft/train.py in a command line, under every launcher, and leaves dsft as it is: one of Python's audit hooks
sees each open, rename, … just before it happens. $DSFT_FAULT holds JSON:

    root     only operations below this folder count
    rank     the rank that counts them
    save     counting starts when the temporary folder of this step's checkpoint is first touched
    pattern  only operations whose "EVENT PATH" matches count
    nth      the fault happens at this one
    delay    seconds later, to hit the instants between two operations, such as within a write
    action   kill       SIGKILL of this process
             disk-full  from now on every write fails with ENOSPC, on all ranks: the files are /dev/full
             read-only  from now on every change of the folder fails with EROFS, on all ranks
    marker   a file outside of root that is written when the fault happens
"""

import builtins
import errno
import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

FAULT = "DSFT_FAULT"
# Where an event's arguments hold (path, descriptor of the folder that a relative path starts from).
PATHS: dict[str, list[tuple[int, int | None]]] = {
    "open": [(0, None)], "os.chmod": [(0, 2)], "os.link": [(1, 3)], "os.mkdir": [(0, 2)], "os.remove": [(0, 1)],
    "os.rename": [(0, 2), (1, 3)], "os.rmdir": [(0, 1)], "os.symlink": [(1, 2)], "os.truncate": [(0, None)],
}  # fmt: skip


def touched_path(path: Any, folder: Any) -> str:
    """The absolute path of an event, "" where it names an open file."""
    if isinstance(path, int):
        return ""
    name = os.fsdecode(path)
    if not os.path.isabs(name) and isinstance(folder, int) and folder >= 0:
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)


def inject(fault: dict[str, Any], own_rank: int) -> None:
    """Listen to file operations, and cause the fault when its time has come."""
    root, marker, action = fault["root"] + os.sep, Path(fault["marker"]), fault["action"]
    counted, is_counting = 0, False

    def spring(where: str) -> None:
        time.sleep(fault["delay"])
        marker.write_text(json.dumps([where, time.monotonic()]), encoding="utf-8")
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        for name in os.listdir("/proc/self/fd") if action == "disk-full" else []:
            if os.path.realpath(f"/proc/self/fd/{name}") == root + "metrics.jsonl":  # which stays open
                os.dup2(full, int(name))

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted, is_counting
        if event not in PATHS:
            return
        paths = [touched_path(arguments[p], None if f is None else arguments[f]) for p, f in PATHS[event]]
        inside = [path.removeprefix(root) for path in paths if path.startswith(root)]
        if not inside:
            return
        where = " ".join([event, *inside])
        is_counting = is_counting or f".checkpoint-{fault['save']:06d}.tmp" in where
        if own_rank == fault["rank"] and is_counting and re.search(fault["pattern"], where):
            counted += 1
            if counted == fault["nth"]:
                if fault["delay"]:
                    threading.Thread(target=spring, args=[where], daemon=True).start()
                else:
                    spring(where)
        changes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if action == "read-only" and changes and marker.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(paths[0]))

    def open_on_full_disk(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        handle = system_open(file, mode, *arguments, **options)
        if mode[0] != "r" and touched_path(file, None).startswith(root) and marker.exists():
            os.dup2(full, handle.fileno())
        return handle

    if action == "disk-full":
        full, system_open = os.open("/dev/full", os.O_WRONLY), io.open
        builtins.open = io.open = open_on_full_disk
    sys.addaudithook(listen)


sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    if FAULT in os.environ:
        inject(json.loads(os.environ[FAULT]), int(os.environ.get("RANK", 0)))
    from dsft.train import main

    main()
