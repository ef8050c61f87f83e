"""Hosts on one machine: network namespaces joined by a switch, each with its own address, hostname and process ids.

Needs root, iproute2 and util-linux. Used by tests/cluster, bench_nodes.py and fault_drills.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
LINK = "eth0"


def unavailable_reason() -> str | None:
    """Why hosts cannot be made on this machine; None if they can."""
    if os.geteuid():
        return "hosts are network namespaces, which need root"
    name = f"dsft-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not available: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Host:
    """One host: node-0, node-1, … at 10.77.0.1, 10.77.0.2, …; it can reach the others by address, not by name."""

    def __init__(self, index: int, namespace: str) -> None:
        self.name, self.address = f"node-{index}", f"{NETWORK}.{index + 1}"
        self._namespace = namespace
        self.processes: list[psutil.Popen] = []

    def start(
        self, words: Sequence[Any], log: Path, *, env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> psutil.Popen:
        """Start a command with its output in `log`; the host's other commands do not see its processes."""
        enter = ["ip", "netns", "exec", self._namespace, "unshare", "--uts", "--pid", "--fork", "--mount-proc"]
        enter += ["--kill-child", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        base = {name: value for name, value in os.environ.items() if name not in ours}
        base |= {"PATH": f"{BIN}:{base['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("ab") as file:
            process = psutil.Popen(
                [*enter, *map(str, words)], cwd=cwd, env=base | (env or {}),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def ranks(self) -> list[psutil.Process]:
        """The processes of dsft.train on it, without their launchers."""
        found = [child for process in self.processes for child in process.children(recursive=True)]
        return [process for process in found if "RANK" in process.environ() and "dsft/train.py" in process.cmdline()]

    def kill(self, *, closing: bool = False) -> None:
        """Switch the host off: its link goes down first, unless its connections are to be closed."""
        if not closing:
            self.cut()
        for process in self.processes:
            if process.poll() is None:
                [first] = process.children()  # of the host's process ids: all others end with it
                first.kill()
            process.wait()
        self.processes.clear()

    def cut(self) -> None:
        """Take the link down."""
        self._run("ip", "link", "set", LINK, "down")

    def connect(self) -> None:
        """Take the link up."""
        self._run("ip", "link", "set", LINK, "up")

    def slow(self, rate: str) -> None:
        """Limit what the host sends per second, in the units of tc, such as 1gbit."""
        limit = ["tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
        self._run("tc", "qdisc", "replace", "dev", LINK, "root", *limit)

    def received(self) -> int:
        """Bytes that have come in over the link."""
        [link] = json.loads(self._run("ip", "-s", "-j", "link", "show", LINK))
        return int(link["stats64"]["rx"]["bytes"])

    def _run(self, *words: str) -> str:
        command = ["ip", "netns", "exec", self._namespace, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Cluster:
    """Hosts that a with statement makes and removes, and whatever runs on them."""

    def __init__(self, count: int, name: str = "") -> None:
        """`name` keeps clusters apart that one process has at the same time."""
        self._prefix = f"dsft{os.getpid()}-{name}"
        self.hosts = [Host(index, f"{self._prefix}{index}") for index in range(count)]

    def __enter__(self) -> "Cluster":
        switch = f"{self._prefix}switch"
        lines = [f"netns add {switch}", f"-n {switch} link add br0 type bridge", f"-n {switch} link set br0 up"]
        for index, host in enumerate(self.hosts):
            space = f"{self._prefix}{index}"
            lines += [
                f"netns add {space}",
                f"link add {LINK} netns {space} type veth peer name port{index} netns {switch}",
                f"-n {switch} link set port{index} master br0 up",
                f"-n {space} address add {host.address}/24 dev {LINK}",
                f"-n {space} link set {LINK} up",
                f"-n {space} link set lo up",
            ]
        try:
            for line in lines:
                subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*(f"{self._prefix}{index}" for index in range(len(self.hosts))), f"{self._prefix}switch"]:
            running = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in running.stdout.split():
                try:
                    psutil.Process(int(pid)).kill()
                except psutil.Error:
                    continue
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        for host in self.hosts:
            for process in host.processes:
                process.wait()
