"""Many command lines without waiting each time for torch and transformers to be imported.

A process that has imported them forks for every command, which then runs as `python -m MODULE` would. Nothing is
computed before the fork, so no thread is lost by it.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers import ROOT, Done, flags, write_parquet

SERVER = """
import importlib, json, os, sys, traceback

from dsft import runtime

runtime.silence_libraries()
names = ("trainer", "backends.fsdp", "model.merging", "validation.judge", "validation.dialogues", "reporting.report")
for name in names:
    importlib.import_module(f"dsft.{name}")
import matplotlib.backends.backend_svg, peft.tuners.lora, transformers.models.llama.modeling_llama
print("ready", flush=True)
for line in sys.stdin:
    module, words, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = [module, *words]
            importlib.import_module(module).main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Runs dsft's commands, one at a time."""

    def __init__(self, folder: Path) -> None:
        """`folder` keeps their output."""
        self._folder = folder
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        assert self._answer(120) == "ready"

    def run(self, module: str, words: Sequence[Any], *, timeout: float = 60) -> Done:
        """Run a command such as dsft.train and wait for it."""
        assert self._process.stdin is not None
        started = time.monotonic()
        self._process.stdin.write(json.dumps([module, [str(word) for word in words], str(self._folder)]) + "\n")
        status = int(self._answer(timeout))
        out, err = ((self._folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return Done(status, out, err, time.monotonic() - started)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self, timeout: float) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self.close()
            raise AssertionError(f"no answer within {timeout} s")
        return self._process.stdout.readline().strip()


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
            "total_training_steps": 2, "save_steps": 1, "dtype": "float32", "lr": 1e-3,
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
