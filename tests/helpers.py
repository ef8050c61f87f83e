"""What several tests need: running a command as a user types it, and reading what a run wrote."""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COMMANDS = ast.literal_eval(re.findall(r"^COMMANDS = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[0])
# The real medical set is no part of the project; tests that read it are skipped where it is not.
MEDICAL = Path(os.environ.get("DSFT_MEDICAL_DATA", ROOT / "data" / "MTMedDialog_sft_val.parquet"))
PRODUCED: set[str] = set()
"""The errors of dsft that the running test has seen, in this process or on a command's standard error."""
SAMPLE_TRAIN, SAMPLE_VAL = ROOT / "data" / "sample_train.parquet", ROOT / "data" / "sample_val.parquet"


@dataclass
class Done:
    """A finished command."""

    status: int
    out: str
    err: str
    seconds: float

    def __post_init__(self) -> None:
        PRODUCED.update(line.removeprefix("error: ") for line in self.errors)

    @property
    def errors(self) -> list[str]:
        """The lines that dsft printed for the user."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def start_words(backend: str, ranks: int, port: int = 29500) -> list[str]:
    """The start of a command line, as the README writes it: no launcher, torchrun, or deepspeed."""
    if ranks == 1:
        return [sys.executable, "-m", "dsft.train", "--backend", backend]
    if backend == "zero3":
        launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(port)]
    else:
        launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, "dsft/train.py", "--backend", backend]


def run(words: Sequence[Any], *, timeout: float = 300, env: dict[str, str] | None = None) -> Done:
    """Run a command at the project's root and wait for it."""
    started = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1"} | (env or {})  # tests run two at a time, on two cores
    done = subprocess.run(
        [str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment
    )
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


def outputs_elsewhere(code: str) -> set[str]:
    """What Python code prints in processes of its own, in which strings hash differently."""
    words = [sys.executable, "-c", code]
    return {
        subprocess.run(words, cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in "12"
    }


def hear_interrupts() -> None:
    """For a child's preexec_fn: a shell that starts the tests in the background lets them ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def flags(**values: Any) -> list[str]:
    """Keyword arguments as --name value."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def metrics(output_dir: Path, key: str = "train/loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a key."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if key in line]


def trl_templates() -> Path:
    """The folder of chat templates that TRL ships. TRL is installed without its dependencies and never imported."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    return Path((spec.submodule_search_locations or [""])[0], "chat_templates")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def seeded_tensor(name: str, shape: Sequence[int]) -> "Any":
    """A small random tensor that depends on the name alone, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator) * 0.05


def token_dataset(
    rows: "Sequence[tuple[Any, Any]]", folder: Path | None = None, levels: Sequence[int] | None = None
) -> "Any":
    """Rows of (token ids, is-target) as the Trainer gets them: read from the files that the token cache would hold."""
    import tempfile

    import numpy as np

    from dsft.dataset.token_files import Counts, Row, save_rows
    from dsft.dataset.tokens import TokenDataset

    made = [
        Row(np.array(ids, np.int32), np.array(mask, bool), level=level, source=(0, row))
        for row, ((ids, mask), level) in enumerate(zip(rows, levels or [0] * len(rows), strict=True))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        save_rows(place, made, Counts())
        return TokenDataset(place)


def save_checkpoint(root: Path, step: int, contents: "dict[str, bytes | str] | None" = None) -> Path:
    """A complete checkpoint of the given files beside a trainer_state.json, written as a run writes it."""
    from dsft.checkpointing.folder import CheckpointFolder
    from dsft.checkpointing.integrity import checksum
    from dsft.checkpointing.state import STATE, TrainerState

    state = TrainerState(step, 10, step / 10, "fsdp", 1, "rows", position=(0, step))
    run = CheckpointFolder(root)
    folder = run.begin(step)
    for name, content in ({"weights": f"weights of {step}", STATE: state.to_json()} | (contents or {})).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return run.commit(step, {path.name: checksum(path) for path in folder.iterdir()})


def sign(checkpoint: Path) -> None:
    """Write COMPLETE anew, for what the files hold now: what only a person or a program can do, and no disk."""
    from dsft.checkpointing.integrity import COMPLETE, checksum, mark_complete

    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != COMPLETE]
    mark_complete(checkpoint, {path.name: checksum(path) for path in files})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def message(work: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one line of the UserError that a call raises."""
    from dsft.errors import UserError

    with pytest.raises(UserError) as caught:
        work(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
