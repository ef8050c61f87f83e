"""dsft/train.py with a trap: the process kills itself at a chosen file operation of a save. See fault_drills.py.

It stands in for dsft/train.py in a command line, under every launcher, and leaves dsft as it is: the trap is one of
Python's audit hooks, which hears of each opening, renaming, … just before it happens. What $DSFT_FAULT says:

    root     only operations below this folder count
    record   write each operation to this file, with -RANK added to its name, and spring nothing; or:
    rank     the one with the trap
    save     the trap is set when the temporary folder of this step's checkpoint is first touched
    pattern  of the operations from there on, those whose "EVENT PATH" has this pattern count
    nth      the one that kills
    delay    seconds to let pass after it: the instants between two operations, such as within a write
    marker   a file outside the run's folder that says where it sprang; while it stands, the trap stays open
"""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

PLAN = "DSFT_FAULT"
# Where an event's arguments hold (path, descriptor of the folder that a relative path starts from).
PATHS: dict[str, list[tuple[int, int | None]]] = {
    "open": [(0, None)],
    "os.chmod": [(0, 2)],
    "os.link": [(1, 3)],
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.rename": [(0, 2), (1, 3)],
    "os.rmdir": [(0, 1)],
    "os.symlink": [(1, 2)],
    "os.truncate": [(0, None)],
}


def touched_path(path: Any, folder: Any) -> str:
    """The absolute path that an event speaks of, "" where it names an open file."""
    if isinstance(path, int):
        return ""
    name = os.fsdecode(path)
    if not os.path.isabs(name) and isinstance(folder, int) and folder >= 0:
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)


def set_trap(plan: dict[str, Any]) -> None:
    """Listen from now on."""
    root = str(plan["root"]) + os.sep
    record = None
    if "record" in plan:
        record = os.open(f"{plan['record']}-{os.environ.get('RANK', 0)}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    counted = 0 if record is None else None
    is_set = False
    listening = threading.local()

    def kill_this_process(where: str) -> None:
        try:
            marker = os.open(plan["marker"], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return  # it has sprung before, in a process that was started again since
        if plan["delay"]:
            time.sleep(plan["delay"])
        os.write(marker, json.dumps({"where": where, "pid": os.getpid(), "time": time.monotonic()}).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted, is_set
        if event not in PATHS or getattr(listening, "now", False):
            return
        listening.now = True  # what is done here is heard here too
        try:
            paths = [touched_path(arguments[p], None if f is None else arguments[f]) for p, f in PATHS[event]]
            inside = [path.removeprefix(root) for path in paths if path.startswith(root)]
            if not inside:
                return
            where = " ".join([event, *inside])
            if record is not None:
                os.write(record, where.encode() + b"\n")
                return
            assert counted is not None
            is_set = is_set or f".checkpoint-{plan['save']:06d}.tmp" in where
            if is_set and re.search(plan["pattern"], where):
                counted += 1
                if counted == plan["nth"]:
                    if plan["delay"]:
                        threading.Thread(target=kill_this_process, args=[where], daemon=True).start()
                    else:
                        kill_this_process(where)
        except OSError:
            pass  # a hook that raises would itself break the operation
        finally:
            listening.now = False

    sys.addaudithook(listen)


sys.path[0] = str(Path(__file__).resolve().parent.parent)
if PLAN in os.environ:
    trap, own_rank = json.loads(os.environ[PLAN]), int(os.environ.get("RANK", 0))
    if trap.get("rank", own_rank) == own_rank:
        set_trap(trap)

if __name__ == "__main__":
    from dsft.train import main

    main()
