"""Runs over two hosts, which are network namespaces: started by torchrun and deepspeed, broken, and resumed.

The hosts have no name service and no default route. Root is needed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import BIN, PRODUCED, ROOT, SAMPLE_TRAIN, flags, metrics, start_words

sys.path.append(str(ROOT / "scripts"))
from hosts import Cluster, Host, unavailable_reason

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hosts")]
KEYS = ("train/loss", "train/grad_norm")
SECONDS = 400  # a limit for slow machines; a start of two hosts takes ten seconds to a minute


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)
    with Cluster(2) as cluster:
        yield cluster.hosts


@pytest.fixture(scope="module")
def words(tiny_model) -> list[str]:
    return flags(
        model=tiny_model, train_files=SAMPLE_TRAIN, dtype="float32", lora_rank=4, lr=1e-3, train_batch_size=8,
        total_training_steps=40, save_steps=2, eval_steps=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(commands, words, tmp_path_factory) -> list[dict]:
    """What one process computes."""
    out = tmp_path_factory.mktemp("one")
    done = commands([*start_words("fsdp", 1), *words, "--output_dir", out])
    assert done.status == 0, done.err
    return metrics(out)


def check(out: Path, expected: list[dict], log: str) -> None:
    found = metrics(out)
    assert len(found) == len(expected), log
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[key] for key in KEYS] == pytest.approx([theirs[key] for key in KEYS], rel=1e-5), log


def read(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("log*")))


def wait_for(condition, folder: Path, hosts: list[Host], seconds: float = SECONDS) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, read(folder)
        assert any(p.poll() is None for host in hosts for p in host.processes), read(folder)
        time.sleep(0.1)


def end(folder: Path, hosts: list[Host], seconds: float = SECONDS) -> list[int]:
    """The exit statuses."""
    give_up = time.monotonic() + seconds
    processes = [process for host in hosts for process in host.processes]
    while any(process.poll() is None for process in processes):
        assert time.monotonic() < give_up, read(folder)
        time.sleep(0.1)
    return [process.poll() for process in processes]


def start_torchrun(hosts: list[Host], folder: Path, *typed: object) -> None:
    first = hosts[0].address
    for index, host in enumerate(hosts):
        host.processes.clear()
        launcher = ["torchrun", "--nnodes", 2, "--node_rank", index, "--nproc_per_node", 1, "--master_addr", first]
        host.start([*launcher, "dsft/train.py", *typed], folder / f"log{index}")


def test_torchrun_trains_and_a_cut_link_ends_the_run_within_a_minute(hosts, words, expected, tmp_path):
    """Then the same run goes on with the other backend and sharding."""
    out = tmp_path / "out"
    start_torchrun(hosts, tmp_path, "--backend", "fsdp", "--sharding", "full", *words, "--output_dir", out)
    wait_for(lambda: (out / "checkpoint-000002" / "COMPLETE").exists(), tmp_path, hosts)
    hosts[1].cut()
    cut = time.monotonic()
    assert end(tmp_path, hosts, 90) == [1, 1], read(tmp_path)
    assert time.monotonic() - cut < 60 + 10  # and torchrun's own end
    errors = [line for line in read(tmp_path).splitlines() if line.startswith("error: ")]
    PRODUCED.update(line.removeprefix("error: ") for line in errors)
    assert len(errors) == 2, read(tmp_path)  # one on each side of the cut
    for line, lost in zip(errors, ("rank 1", "rank 0"), strict=True):
        assert line.startswith(f"error: {lost} (process ")
        assert "has not answered for " in line
    hosts[1].connect()
    start_torchrun(hosts, tmp_path, "--backend", "zero3", "--sharding", "hybrid", *words, "--output_dir", out)
    assert end(tmp_path, hosts) == [0, 0], read(tmp_path)
    assert "over eth0" in read(tmp_path)
    check(out, expected, read(tmp_path))


def test_a_host_that_dies_and_returns_by_elastic_torchrun(hosts, words, expected, tmp_path):
    """The run goes on with one host meanwhile."""
    out, first = tmp_path / "out", hosts[0].address

    def start(index: int) -> None:
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first}:29400", "--rdzv_id", "run"]
        rendezvous += ["--rdzv_conf", f"is_host={int(index == 0)}", "--local_addr", hosts[index].address]
        launcher = ["torchrun", "--nnodes", "1:2", "--nproc_per_node", 1, "--max_restarts", 3, *rendezvous]
        hosts[index].start(
            [*launcher, "dsft/train.py", "--backend", "fsdp", *words, "--output_dir", out],
            tmp_path / f"log{index}",
            env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )

    def starts() -> list[str]:
        return [line for line in read(tmp_path).splitlines() if line.startswith("batch ")]

    for index in range(2):
        start(index)
    wait_for(lambda: (out / "checkpoint-000002" / "COMPLETE").exists(), tmp_path, hosts)
    hosts[1].kill(closing=True)
    wait_for(lambda: len(starts()) > 1, tmp_path, hosts)
    alone = hosts[0].ranks()
    for rank in alone:  # until the other host is there
        rank.suspend()
    start(1)
    wait_for(lambda: "closing signal SIGTERM" in (tmp_path / "log0").read_text(), tmp_path, hosts)
    for rank in alone:
        rank.resume()
    assert end(tmp_path, hosts)[0] == 0, read(tmp_path)
    ranks = [line.split(" rows on ")[1][:6] for line in starts()]
    assert ranks[:3] == ["2 rank", "1 rank", "2 rank"], read(tmp_path)
    check(out, expected, read(tmp_path))


@pytest.fixture
def ssh(hosts, tmp_path) -> dict[str, str]:
    """A server for ssh on each host; returns the environment in which ssh finds its key and .deepspeed_env."""
    if missing := [name for name in ("/usr/sbin/sshd", "/usr/bin/ssh", "/usr/bin/pdsh") if not Path(name).exists()]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    lines = [f"HostKey {tmp_path}/host_key", f"AuthorizedKeysFile {tmp_path}/key.pub", "StrictModes no", "UsePAM no"]
    (tmp_path / "sshd_config").write_text("\n".join([*lines, "PidFile none", ""]))
    Path("/run/sshd").mkdir(exist_ok=True)
    for host in hosts:
        host.start(["/usr/sbin/sshd", "-D", "-e", "-f", tmp_path / "sshd_config"], tmp_path / f"sshd-{host.name}")
    options = f"-i {tmp_path}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh {options} "$@"\n')
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / ".deepspeed_env").write_text(f"DSFT_CACHE={tmp_path}/cache\n")
    return {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{BIN}:{os.environ['PATH']}"}


def test_the_deepspeed_launcher_starts_hosts_over_ssh_and_one_by_one(hosts, ssh, words, expected, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    start = ["deepspeed", "--hostfile", tmp_path / "hostfile", "--master_addr", hosts[0].address]
    typed = ["dsft/train.py", "--backend", "zero3", *words, "--output_dir", out, "--stop_after_steps"]
    launcher = hosts[0].start([*start, *typed, 6], tmp_path / "log", env=ssh)
    wait_for(lambda: launcher.poll() is not None, tmp_path, hosts)
    assert launcher.poll() == 0, read(tmp_path)
    assert (tmp_path / "cache").is_dir()
    check(out, expected[:6], read(tmp_path))
    launchers = [
        host.start([*start, "--no_ssh", "--node_rank", index, *typed, 12], tmp_path / f"log{index}")
        for index, host in enumerate(hosts)
    ]
    wait_for(lambda: all(process.poll() is not None for process in launchers), tmp_path, hosts)
    assert [process.returncode for process in launchers] == [0, 0], read(tmp_path)
    assert "resuming at step 7" in read(tmp_path)
    check(out, expected[:12], read(tmp_path))
