"""Ranks that notice when another one dies, is stopped or is lost with its machine, or when their launcher dies.

Collectives do not: gloo waits half an hour for a stopped peer and NCCL ten minutes for a dead one. A launcher waits
half a minute for ranks that do not hear its SIGTERM, and when it is killed itself, its ranks go on as orphans.

So every rank has a thread that looks around once a second. It counts its own turns and compares no clocks: when a
whole job is suspended and continued, nobody has missed anything.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import psutil
import torch.distributed as dist

from dsft import processes
from dsft.errors import UserError, print_error

Result = TypeVar("Result")

TICK = 1.0
"""Seconds between two looks. The longest way to an end, by TICKS_SILENT, stays below a minute."""
TICKS_GONE = 3  # until a peer's end is told: where it was in order, its launcher has ended this rank by then
TICKS_STOPPED = 20  # until a peer that a signal has stopped is given up
TICKS_SILENT = 45  # until a machine of which nothing is heard is given up
TICKS_SILENT_AFTER_FAILURE = 5  # the same where a collective has failed, or the connection to the store
TICKS_AGREEING = 3  # for machines to hear of each other why they end
TICKS_ORPHANED = 600  # for a run to end in order when its launcher is gone
GONE = "gone"
LAUNCHER_VARIABLES = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}  # torchrun's; that of DeepSpeed's launcher on each machine


@dataclass(frozen=True)
class Peer:
    """A rank as the others know it."""

    rank: int
    pid: int
    created: float
    host: str
    place: str
    """Where its process id means something: ranks of one place see each other in the process table."""
    word: int
    """Number of its file that holds the place's word."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, and which ranks are no more."""

    reason: str
    lost: tuple[int, ...] = ()


class Word:
    """The right to say why the run ends, which the ranks of a place have once, so that one line is printed.

    It is a byte in a pipe that all of them hold: the system hands it to one, and forgets the pipe with the last.
    """

    def __init__(self) -> None:
        self.file, writer = os.pipe()
        os.set_blocking(self.file, False)
        os.write(writer, b"1")
        self._is_mine = False

    def share(self, first: Peer) -> None:
        """Hold the word of the place's first rank. Where the system does not allow it, this rank keeps its own."""
        with suppress(OSError):
            shared = os.open(f"/proc/{first.pid}/fd/{first.word}", os.O_RDONLY | os.O_NONBLOCK)
            os.close(self.file)
            self.file = shared

    def take(self) -> bool:
        """Whether this rank has it, or gets it now."""
        with suppress(BlockingIOError):
            self._is_mine = self._is_mine or bool(os.read(self.file, 1))
        return self._is_mine


class Beats:
    """How machines hear of each other: ranks raise their machine's counter in a store that rank 0 holds.

    A machine is heard of as long as one of its ranks gets a turn; its ranks see to each other. The requests have a
    thread of their own, because TCPStore waits without limit for the answer of a stopped process.
    """

    def __init__(
        self, store: dist.TCPStore, place: str, places: Iterable[str], reached: Iterable[str], tick: float
    ) -> None:
        """`reached` are the places that have raised their counters; the others may never be heard of."""
        self._store, self._place, self._tick = store, place, tick
        self._places, reached = list(places), set(reached)
        counters = {place: int(place in reached) for place in self._places}
        self._heard = self._listened = (0, counters)  # answers of the store, counters
        self._silent: Counter[str] = Counter()
        self._own_verdict: Verdict | None = None
        self.verdict: Verdict | None = None
        """What the first rank that found a reason to end has told all machines."""
        self.is_broken = False
        threading.Thread(target=self._run, name="dsft beats", daemon=True).start()

    @classmethod
    def open_store(cls, places: Iterable[str]) -> dist.TCPStore:
        """Rank 0's part: a store on a free port."""
        store = cls.reach_store(None)
        for key, value in (*((place, "0") for place in places), ("verdict", "")):
            store.set(key, value)
        return store

    @classmethod
    def reach_store(cls, port: int | None) -> dist.TCPStore:
        """The other ranks' part; all meet at MASTER_ADDR already, which is rank 0's machine."""
        host, limit = os.environ["MASTER_ADDR"], timedelta(seconds=10)
        return dist.TCPStore(host, port or 0, is_master=port is None, timeout=limit, wait_for_workers=False)

    def listen(self) -> dict[str, int]:
        """The ticks for which each other machine has been silent; one that was never heard of is not counted.

        Where the store does not answer, that is the silence of rank 0's machine, and says nothing of the others.
        """
        (answers_before, before), (answers, now) = self._listened, self._heard
        self._listened = answers, now
        answered = answers != answers_before
        for place in self._places:
            if answered and (place == self._places[0] or now[place] != before[place]):
                self._silent[place] = 0
            elif now[place] and (answered or place == self._places[0]):
                self._silent[place] += 1
        return {place: ticks for place, ticks in self._silent.items() if place != self._place}

    def agree(self, verdict: Verdict) -> Verdict:
        """Tell the other machines; what they were told first is what all say. Without a store, one's own."""
        self._own_verdict = verdict
        for _ in range(TICKS_AGREEING):
            if self.verdict is None:
                time.sleep(self._tick)
        return self.verdict or verdict

    def _run(self) -> None:
        try:
            while True:
                if self._own_verdict is not None:
                    self._store.compare_set("verdict", "", json.dumps(asdict(self._own_verdict)))
                self._store.add(self._place, 1)
                *counts, told = self._store.multi_get([*self._places, "verdict"])
                self._heard = (
                    self._heard[0] + 1,
                    {place: int(count) for place, count in zip(self._places, counts, strict=True)},
                )
                if told:
                    self.verdict = Verdict(**json.loads(told))
                time.sleep(self._tick)
        except Exception:  # rank 0 has ended, or the network lost the connection
            self.is_broken = True


class Liveness:
    """The watch of one rank: `start` it first of all, `meet` once there is a process group, `close` at the end."""

    current: ClassVar["Liveness | None"] = None
    """The one that is watching in this process."""

    def __init__(
        self, remedy: Callable[[], str], *, debug: bool = False, tick: float = TICK, place: str | None = None
    ) -> None:
        """Take down who started this process.

        Args:
            remedy: what a user can do after the end. It may only read files, and gets two seconds.
            debug: show what goes wrong in the watch itself.
            tick: seconds between two looks.
            place: which ranks see each other in the process table; found out where not given.
        """
        self.on_orphaned: Callable[[], object] | None = None
        """What makes the run save and end when the launcher has died. Without it the process ends at once."""
        self._remedy, self._debug, self._tick, self._place = remedy, debug, tick, place or _this_place()
        self._launcher = processes.PARENT if LAUNCHER_VARIABLES & os.environ.keys() else None
        self._outer_launcher: psutil.Process | None = None
        started_by = processes.launchers()
        if len(started_by) > 1 and "deepspeed.launcher.launch" in started_by[0][1]:
            self._outer_launcher = started_by[1][0]  # the command a user typed, of which that is the child
        self._word = Word()
        self._everyone: list[Peer] = []
        self._here: dict[int, psutil.Process] = {}
        self._beats: Beats | None = None
        self._gone: Counter[int] = Counter()
        self._stopped: Counter[int] = Counter()
        self._ticks = self._orphaned = 0
        self._is_suspicious = self._is_ending = self._collective_failed = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch the launcher from now on, if there is one."""
        Liveness.current = self
        if self._launcher is not None:
            self._start_thread()

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dsft liveness", daemon=True)
            self._thread.start()

    def meet(self) -> None:
        """Watch the other ranks from now on. Collective."""
        if dist.get_world_size() == 1:
            return
        me, host = psutil.Process(), socket.gethostname()
        everyone = _gather(Peer(dist.get_rank(), me.pid, me.create_time(), host, self._place, self._word.file))
        here = [peer for peer in everyone if peer.place == self._place]
        if here[0].pid != me.pid:
            self._word.share(here[0])
        places = dict.fromkeys(peer.place for peer in everyone)
        if len(places) > 1:
            self._meet_machines(list(places))
        found = {peer.rank: _process(peer) for peer in here if peer.pid != me.pid}
        self._everyone, self._here = everyone, {rank: process for rank, process in found.items() if process}
        self._start_thread()

    def _meet_machines(self, places: list[str]) -> None:
        """Without a store the ranks of this machine still watch each other."""
        store = self._survive(lambda: Beats.open_store(places)) if dist.get_rank() == 0 else None
        port = _gather(None if store is None else store.port)[0]
        if port is not None and store is None:
            store = self._survive(lambda: Beats.reach_store(port))
        heard = store is not None and self._survive(lambda: store.add(self._place, 1)) is not None
        reached = [place for place, is_heard in _gather((self._place, heard)) if is_heard]
        if store is not None:
            self._beats = Beats(store, self._place, places, reached, self._tick)

    def explain(self, seconds: float = 15) -> None:
        """Where a collective may have failed: end with the reason if it is a lost peer, else return soon.

        For the main thread alone. The launcher has seen a peer end too: its SIGTERM would end this rank before it
        knows the reason.
        """
        if not self._everyone:
            return
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._collective_failed = True
        turns = self._ticks + (TICKS_GONE + TICKS_AGREEING + 2 if self._beats else 2)  # other machines tell later
        limit = time.monotonic() + seconds
        while self._is_ending or (time.monotonic() < limit and (self._ticks < turns or self._is_suspicious)):
            time.sleep(self._tick / 4)
        signal.signal(signal.SIGTERM, before)

    def close(self) -> None:
        """This rank ends in order or says itself why it ends; the others of its machine need not add to that."""
        self._closed.set()
        self._word.take()
        Liveness.current = None

    # The thread

    def _run(self) -> None:
        while not self._closed.wait(self._tick):
            self._survive(self._look)
            self._ticks += 1

    def _survive(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives, or None: a fault of the watch must not end the run."""
        try:
            return work()
        except Exception:
            if self._debug:
                traceback.print_exc()
            return None

    def _look(self) -> None:
        self._look_at_launcher()
        if self._beats is not None and self._beats.verdict is not None:
            self._end(self._beats.verdict)
        self._look_at_processes()
        silent = self._beats.listen() if self._beats is not None else {}
        self._is_suspicious = any(self._gone.values()) or any(ticks > 1 for ticks in silent.values())
        quick = self._collective_failed or (self._beats is not None and self._beats.is_broken)
        for place, ticks in silent.items():
            if ticks >= (TICKS_SILENT_AFTER_FAILURE if quick else TICKS_SILENT):
                seconds = f"{ticks * self._tick:.0f} s"
                self._lose(
                    [peer for peer in self._everyone if peer.place == place],
                    f"not answered for {seconds}: it has ended, or the machine or its network is lost",
                )

    def _look_at_launcher(self) -> None:
        if self._orphaned:
            self._orphaned += 1
            if self._orphaned > TICKS_ORPHANED:
                minutes = f"{TICKS_ORPHANED * self._tick / 60:.0f} minutes"
                self._end(Verdict(f"the run's launcher has died, and it did not get to its end in {minutes}"))
        elif self._launcher is not None and (
            os.getppid() != self._launcher or (self._outer_launcher and _state(self._outer_launcher) == GONE)
        ):
            self._orphaned = 1
            if self.on_orphaned is None:
                self._end(Verdict(f"the run's launcher (process {self._launcher}) has died"))
            self.on_orphaned()

    def _look_at_processes(self) -> None:
        for rank, process in self._here.items():
            state = _state(process)
            self._gone[rank] = self._gone[rank] + 1 if state == GONE else 0
            self._stopped[rank] = self._stopped[rank] + 1 if state == psutil.STATUS_STOPPED else 0
        gone = [peer for peer in self._everyone if self._gone[peer.rank] >= TICKS_GONE]
        if gone:
            self._lose(gone, "died; where it does not say why, the system may have killed it for lack of memory")
        stopped = [peer for peer in self._everyone if self._stopped[peer.rank] >= TICKS_STOPPED]
        if stopped:
            seconds = f"{TICKS_STOPPED * self._tick:.0f} s"
            self._lose(stopped, f"been stopped for {seconds}, by a signal or a debugger")

    def _lose(self, peers: list[Peer], what: str) -> NoReturn:
        """End because of peers of one machine."""
        ranks = tuple(peer.rank for peer in peers)
        if len(peers) == 1:
            self._end(Verdict(f"{peers[0]} has {what}", ranks))
        self._end(Verdict(f"ranks {', '.join(map(str, ranks))} on {peers[0].host} have {what}", ranks))

    def _end(self, verdict: Verdict) -> NoReturn:
        """Say why, once in all, and end this process without its clean-up, in which it would wait for the lost."""
        self._is_ending = True
        try:
            if self._beats is not None:
                verdict = self._beats.agree(verdict)
            if self._word.take():
                self._kill_stopped()
                if self._speaks(verdict):
                    _within(4, lambda: self._say(verdict.reason))
            _within(1, sys.stdout.flush)
            if self._beats is not None:
                time.sleep(TICKS_AGREEING * self._tick)  # the store ends with rank 0
        finally:
            os._exit(1)

    def _speaks(self, verdict: Verdict) -> bool:
        """Whether the lowest rank that is left is of this place; before ranks have met, whether this is a first one."""
        left = [peer.place for peer in self._everyone if peer.rank not in verdict.lost]
        return left[0] == self._place if left else os.environ.get("LOCAL_RANK", "0") == "0"

    def _kill_stopped(self) -> None:
        """Nobody else would end it where there is no launcher, and torchrun waits half a minute before it does."""
        for rank, process in self._here.items():
            if self._stopped[rank] >= TICKS_STOPPED and _state(process) == psutil.STATUS_STOPPED:
                with suppress(psutil.Error):
                    process.kill()

    def _say(self, reason: str) -> None:
        remedy = _within(2, self._remedy)
        print_error(UserError("; ".join(filter(None, [reason, "all ranks end", remedy]))))


def _this_place() -> str:
    """A machine since its start, and a container on it that has process ids of its own."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _process(peer: Peer) -> psutil.Process | None:
    """Its process, which another one with that number later is not. None where it is not to be seen from here."""
    with suppress(psutil.Error):
        process = psutil.Process(peer.pid)
        if abs(process.create_time() - peer.created) < 10:  # the system's clock may have been set in between
            return process
    return None


def _state(process: psutil.Process) -> str:
    """Its status in the process table, or GONE. Where the table cannot be read it counts as running."""
    try:
        status = process.status() if process.is_running() else GONE
        return GONE if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else status
    except psutil.NoSuchProcess:
        return GONE
    except psutil.Error:
        return psutil.STATUS_RUNNING


def _within(seconds: float, work: Callable[[], Result]) -> Result | None:
    """What `work` gives, or None where it fails or takes longer: a file system or a full pipe may block it."""
    found: list[Result] = []

    def attempt() -> None:
        with suppress(Exception):
            found.append(work())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
