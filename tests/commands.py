"""Many command lines without waiting each time for torch, transformers and deepspeed to be imported.

A process that has imported them forks for every command, which then runs as `python -m MODULE` would, or for each of
its ranks, which then run as under a launcher. Nothing is computed before the fork, so no thread is lost by it.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers import ROOT, Done, flags, write_parquet

SERVER = """
import importlib, json, os, socket, sys, traceback

from dsft.distributed import runtime

sys.path.append("scripts")  # their main functions are commands too
runtime.silence_libraries()
names = ("training.trainer", "backends.fsdp", "backends.zero3", "export.merging", "reporting.report")
for name in (*names, "validation.evaluate", "validation.dialogues"):
    importlib.import_module(f"dsft.{name}")
import matplotlib.backends.backend_svg, peft.tuners.lora, transformers.models.llama.modeling_llama
print("ready", flush=True)


def start(module, words, folder, environment):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, name in ((0, None), (1, "out"), (2, "err")):
            path = os.path.join(folder, name) if name else os.devnull
            os.dup2(os.open(path, (os.O_WRONLY | os.O_APPEND) if name else os.O_RDONLY), number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.orig_argv = [module, *words], ["python", "-m", module, *words]
        importlib.import_module(module).main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    module, words, folder, ranks, nodes, environment = json.loads(line)
    children = []
    if ranks == 1:
        children.append(start(module, words, folder, environment))
    else:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        local = ranks // nodes
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local}
            place = {name: str(number) for name, number in place.items()}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            children.append(start(module, words, folder, environment | place))
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


class Commands:
    """Runs dsft's commands, one at a time."""

    def __init__(self, folder: Path) -> None:
        """`folder` keeps their output."""
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, module: str, words: Sequence[Any], *, ranks: int = 1, nodes: int = 1, timeout: float = 120) -> Done:
        """Run a command such as dsft.train on some ranks and wait for it. Its status is the first that is not 0.

        Ranks of several `nodes` are told so, but run on this machine.
        """
        server = self._server()
        assert server.stdin is not None
        started = time.monotonic()
        for name in ("out", "err"):
            (self._folder / name).write_bytes(b"")
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment["OMP_NUM_THREADS"] = "1"
        request = [module, [str(word) for word in words], str(self._folder), ranks, nodes, environment]
        server.stdin.write(json.dumps(request) + "\n")
        statuses = [int(status) for status in self._answer(server, timeout).split()]
        out, err = ((self._folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return Done(next(filter(None, statuses), 0), out, err, time.monotonic() - started)

    def __call__(self, words: Sequence[Any]) -> Done:
        """Run a command line that begins as `start_words` says, or with python -m; the ranks have no launcher."""
        typed = [str(word) for word in words]
        if typed[1] == "-m":
            return self.run(typed[2], typed[3:])
        script = typed.index("dsft/train.py")
        [ranks] = [typed[i + 1] for i in range(script) if typed[i] in ("--nproc_per_node", "--num_accelerators")]
        return self.run("dsft.train", typed[script + 1 :], ranks=int(ranks))

    def _server(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                bufsize=1,
                start_new_session=True,
            )
            assert self._answer(self._process, 120) == "ready"
        return self._process

    def close(self) -> None:
        """End the process, and what it has started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answer(self, server: "subprocess.Popen[str]", timeout: float) -> str:
        assert server.stdout is not None
        ready, _, _ = select.select([server.stdout], [], [], timeout)
        if not ready:
            self.close()
            raise AssertionError(f"no answer within {timeout} s")
        return server.stdout.readline().strip()


class TrainedRuns:
    """The output folders of small runs, two checkpoints each. They are never changed: `copy` gives one that may be.

    Processes that run tests side by side share them.
    """

    def __init__(self, commands: Commands, model: Path, rows: Path, folder: Path) -> None:
        self._commands, self._folder = commands, folder
        folder.mkdir(exist_ok=True)
        other_rows = [{"prompt": f"p {i}", "response": "r"} for i in range(10)]
        model = self._once("model", lambda made: shutil.copytree(model, made))
        rows = self._once("rows.parquet", lambda made: shutil.copy(rows, made))
        self._usual = {
            "model": model, "train_files": rows, "val_files": rows, "train_batch_size": 4, "lora_rank": 4,
            "total_training_steps": 2, "save_steps": 1, "dtype": "float32", "lr": 1e-3, "on_leak": "ignore",
        }  # fmt: skip
        self._changed: dict[str, dict[str, Any]] = {
            "lora": {},
            "full": {"lora_rank": 0},
            "other seed": {"seed": 2},
            "other shape": {"lora_rank": 8},
            "other rows": {
                "train_files": self._once("other_rows.parquet", lambda made: write_parquet(made, other_rows))
            },
        }

    def flags(self, kind: str) -> dict[str, Any]:
        """Of a run, without its output folder."""
        return self._usual | self._changed[kind]

    def words(self, kind: str, output_dir: Path, **more: Any) -> list[str]:
        """The command line that has made a run, or goes on with it."""
        return flags(**self.flags(kind) | {"output_dir": output_dir} | more)

    def folder(self, kind: str) -> Path:
        """Made when it is first asked for."""

        def train(made: Path) -> None:
            done = self._commands.run("dsft.train", self.words(kind, made))
            assert done.status == 0, done.err

        return self._once(kind.replace(" ", "_"), train)

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        """What one of the processes makes, under this name."""
        made, unfinished = self._folder / name, self._folder / f"{name}.tmp"
        with open(self._folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                make(unfinished)
                unfinished.rename(made)
        return made

    def copy(self, kind: str, target: Path) -> Path:
        """Hard links to the files of a run: replace them, never write into them."""
        return copy_run(self.folder(kind), target)

    def resume(self, kind: str, output_dir: Path, **more: Any) -> Done:
        """Start the command again that has made a run."""
        return self._commands.run("dsft.train", self.words(kind, output_dir, **more))


def copy_run(run: Path, target: Path) -> Path:
    """Hard links to all files but the lock, which processes share by the file and not by its name."""
    shutil.copytree(run, target, symlinks=True, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
    return target
