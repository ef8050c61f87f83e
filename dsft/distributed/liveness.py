"""Ends the run when a rank is killed, stopped or unreachable, or when its launcher has died.

Collectives do not notice in time: gloo waits half an hour for a stopped peer, NCCL ten minutes for a dead one. A
launcher waits half a minute for ranks that ignore SIGTERM, and when it is killed itself, its ranks run on as orphans.

So every rank has a thread that looks once a second at the processes of its own machine, and another one that exchanges
heartbeats with the other machines. Both count their own ticks and compare no clocks: when a whole job is suspended
and continued, nobody has missed anything.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, NoReturn, TypeVar

import psutil
import torch.distributed as dist

from dsft import processes
from dsft.errors import UserError, print_error

Result = TypeVar("Result")

TICK = 1.0
"""Seconds between two looks. The slowest way to an exit, SILENT_AFTER_TICKS, stays below a minute."""
DEAD_AFTER_TICKS = 3  # if the peer exited normally, its launcher has ended this rank by then
STOPPED_AFTER_TICKS = 20
SILENT_AFTER_TICKS = 45  # a machine without heartbeats
SILENT_IF_FAILED_TICKS = 5  # the same once a collective or the connection to the store has failed
MEET_TICKS = 300  # for all ranks to meet at the start
WAITING_TICKS = 10  # until a machine says that it waits for others
AGREE_TICKS = 3  # for ranks to agree on the reason
ORPHANED_TICKS = 600  # for a run to save and exit after its launcher has died
LOST = {
    psutil.STATUS_DEAD: (DEAD_AFTER_TICKS, "died; if it printed no error, it may have been killed for lack of memory"),
    psutil.STATUS_STOPPED: (STOPPED_AFTER_TICKS, "been stopped for {seconds:.0f} s by a signal or a debugger"),
}


@dataclass(frozen=True)
class Peer:
    """A rank as the others know it."""

    rank: int
    pid: int
    host: str
    machine: str
    """Ranks with the same value see each other in the process table."""
    port: int
    """Of the store that rank 0 hosts, else 0."""


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, and which ranks are lost. Without a reason, the lost rank prints its own error."""

    reason: str
    lost: Sequence[int] = ()


class Heartbeat:
    """Every rank increments its machine's counter in a store on rank 0, and reads the others'.

    A machine is alive as long as one of its ranks gets a turn; its ranks watch each other. The store also holds the
    first verdict. Requests are made in a thread of their own, because a TCPStore waits forever for a stopped process.
    """

    def __init__(self, store: dist.Store, machine: str, machines: Sequence[str], tick: float, is_host: bool) -> None:
        """`machine` is this rank's, the first of `machines` rank 0's; the store ends with the process that hosts it."""
        self._store, self._machine, self._tick, self._is_host = store, machine, tick, is_host
        self._silent, self._first, self._proposal = dict.fromkeys(machines, 0), machines[0], ""
        self.is_broken = False
        self.verdict: Verdict | None = None  # the first one that any rank has published
        threading.Thread(target=self._run, name="dsft heartbeat", daemon=True).start()

    @staticmethod
    def connect(port: int | None = None) -> dist.TCPStore:
        """Connect to the store at MASTER_ADDR, which is rank 0's machine; without a port, host it."""
        host, limit = os.environ["MASTER_ADDR"], timedelta(seconds=10)
        return dist.TCPStore(host, port or 0, is_master=port is None, timeout=limit, wait_for_workers=False)

    def silent(self) -> dict[str, int]:
        """Ticks for which each other machine has been silent; called once a tick.

        A store that does not answer is the silence of rank 0's machine, and says nothing about the others.
        """
        self._silent[self._first] += 1
        return {machine: ticks for machine, ticks in self._silent.items() if machine != self._machine}

    def agree(self, verdict: Verdict) -> Verdict:
        """Publish a verdict; returns the one that was published first, or this one if the store does not answer."""
        self._proposal = json.dumps(asdict(verdict))
        for _ in range(AGREE_TICKS):
            if self.verdict is None:
                time.sleep(self._tick)
        if self._is_host:
            time.sleep(2 * self._tick)  # until the others have read it
        return self.verdict or verdict

    def _run(self) -> None:
        machines = list(self._silent)
        before = [b"0"] * len(machines)
        try:
            for machine in machines:
                self._store.add(machine, 0)
            while True:
                published = self._store.compare_set("verdict", "", self._proposal)
                if published:
                    self.verdict = Verdict(**json.loads(published))
                self._store.add(self._machine, 1)
                counts = self._store.multi_get(machines)
                for machine, old, new in zip(machines, before, counts, strict=True):
                    is_heard = machine == self._first or old != new or new == b"0"  # 0: it cannot reach the store
                    self._silent[machine] = 0 if is_heard else self._silent[machine] + 1
                before = counts
                time.sleep(self._tick)
        except Exception:  # rank 0 has exited, or the network has dropped the connection
            self.is_broken = True


class Liveness:
    """The watch of one rank: `start` it first, `meet` once there is a process group, `close` at the end."""

    current: ClassVar["Liveness | None"] = None
    """The one that is watching in this process."""

    def __init__(self, remedy: Callable[[], str], *, debug: bool = False, tick: float = TICK) -> None:
        """`remedy` says what a user can do next; it may only read files, and gets two seconds."""
        self.on_orphaned: Callable[[], object] | None = None
        """Makes the run save and exit when the launcher has died. Without it the process exits at once."""
        self._remedy, self._debug, self._tick = remedy, debug, tick
        self._launcher = processes.Launcher()
        self._rank = 0
        self._peers: list[Peer] = []
        self._processes: dict[int, psutil.Process] = {}  # of the other ranks on this machine
        self._heartbeat: Heartbeat | None = None
        self._since: Counter[tuple[int, str]] = (
            Counter()
        )  # ticks for which a rank has been psutil.STATUS_DEAD or stopped
        self._ticks = self._orphaned_ticks = 0
        self._is_suspicious = self._is_ending = self._collective_failed = self._has_met = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dsft liveness", daemon=True)

    def start(self) -> None:
        """Watch the launcher from now on, if there is one, and how long the ranks take to meet."""
        Liveness.current = self
        if self._launcher.pid is not None or os.environ.get("WORLD_SIZE", "1") != "1":
            self._thread.start()

    def meet(self) -> None:
        """Watch the other ranks from now on. Collective."""
        if dist.get_world_size() == 1:
            self._has_met = True
            return
        self._rank = dist.get_rank()
        store = self._survive(Heartbeat.connect) if self._rank == 0 else None
        me = Peer(self._rank, os.getpid(), socket.gethostname(), processes.this_machine(), store.port if store else 0)
        peers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peers, me)
        if store is None and peers[0].port:
            store = self._survive(lambda: Heartbeat.connect(peers[0].port))
        for peer in peers:
            if peer.machine == me.machine and peer != me:
                with suppress(psutil.Error):  # it may have died already
                    self._processes[peer.rank] = psutil.Process(peer.pid)
        self._peers, self._has_met = peers, True
        # A rank that cannot reach the store beats for itself alone: ranks of one machine still watch each other.
        machines = list(dict.fromkeys(peer.machine for peer in peers))
        self._heartbeat = Heartbeat(store or dist.HashStore(), me.machine, machines, self._tick, self._rank == 0)
        if not self._thread.is_alive():
            self._thread.start()

    def close(self, error: BaseException | None = None) -> None:
        """Stop watching. Does not return if a lost peer is the reason of an `error`; else this rank alone prints it."""
        reports = isinstance(error, Exception) and not getattr(error, "is_agreed", False)
        if self._heartbeat is not None and reports and not isinstance(error, UserError):
            self._explain()
        self._closed.set()
        Liveness.current = None
        if self._heartbeat is not None and reports:
            self._heartbeat.agree(Verdict("", [self._rank]))

    def _explain(self) -> None:
        """Wait until a lost peer would be known. The launcher's SIGTERM may come before that."""
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._collective_failed = True
        has_neighbours = len(self._processes) < len(self._peers) - 1  # machines, whose verdict takes longer
        enough = self._ticks + (DEAD_AFTER_TICKS + 3 if has_neighbours else 2)
        limit = time.monotonic() + 15
        while self._is_ending or (time.monotonic() < limit and (self._ticks < enough or self._is_suspicious)):
            time.sleep(self._tick / 4)
        signal.signal(signal.SIGTERM, before)

    # The thread

    def _run(self) -> None:
        while not self._closed.wait(self._tick):
            self._survive(self._look)
            self._ticks += 1

    def _survive(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns, or None: a fault of the watch must not end the run."""
        try:
            return work()
        except Exception:
            if self._debug:
                traceback.print_exc()
            return None

    def _look(self) -> None:
        self._look_at_launcher()
        if not self._has_met and "MASTER_ADDR" in os.environ:
            self._look_for_ranks()
        heartbeat = self._heartbeat
        if heartbeat is None:
            return
        verdict = heartbeat.verdict
        if verdict is not None and (verdict.reason or self._collective_failed):
            self._end(verdict)
        self._look_at_processes()
        silent = heartbeat.silent()
        self._is_suspicious = bool(self._gone()) or any(ticks > 1 for ticks in silent.values())
        limit = SILENT_IF_FAILED_TICKS if self._collective_failed or heartbeat.is_broken else SILENT_AFTER_TICKS
        for machine, ticks in silent.items():
            if ticks >= limit:
                lost = [peer for peer in self._peers if peer.machine == machine]
                self._lose(lost, f"not answered for {ticks * self._tick:.0f} s: its machine or network may be down")

    def _look_at_launcher(self) -> None:
        if self._orphaned_ticks:
            self._orphaned_ticks += 1
            if self._orphaned_ticks > ORPHANED_TICKS:
                minutes = ORPHANED_TICKS * self._tick / 60
                self._end(Verdict(f"the launcher has died, and the run did not stop within {minutes:.0f} minutes"))
        elif self._launcher.has_died():
            self._orphaned_ticks = 1
            if self.on_orphaned is None:
                self._end(Verdict(f"the launcher (process {self._launcher.pid}) has died"))
            self.on_orphaned()

    def _look_for_ranks(self) -> None:
        env = os.environ
        where = f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT', '')}"
        is_first = env.get("LOCAL_RANK", "0") == "0" and env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE")
        if self._ticks == WAITING_TICKS and is_first:
            print(f"waiting for the ranks of other machines at {where}", file=sys.stderr, flush=True)
        if self._ticks >= MEET_TICKS:
            minutes = MEET_TICKS * self._tick / 60
            reason = f"the {env['WORLD_SIZE']} ranks have not met at {where} within {minutes:.0f} minutes"
            self._end(Verdict(f"{reason}; check that every machine has started and reaches that address"))

    def _look_at_processes(self) -> None:
        for rank, process in self._processes.items():
            now = processes.state_of(process)
            for state in LOST:
                self._since[rank, state] = self._since[rank, state] + 1 if state == now else 0
        for state, (limit, what) in LOST.items():
            lost = [peer for peer in self._peers if self._since[peer.rank, state] >= limit]
            if lost:
                self._lose(lost, what.format(seconds=limit * self._tick))

    def _lose(self, peers: list[Peer], what: str) -> NoReturn:
        """End because of peers of one machine."""
        ranks = [peer.rank for peer in peers]
        who = f"rank {ranks[0]} (process {peers[0].pid} on {peers[0].host}) has"
        if len(ranks) > 1:
            who = f"ranks {', '.join(map(str, ranks))} on {peers[0].host} have"
        self._end(Verdict(f"{who} {what}", [*ranks, *self._gone()]))

    def _gone(self) -> list[int]:
        return [rank for rank in self._processes if self._since[rank, psutil.STATUS_DEAD]]

    def _end(self, verdict: Verdict) -> NoReturn:
        """Print the reason on one rank and end this process without its clean-up, which would wait for the lost."""
        self._is_ending = True
        try:
            if self._heartbeat is not None:
                verdict = self._heartbeat.agree(verdict)
            for rank, process in self._processes.items():  # without a launcher nobody else would end a stopped one
                if rank in verdict.lost and processes.state_of(process) == psutil.STATUS_STOPPED:
                    self._survive(process.kill)
            left = [peer.rank for peer in self._peers if peer.rank not in verdict.lost]
            is_lowest = left[0] == self._rank if left else os.environ.get("LOCAL_RANK", "0") == "0"
            if verdict.reason and is_lowest:
                parts = [verdict.reason, "all ranks exit", _within(2, self._remedy)]
                _within(2, lambda: print_error(UserError("; ".join(filter(None, parts)))))
            elif verdict.reason:
                time.sleep(AGREE_TICKS * self._tick)  # at the first exit the launcher may end the one that reports
            _within(1, sys.stdout.flush)
        finally:
            os._exit(1)


def _within(seconds: float, work: Callable[[], Result]) -> Result | None:
    """What `work` returns, or None if it fails or takes longer: a file system or a full pipe may block it."""
    found: list[Result] = []

    def attempt() -> None:
        with suppress(Exception):
            found.append(work())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
