"""Real ranks that die, are stopped or lose their launcher: the others exit soon, and one prints why."""

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
        commands = {
            "torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(ranks), *words],
            "torch.distributed.run": [
                *("python", "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "-m"), *module
            ],
            "module": ["python", "-m", *module],
            "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port), *words],
        }  # fmt: skip
        each: list[tuple[list[str], dict[str, str]]]
        if launcher == "plain":
            each = [(["python", *words], environment(port, rank, ranks)) for rank in range(ranks)]
        else:
            each = [(commands[launcher], {})] if launcher in commands else []
        self.started: list[psutil.Popen] = []
        self.typed = [[*before, *command] for command, _ in each]
        for typed, (_, own) in zip(self.typed, each, strict=True):
            self.start(typed, own)

    def start(self, words: Sequence[str], env: dict[str, str]) -> None:
        """Start a command whose output goes into the log."""
        base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        base |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{base['PATH']}"}
        with (self.folder / "log").open("ab") as log:
            self.started.append(
                psutil.Popen(words, cwd=ROOT, env=base | env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )

    def wait_for_ranks(self, name: str = "pid") -> "Run":
        """Until all sum numbers, or are at another place that they name by a file."""
        give_up = time.monotonic() + 120
        files = [self.folder / f"{name}-{rank}" for rank in range(self.ranks)]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < give_up, self.log
            assert self.started[0].poll() is None, self.log
            time.sleep(0.02)
        self.pids = [file.read_text() for file in files]  # as the ranks know them
        ranks = {process.environ().get("RANK", "0"): process for process in self.left()}
        self.processes = [ranks[str(rank)] for rank in range(self.ranks)]
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


def environment(port: int, rank: int, ranks: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


@pytest.fixture
def start(tmp_path, port) -> Iterator[Callable[..., Run]]:
    """Start ranks; none is left after the test, whatever came of it."""
    runs = []

    def started(launcher, *options, ranks=2, tick=TICK, before=()):
        runs.append(Run(launcher, tmp_path, port, ranks, [tick, *options], before))
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
    for part in [*parts, "all ranks exit", REMEDY]:
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
    one_reason(run, f"rank 1 (process {run.pids[1]} on ", "has died")
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
    one_reason(run, f"rank 1 (process {run.pids[1]} on ", "has been stopped for 2 s")
    failed(run, 1)


def test_a_stopped_rank_in_true_seconds(start):
    run = start("torchrun", tick=liveness.TICK).wait_for_ranks()
    assert run.end(send(signal.SIGSTOP, 0), seconds=40) > liveness.STOPPED_AFTER_TICKS - 1
    one_reason(run, "rank 0 (", "has been stopped for 20 s")


@pytest.mark.parametrize("stopped", [[1], [0, 1]], ids=["one rank", "all ranks"])
def test_a_stopped_rank_that_is_continued_is_not_missed(start, stopped):
    """One in time, or all after any time, as when a whole job is suspended."""
    run = start("plain").wait_for_ranks()
    send(signal.SIGSTOP, *stopped)(run)
    time.sleep(TICK * (0.5 if len(stopped) == 1 else 2) * liveness.STOPPED_AFTER_TICKS)
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
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_the_only_line(start, launcher, rank):
    run = start(launcher).wait_for_ranks()
    run.end(touch(f"crash-{rank}"))
    assert run.errors == [f"error: rank {rank}: RuntimeError: it broke (--debug shows the traceback)"]
    failed(run)


@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("plain", 0), ("plain", 1)])
def test_bad_input_of_one_rank_is_the_only_line(start, launcher, rank):
    run = start(launcher).wait_for_ranks()
    run.end(touch(f"alone-error-{rank}"))
    assert run.errors == ["error: bad input"]
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
    one_reason(run, "the launcher (process ", "has died")


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
    one_reason(run, "the launcher (process ", "has died")


def test_a_parent_that_is_no_launcher_may_go(start):
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    run = start("plain", ranks=1, before=[sys.executable, "-c", code]).wait_for_ranks()
    kill_typed_command(run)
    time.sleep(TICK * 5)
    run.end(touch("end"))
    assert run.errors == []
    assert (run.folder / "saved-0").exists()


# Machines: process ids of their own are what tells one from another


@pytest.fixture
def start_machines(start, port):
    """Start ranks in containers, each with the number of ranks given."""
    container = ["unshare", "--map-root-user", "--user", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
    if subprocess.run([*container, ":"], capture_output=True, check=False).returncode != 0:
        pytest.skip("namespaces are not available")

    def started(*sizes):
        run = start("none", ranks=0)
        run.ranks = sum(sizes)
        command, ranks = f"python {WORKER} {run.folder} {TICK}", iter(range(run.ranks))
        for size in sizes:
            lines = [f'RANK={next(ranks)} LOCAL_RANK={local} {command} & jobs="$jobs $!"' for local in range(size)]
            lines += ["status=0; for job in $jobs; do wait $job || status=$?; done; exit $status"]
            run.start([*container, "\n".join(lines)], environment(port, 0, run.ranks))
        return run.wait_for_ranks()

    return started


def test_a_rank_killed_on_another_machine(start_machines):
    run = start_machines(2, 2)
    run.end(send(signal.SIGKILL, 2))
    one_reason(run, f"rank 2 (process {run.pids[2]} on ", "has died")
    assert run.statuses()[0] == 1


def test_an_error_on_another_machine_is_the_only_line(start_machines):
    run = start_machines(1, 2)
    run.end(touch("crash-2"))
    assert run.errors == ["error: rank 2: RuntimeError: it broke (--debug shows the traceback)"]
    assert run.statuses() == [1, 1]


@pytest.mark.parametrize("lost", [0, 2])
def test_a_machine_that_is_switched_off(start_machines, lost):
    run = start_machines(1, 1, 1)
    run.end(lambda run: run.processes[lost].parent().kill())  # process 1 of the container
    one_reason(run, f"rank {lost} (process {run.pids[lost]} on ", "has not answered for ")
    assert [status for i, status in enumerate(run.statuses()) if i != lost] == [1, 1]


@pytest.mark.parametrize("lost", [(0, 1), (2,)], ids=["the first", "the last"])
def test_a_machine_that_does_not_answer_also_when_it_comes_back(start_machines, lost):
    run = start_machines(2, 1)
    send(signal.SIGSTOP, *lost)(run)
    assert run.started[1 if 0 in lost else 0].wait(SECONDS) == 1
    host = os.uname().nodename
    who = f"ranks 0, 1 on {host} have" if 0 in lost else f"rank 2 (process {run.pids[2]} on {host}) has"
    one_reason(run, f"{who} not answered for ")
    run.end(send(signal.SIGCONT, *lost))
    assert 0 not in run.statuses()


def test_machines_suspended_together_miss_nothing(start_machines):
    run = start_machines(1, 1)
    time.sleep(TICK * 5)
    send(signal.SIGSTOP, 0, 1)(run)
    time.sleep(TICK * 1.3 * liveness.SILENT_AFTER_TICKS)
    send(signal.SIGCONT, 0, 1)(run)
    time.sleep(TICK * 10)
    run.end(touch("end"))
    assert run.errors == []
    assert run.statuses() == [0, 0]
