"""Ranks that sum numbers, watched as the Trainer is, until a test ends them by a file or a signal.

liveness_worker.py FOLDER TICK [saves]

    TICK      seconds between two looks of the watch
    saves     stop in order, with a mark in the folder, when the launcher has died
"""

import os
import sys
import time
from pathlib import Path

import torch

from dsft.distributed import liveness, runtime
from dsft.distributed.liveness import Liveness
from dsft.distributed.rendezvous import start_process_group
from dsft.errors import UserError
from dsft.processes import launch_command

REMEDY = "rerun the same command"


def main():
    folder, tick, *options = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder = Path(folder)
    world = runtime.World.from_environment()
    liveness.MEET_TICKS = 3000  # ticks are short here
    watch = Liveness(lambda: REMEDY, tick=float(tick))
    watch.start()
    (folder / f"command-{world.rank}").write_text(launch_command())
    (folder / f"alone-{world.rank}").write_text(str(os.getpid()))
    while (folder / "wait").exists():
        time.sleep(0.02)
    start_process_group(torch.device("cpu"))
    watch.meet()
    runtime.together(lambda: None)  # makes its process group while the launcher's store lives
    with runtime.StopSignals() as stop:
        if "saves" in options:
            watch.on_orphaned = stop.orphaned
        (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
        ends = 0
        while not ends:
            runtime.together(lambda: refuse(folder / f"error-{world.rank}"))
            refuse(folder / f"alone-error-{world.rank}")
            if (folder / f"crash-{world.rank}").exists():
                raise RuntimeError("it broke")
            is_last = stop.received is not None or (folder / "end").exists()
            [ends] = runtime.sum_over_ranks([is_last], torch.device("cpu"))
            time.sleep(0.02)
    (folder / f"saved-{world.rank}").touch()


def refuse(file):
    if file.exists():
        raise UserError("bad input")


if __name__ == "__main__":
    runtime.run_to_exit(main, debug=False)
