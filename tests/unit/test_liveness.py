"""What the watch counts and whom it gives up, without ranks: peers are processes that sleep, ticks are calls."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from dsft import processes
from dsft.distributed import liveness
from dsft.distributed.liveness import (
    TICKS_GONE,
    TICKS_ORPHANED,
    TICKS_SILENT,
    TICKS_SILENT_AFTER_FAILURE,
    TICKS_STOPPED,
    Beats,
    Liveness,
    Peer,
    Verdict,
    Word,
)
from tests.helpers import ROOT


class Ended(BaseException):
    """In place of the process's end; no Exception, so that the watch does not survive it."""


@pytest.fixture
def watch(monkeypatch) -> Liveness:
    """A watch that ends by an exception that holds the verdict."""

    def end(self, verdict):
        raise Ended(verdict)

    monkeypatch.setattr(Liveness, "_end", end)
    for name in liveness.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return Liveness(lambda: "")


@pytest.fixture
def peer(watch):
    """A process that sleeps, watched as rank 1."""
    with subprocess.Popen(["sleep", "60"]) as child:
        process = psutil.Process(child.pid)
        known = Peer(1, child.pid, process.create_time(), "h", watch._place, 0)
        watch._everyone, watch._here = [known], {1: liveness._process(known)}
        yield process
        child.kill()


def look(watch: Liveness, times: int) -> None:
    for _ in range(times):
        watch._look()


def given_up(watch: Liveness) -> Verdict:
    with pytest.raises(Ended) as ended:
        watch._look()
    return ended.value.args[0]


def become(process: psutil.Process, status: str) -> None:
    give_up = time.monotonic() + 10
    while process.status() != status:
        assert time.monotonic() < give_up
        time.sleep(0.001)


# Peers of the machine


@pytest.mark.parametrize("is_reaped", [False, True], ids=["zombie", "gone"])
def test_a_peer_that_has_died(watch, peer, is_reaped):
    look(watch, 2 * TICKS_GONE)
    peer.kill()
    become(peer, psutil.STATUS_ZOMBIE)
    if is_reaped:
        os.waitpid(peer.pid, 0)
    look(watch, TICKS_GONE - 1)
    verdict = given_up(watch)
    assert verdict.reason.startswith(f"rank 1 (process {peer.pid} on h) has died")
    assert verdict.lost == (1,)


def test_a_peer_that_is_stopped_for_long(watch, peer):
    peer.suspend()
    become(peer, psutil.STATUS_STOPPED)
    look(watch, TICKS_STOPPED - 1)
    peer.resume()
    become(peer, psutil.STATUS_SLEEPING)
    look(watch, 1)
    peer.suspend()
    become(peer, psutil.STATUS_STOPPED)
    look(watch, TICKS_STOPPED - 1)  # it counts anew
    assert "has been stopped for 20 s" in given_up(watch).reason
    watch._kill_stopped()
    become(peer, psutil.STATUS_ZOMBIE)


def test_only_a_stopped_peer_is_killed(watch, peer):
    watch._stopped[1] = TICKS_STOPPED
    watch._kill_stopped()
    assert peer.status() in (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING)


def test_another_process_with_the_number_of_a_peer_is_not_it(watch, peer):
    later = Peer(1, peer.pid, peer.create_time() - 60, "h", watch._place, 0)
    assert liveness._process(later) is None
    assert liveness._process(Peer(1, 2**22 + 1, 0.0, "h", watch._place, 0)) is None


def test_a_process_table_that_cannot_be_read_loses_nobody(watch, peer, monkeypatch):
    def refuse(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "status", refuse)
    look(watch, 2 * TICKS_STOPPED)


def test_a_fault_of_the_watch_ends_nothing(watch, monkeypatch, capfd):
    def fail():
        raise RuntimeError("no table")

    assert watch._survive(fail) is None
    assert capfd.readouterr().err == ""
    watch._debug = True
    assert watch._survive(fail) is None
    assert "RuntimeError: no table" in capfd.readouterr().err


def test_the_word_is_given_once():
    first, second, third = Word(), Word(), Word()
    for other in (second, third):
        other.share(Peer(0, os.getpid(), 0.0, "h", "p", first.file))
    assert [second.take(), first.take(), third.take(), second.take()] == [True, False, False, True]


def test_a_word_that_cannot_be_shared_is_ones_own():
    word = Word()
    word.share(Peer(0, os.getpid(), 0.0, "h", "p", 10**6))
    assert word.take()


# The launcher


@pytest.fixture
def orphan(watch, monkeypatch) -> Liveness:
    """A watch whose launcher has died."""
    watch._launcher = os.getppid() + 1
    return watch


def test_an_orphan_without_steps_ends_at_once(orphan):
    assert given_up(orphan).reason == f"the run's launcher (process {os.getppid() + 1}) has died"


def test_an_orphan_with_steps_is_told_once_and_has_ten_minutes(orphan):
    told = []
    orphan.on_orphaned = lambda: told.append(True)
    look(orphan, TICKS_ORPHANED)
    assert told == [True]
    assert "it did not get to its end in 10 minutes" in given_up(orphan).reason


@pytest.mark.parametrize(
    ("variables", "is_watched"), [({}, False), ({"TORCHELASTIC_RUN_ID": "x"}, True), ({"CROSS_SIZE": "1"}, True)]
)
def test_a_parent_is_watched_where_it_is_a_launcher(watch, monkeypatch, variables, is_watched):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Liveness(lambda: "")._launcher == (processes.PARENT if is_watched else None)


def test_the_parent_is_taken_down_before_torch_is_loaded():
    code = "import sys, dsft.train; assert 'dsft.processes' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Machines


class Store:
    """In place of TCPStore's answers."""

    def __init__(self, watch: Liveness) -> None:
        self.beats = Beats.__new__(Beats)
        self.beats._place, self.beats._places, self.beats.verdict, self.beats.is_broken = "b", ["a", "b", "c"], None, 0
        self.beats._heard = self.beats._listened = (0, dict.fromkeys("abc", 0))
        self.beats._silent = liveness.Counter()
        watch._beats = self.beats
        watch._everyone = [Peer(rank, 1, 0.0, f"host-{place}", place, 0) for rank, place in enumerate("abc")]

    def answer(self, *places: str) -> None:
        """One answer, in which the machines named have raised their counter."""
        answers, counts = self.beats._heard
        self.beats._heard = answers + 1, {place: count + (place in places) for place, count in counts.items()}


@pytest.fixture
def store(watch) -> Store:
    return Store(watch)


def test_a_machine_that_was_heard_of_is_given_up_when_silent(watch, store):
    for _ in range(2 * TICKS_SILENT):
        store.answer(*"abc")
        look(watch, 1)
    for _ in range(TICKS_SILENT - 1):
        store.answer(*"ab")
        look(watch, 1)
    store.answer(*"ab")
    verdict = given_up(watch)
    assert verdict.reason.startswith("rank 2 (process 1 on host-c) has not answered for 45 s")
    assert verdict.lost == (2,)


def test_a_machine_that_was_never_heard_of_is_not_watched(watch, store):
    for _ in range(3 * TICKS_SILENT):
        store.answer(*"ab")
        look(watch, 1)
    watch._beats = None
    look(watch, TICKS_SILENT)


def test_a_store_that_does_not_answer_is_the_silence_of_the_first_machine_alone(watch, store):
    store.answer(*"abc")
    look(watch, TICKS_SILENT)
    assert given_up(watch).lost == (0,)


@pytest.mark.parametrize("what", ["a collective", "the connection"])
def test_silence_after_a_failure_is_believed_soon(watch, store, what):
    store.answer(*"abc")
    look(watch, 1)
    watch._collective_failed, store.beats.is_broken = what == "a collective", what == "the connection"
    look(watch, TICKS_SILENT_AFTER_FAILURE - 1)
    assert given_up(watch).lost == (0,)


def test_what_another_machine_tells_is_the_end_here_too(watch, store):
    store.beats.verdict = Verdict("the run's launcher has died")
    assert given_up(watch) is store.beats.verdict


@pytest.mark.parametrize(("lost", "speaks"), [((), False), ((0,), True), ((2,), False), ((0, 1), False)])
def test_the_machine_of_the_lowest_rank_that_is_left_speaks(watch, store, lost, speaks):
    watch._place = "b"
    assert watch._speaks(Verdict("", lost)) is speaks


# Saying so


def test_a_remedy_that_hangs_or_fails_is_left_out(watch, monkeypatch, capfd):
    def fail():
        raise OSError("a disk error")

    monkeypatch.setattr(liveness, "_within", lambda seconds, work, within=liveness._within: within(0.2, work))
    for remedy, line in (
        (lambda: time.sleep(60), "error: the run's launcher has died; all ranks end\n"),
        (fail, "error: the run's launcher has died; all ranks end\n"),
        (lambda: "go on", "error: the run's launcher has died; all ranks end; go on\n"),
    ):
        watch._remedy = remedy
        watch._say("the run's launcher has died")
        assert capfd.readouterr().err == line


def test_without_peers_there_is_nothing_to_explain(watch):
    watch.explain()
