"""Ranks in real processes that die, are stopped or lose their launcher: the others end soon, and one says why."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from dsft.distributed import liveness
from tests.distributed.liveness_worker import REMEDY
from tests.helpers import BIN, PRODUCED, ROOT

WORKER = "tests/distributed/liveness_worker.py"
TICK = 0.1
LAUNCHERS = ["torchrun", "deepspeed", "plain"]
SECONDS = 40  # to an end: a second or two where nothing else runs on the machine

pytestmark = pytest.mark.slow


class Run:
    """Ranks under a launcher, or started one by one, with one file for all they print."""

    def __init__(
        self, launcher: str, folder: Path, port: int, ranks: int, options: Sequence[object], before: Sequence[str]
    ) -> None:
        self.folder, self.ranks = folder, ranks
        words = [WORKER, *map(str, [folder, *options])]
        module = [WORKER.removesuffix(".py").replace("/", "."), *words[1:]]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{env['PATH']}"}
        commands = {
            "torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(ranks), *words],
            "torch.distributed.run": [
                *("python", "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "-m"), *module
            ],
            "module": ["python", "-m", *module],
            "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port), *words],
        }  # fmt: skip
        if launcher == "plain":
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
            variables = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
            each = [(["python", *words], own) for own in variables]
        else:
            each = [(commands[launcher], {})]
        self.typed = [[*before, *command] for command, _ in each]
        with (folder / "log").open("wb") as log:
            self.started = [
                psutil.Popen(typed, cwd=ROOT, env=env | own, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                for typed, (_, own) in zip(self.typed, each, strict=True)
            ]

    def wait_for_ranks(self, name: str = "pid") -> "Run":
        """Until all sum numbers, or are at another place that they name by a file."""
        give_up = time.monotonic() + 120
        files = [self.folder / f"{name}-{rank}" for rank in range(self.ranks)]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < give_up, self.log
            assert self.started[0].poll() is None, self.log
            time.sleep(0.02)
        self.processes = [psutil.Process(int(file.read_text())) for file in files]
        return self

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("error: ")]

    def left(self) -> list[psutil.Process]:
        """Every process of the run that still lives."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if str(self.folder) in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def end(self, how: Callable[["Run"], object], seconds: float = SECONDS) -> float:
        """Do something to the run; the seconds until nothing of it is left."""
        started = time.monotonic()
        how(self)
        while self.left():
            assert time.monotonic() - started < seconds, self.log
            time.sleep(0.02)
        return time.monotonic() - started

    def statuses(self) -> list[int]:
        return [process.wait(SECONDS) for process in self.started]


@pytest.fixture
def start(tmp_path, port) -> Iterator[Callable[..., Run]]:
    """Start ranks; none is left after the test, whatever came of it."""
    runs = []

    def started(launcher, *options, ranks=2, tick=TICK, places=1, before=()):
        runs.append(Run(launcher, tmp_path, port, ranks, [tick, places, *options], before))
        return runs[-1]

    yield started
    for run in runs:
        for process in run.left():
            process.kill()


def touch(name: str) -> Callable[[Run], object]:
    return lambda run: (run.folder / name).touch()


def send(number: int, *ranks: int) -> Callable[[Run], object]:
    return lambda run: [run.processes[rank].send_signal(number) for rank in ranks]


def one_reason(run: Run, *parts: str) -> None:
    assert len(run.errors) == 1, run.log
    [line] = run.errors
    PRODUCED.add(line.removeprefix("error: "))
    for part in [*parts, "all ranks end", REMEDY]:
        assert part in line
    assert 'File "' + str(ROOT / "dsft") not in run.log


def failed(run: Run, *ranks: int) -> None:
    """The started processes have failed; where they are the ranks, those named by the signal that ended them."""
    statuses = run.statuses()
    if len(statuses) > 1:
        assert statuses == [-signal.SIGKILL if rank in ranks else 1 for rank in range(run.ranks)]
    else:
        assert statuses != [0]


# A rank


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank(start, launcher):
    run = start(launcher, ranks=3).wait_for_ranks()
    run.end(send(signal.SIGKILL, 1))
    one_reason(run, f"rank 1 (process {run.processes[1].pid} on ", "has died")
    failed(run, 1)


def test_the_first_rank_killed(start):
    run = start("plain").wait_for_ranks()
    run.end(send(signal.SIGKILL, 0))
    one_reason(run, "rank 0 (", "has died")
    failed(run, 0)


@pytest.mark.parametrize("launcher", ["deepspeed", "plain"])
def test_a_stopped_rank(start, launcher):
    run = start(launcher).wait_for_ranks()
    run.end(send(signal.SIGSTOP, 1))
    one_reason(run, f"rank 1 (process {run.processes[1].pid} on ", "has been stopped for 2 s")
    failed(run, 1)


def test_a_stopped_rank_in_true_seconds(start):
    run = start("torchrun", tick=liveness.TICK).wait_for_ranks()
    assert run.end(send(signal.SIGSTOP, 0), seconds=40) > liveness.TICKS_STOPPED - 1
    one_reason(run, "rank 0 (", "has been stopped for 20 s")


@pytest.mark.parametrize("stopped", [[1], [0, 1]], ids=["one rank", "all ranks"])
def test_a_stopped_rank_that_is_continued_is_not_missed(start, stopped):
    """One in time, or all after any time, as when a whole job is suspended."""
    run = start("plain").wait_for_ranks()
    send(signal.SIGSTOP, *stopped)(run)
    time.sleep(TICK * (0.5 if len(stopped) == 1 else 2) * liveness.TICKS_STOPPED)
    send(signal.SIGCONT, *stopped)(run)
    time.sleep(TICK * 5)
    run.end(touch("end"))
    assert run.errors == []
    assert run.statuses() == [0, 0]


# Ends in order


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "torch.distributed.run", "module"])
def test_a_normal_end_says_nothing_and_ranks_know_the_command(start, launcher):
    run = start(launcher, ranks=1 if launcher == "module" else 2).wait_for_ranks()
    run.end(touch("end"))
    assert run.errors == []
    assert set(run.statuses()) == {0}
    assert all((run.folder / f"saved-{rank}").exists() for rank in range(run.ranks))
    assert (run.folder / "command-0").read_text() == " ".join(run.typed[0])


@pytest.mark.parametrize("launcher", ["torchrun"])
def test_an_error_that_all_ranks_know_is_told_alone(start, launcher):
    run = start(launcher).wait_for_ranks()
    run.end(touch("error-1"))
    assert run.errors == ["error: bad input"]
    failed(run)


@pytest.mark.parametrize("launcher", ["deepspeed", "plain"])
def test_an_error_of_one_rank_is_told_alone(start, launcher):
    run = start(launcher).wait_for_ranks()
    run.end(touch("crash-1"))
    assert run.errors == ["error: rank 1: RuntimeError: it broke (--debug shows the traceback)"]
    failed(run)


# The launcher


def kill_launcher(run: Run) -> None:
    """What the ranks' parent is: torchrun, or DeepSpeed's launcher of this machine."""
    run.processes[0].parent().kill()


def kill_typed_command(run: Run) -> None:
    run.started[0].kill()


DEATHS = [("torchrun", kill_launcher), ("deepspeed", kill_launcher), ("deepspeed", kill_typed_command)]


@pytest.mark.parametrize(("launcher", "how"), DEATHS[:2])
def test_a_killed_launcher(start, launcher, how):
    run = start(launcher).wait_for_ranks()
    run.end(how)
    one_reason(run, "the run's launcher (process ", "has died")


@pytest.mark.parametrize(("launcher", "how"), DEATHS[::2])
def test_a_killed_launcher_lets_ranks_save(start, launcher, how):
    run = start(launcher, "saves").wait_for_ranks()
    run.end(how)
    assert run.errors == []
    assert all((run.folder / f"saved-{rank}").exists() for rank in range(2))


def test_a_launcher_killed_before_the_ranks_have_met(start, tmp_path):
    (tmp_path / "wait").touch()
    run = start("torchrun").wait_for_ranks("alone")
    run.end(kill_launcher)
    one_reason(run, "the run's launcher (process ", "has died")


def test_a_parent_that_is_no_launcher_may_go(start):
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    run = start("plain", ranks=1, before=[sys.executable, "-c", code]).wait_for_ranks()
    kill_typed_command(run)
    time.sleep(TICK * 5)
    run.end(touch("end"))
    assert run.errors == []
    assert (run.folder / "saved-0").exists()


# Other machines, which the ranks only say they are on


def test_a_rank_killed_on_another_machine_is_told_by_its_neighbours(start):
    run = start("plain", ranks=4, places=2).wait_for_ranks()
    run.end(send(signal.SIGKILL, 2))
    one_reason(run, f"rank 2 (process {run.processes[2].pid} on ", "has died")
    failed(run, 2)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_machine_whose_processes_are_killed(start, lost):
    run = start("plain", ranks=3, places=3).wait_for_ranks()
    run.end(send(signal.SIGKILL, lost))
    one_reason(run, f"rank {lost} (process {run.processes[lost].pid} on ", "has not answered for ")
    failed(run, lost)


@pytest.mark.parametrize("lost", [(0, 1), (2,)], ids=["the first", "the last"])
def test_a_machine_that_does_not_answer(start, lost):
    run = start("plain", ranks=3, places=2).wait_for_ranks()
    send(signal.SIGSTOP, *lost)(run)
    for rank in {0, 1, 2} - set(lost):
        assert run.started[rank].wait(SECONDS) == 1
    host = os.uname().nodename
    who = f"ranks 0, 1 on {host} have" if lost == (0, 1) else f"rank 2 (process {run.processes[2].pid} on {host}) has"
    one_reason(run, f"{who} not answered for 4 s")


def test_a_machine_that_comes_back_ends_too(start):
    run = start("plain", places=2).wait_for_ranks()
    send(signal.SIGSTOP, 1)(run)
    assert run.started[0].wait(SECONDS) == 1
    run.end(send(signal.SIGCONT, 1))
    assert run.errors[0].startswith("error: rank 1 (")
    failed(run)


def test_machines_suspended_together_miss_nothing(start):
    run = start("plain", places=2).wait_for_ranks()
    time.sleep(TICK * 5)
    send(signal.SIGSTOP, 0, 1)(run)
    time.sleep(TICK * 1.3 * liveness.TICKS_SILENT)
    send(signal.SIGCONT, 0, 1)(run)
    time.sleep(TICK * 10)
    run.end(touch("end"))
    assert run.errors == []
    assert run.statuses() == [0, 0]
