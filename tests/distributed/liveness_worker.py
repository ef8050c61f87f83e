"""Ranks that sum numbers, watched as the Trainer is, until a test ends them by a file or a signal.

liveness_worker.py FOLDER TICK PLACES [saves]

    TICK      seconds between two looks of the watch
    PLACES    how many machines the ranks pretend to be on
    saves     end in order, with a mark in the folder, when the launcher has died
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from dsft.distributed import runtime
from dsft.distributed.liveness import Liveness
from dsft.errors import UserError
from dsft.processes import launch_command

REMEDY = "the same command goes on"


def main():
    folder, tick, places, *options = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder = Path(folder)
    world = runtime.World.from_environment()
    place = f"machine {world.rank * int(places) // world.size}" if int(places) > 1 else None
    watch = Liveness(lambda: REMEDY, tick=float(tick), place=place)
    watch.start()
    (folder / f"command-{world.rank}").write_text(launch_command())
    (folder / f"alone-{world.rank}").write_text(str(os.getpid()))
    while (folder / "wait").exists():
        time.sleep(0.02)
    runtime.start_process_group(world, torch.device("cpu"))
    watch.meet()
    with runtime.StopSignals() as stop:
        if "saves" in options:
            watch.on_orphaned = lambda: os.kill(os.getpid(), signal.SIGTERM)
        (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
        ends = 0
        while not ends:
            runtime.together(lambda: refuse(folder / f"error-{world.rank}"))
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
