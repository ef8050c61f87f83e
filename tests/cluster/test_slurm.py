"""scripts/slurm_train.sbatch under a real Slurm: two nodes on this machine, which the test starts and ends."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import BIN, ROOT, SAMPLE_TRAIN, flags, metrics

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
PATH = f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin"
CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=main Nodes=n0,n1 Default=YES State=UP
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def slurm(tmp_path) -> Iterator[Callable[..., str]]:
    """Runs a command of Slurm and returns what it prints."""
    if os.geteuid():
        pytest.skip("a Slurm of two nodes on one machine needs root")
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path / "slurm"
    for name in ("munge", "state"):
        (folder / name).mkdir(parents=True)
    key, ports = folder / "munge" / "key", []
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    for listener in listeners:
        ports.append(listener.getsockname()[1])
        listener.close()
    (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports))
    munge = {name: folder / "munge" / name for name in ("key-file", "socket", "pid-file", "seed-file", "log-file")}
    munge["key-file"] = key
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH, "PYTHONPATH": str(ROOT)}
    env["OMP_NUM_THREADS"] = "1"
    started = []

    def start(*words: object) -> None:
        with (folder / "log").open("ab") as log:
            started.append(subprocess.Popen([str(word) for word in words], env=env, stdout=log, stderr=log))

    def call(*words: object) -> str:
        typed = [str(word) for word in words]
        done = subprocess.run(typed, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{(folder / 'log').read_text()}"
        return done.stdout.strip()

    try:
        start("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        wait_for((folder / "munge" / "socket").exists, folder / "log")
        start("slurmctld", "-D")
        for node in ("n0", "n1"):
            start("slurmd", "-D", "-N", node)
        wait_for(lambda: call("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", folder / "log")
        yield call
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, check=False)
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, log.read_text() if log.exists() else "nothing was printed"
        time.sleep(0.2)


def test_a_job_is_requeued_before_its_limit_and_ends_at_once_when_complete(slurm, commands, tiny_model, tmp_path):
    words = flags(
        model=tiny_model, train_files=SAMPLE_TRAIN, dtype="float32", lora_rank=4, lr=1e-3, train_batch_size=91,
        total_training_steps=24, save_steps=0, eval_steps=0,
    )  # fmt: skip
    one, out, log = tmp_path / "one", tmp_path / "out", tmp_path / "job.log"
    done = commands.run("dsft.train", [*words, "--output_dir", one], timeout=400)
    assert done.status == 0, done.err

    def submit() -> str:
        size = ["--ntasks-per-node=1", "--gpus-per-node=0", "--time=10", f"--output={log}"]
        script = [ROOT / "scripts" / "slurm_train.sbatch", "--backend", "zero3", *words, "--output_dir", out]
        return slurm("sbatch", "--parsable", *size, *script)

    job = submit()
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 1, log)
    slurm("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends
    wait_for(lambda: "stopped by SIGUSR1 after step" in log.read_text(), log)
    wait_for(lambda: not slurm("squeue", "-h"), log)
    text = log.read_text()
    assert text.count("backend  zero3 on cpu") == 2, text
    assert "resuming at step" in text
    for ours, theirs in zip(metrics(out), metrics(one), strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    before = (out / "metrics.jsonl").read_bytes()
    submit()
    wait_for(lambda: not slurm("squeue", "-h"), log)
    assert "already complete" in log.read_text().removeprefix(text)
    assert (out / "metrics.jsonl").read_bytes() == before
