"""What needs no ranks: heartbeats over a store in this process, and what the watch says. The rest has real ranks."""

import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch.distributed as dist

from dsft import processes
from dsft.distributed.liveness import Heartbeat, Liveness, Verdict
from tests.helpers import PRODUCED, ROOT

TICK = 0.05


def beat(machine: str, store: dist.Store, machines: str = "abc") -> Heartbeat:
    return Heartbeat(store, machine, list(machines), TICK, is_host=machine == "a")


def wait_for(condition) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(TICK)


def test_only_a_machine_that_was_heard_of_is_missed():
    store = dist.HashStore()
    store.add("b", 1)  # one beat, then silence; nothing was ever heard of c
    first = beat("a", store)
    wait_for(lambda: first.silent()["b"] > 5)
    assert first.silent()["c"] == 0
    second = beat("b", store)
    wait_for(lambda: first.silent()["b"] < 2)
    wait_for(lambda: second.silent()["a"] < 2)


class Unreachable(dist.Store):
    """A store that never answers, as that of a stopped process, or whose process has exited."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self._error = error

    def add(self, key, value):
        if self._error is not None:
            raise self._error
        time.sleep(60)


def test_a_store_that_does_not_answer_is_the_silence_of_the_first_machine_alone():
    heartbeat = beat("b", Unreachable())
    assert [heartbeat.silent() for _ in range(3)][-1] == {"a": 3, "c": 0}
    assert not heartbeat.is_broken
    mine = Verdict("it broke")
    assert heartbeat.agree(mine) is mine


def test_a_lost_connection_is_known():
    heartbeat = beat("b", Unreachable(RuntimeError("Connection reset by peer")))
    wait_for(lambda: heartbeat.is_broken)


def test_all_agree_on_the_first_verdict():
    store = dist.HashStore()
    first, second = (beat(machine, store, "ab") for machine in "ab")
    assert first.agree(Verdict("one", [1])) == Verdict("one", [1])
    assert second.agree(Verdict("two")).reason == "one"


@pytest.mark.parametrize(
    ("variables", "is_watched"), [({}, False), ({"TORCHELASTIC_RUN_ID": "x"}, True), ({"CROSS_SIZE": "1"}, True)]
)
def test_a_parent_is_watched_where_it_is_a_launcher(monkeypatch, variables, is_watched):
    for name in processes.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launcher = processes.Launcher()
    assert launcher.pid == (processes.PARENT if is_watched else None)
    assert not launcher.has_died()


def test_the_parent_is_taken_down_before_torch_is_loaded():
    code = "import sys, dsft.train; assert 'dsft.processes' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_process_table_that_cannot_be_read_loses_nobody(monkeypatch):
    def refuse(self):
        raise psutil.AccessDenied

    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "status", refuse)
        assert processes.state_of(psutil.Process()) == psutil.STATUS_RUNNING


DYING = """
import sys, time
from dsft import processes
from dsft.distributed import liveness

processes.PARENT, liveness.ORPHANED_TICKS = -1, 10  # another parent than it has
watch = liveness.Liveness(lambda: {remedy}, tick=0.02)
watch.on_orphaned = {on_orphaned}
watch.start()
time.sleep(60)
"""
ALONE = """
import torch
from dsft.distributed import liveness, rendezvous

liveness.MEET_TICKS, liveness.WAITING_TICKS = 600, 10
liveness.Liveness(lambda: "rerun", tick=0.005).start()
rendezvous.start_process_group(torch.device("cpu"))
"""
LATE = "the launcher has died, and the run did not stop within 0 minutes; all ranks exit; rerun"


@pytest.mark.parametrize(
    ("remedy", "on_orphaned", "told"),
    [
        ("'rerun'", "None", "the launcher (process -1) has died; all ranks exit; rerun"),
        ("1 / 0", "None", "the launcher (process -1) has died; all ranks exit"),
        ("time.sleep(60)", "None", "the launcher (process -1) has died; all ranks exit"),
        (
            "'rerun'",
            "lambda: print('saving', flush=True)",
            LATE,
        ),
        ("'rerun'", "lambda: 1 / 0", LATE),
    ],
    ids=["at once", "the remedy fails", "the remedy hangs", "it does not stop", "a fault of the watch"],
)
def test_an_orphan_says_why_it_exits(remedy, on_orphaned, told):
    words = [sys.executable, "-c", DYING.format(remedy=remedy, on_orphaned=on_orphaned)]
    env = {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, f"error: {told}\n")
    PRODUCED.add(told)
    assert done.stdout == ("saving\n" if "saving" in on_orphaned else "")


def test_without_peers_an_error_is_ones_own():
    watch = Liveness(lambda: "")
    watch.start()
    assert Liveness.current is watch
    watch.close(RuntimeError("it broke"))
    assert Liveness.current is None


def test_ranks_that_do_not_meet():
    """The first machine of two, whose other one has not been started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": where.split(":")[1], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", ALONE]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    told = f"the 2 ranks have not met at {where} within 0 minutes; check that every machine has started and reaches "
    told += "that address; all ranks exit; rerun"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"waiting for the ranks of other machines at {where}", f"error: {told}"]
    PRODUCED.add(told)
