#!/usr/bin/env python
"""Breaks real training runs in many ways, resumes them, and proves that nothing is lost.

    python scripts/fault_drills.py --drills 200 --seed 1 --jobs 2 --output drills.json [--kinds a,b] [--keep]
    python scripts/fault_drills.py --drills 200 --seed 1 --only 17          # one of them again

Every drill breaks a run of a tiny model at some instant, starts the same command again, and compares every line of
metrics.jsonl with that of a run nothing happened to: bit for bit. A run carries several drills one after the other,
because a start costs more than the steps. What each kind does and what is checked: docs/reliability.md.

Status 1 if anything failed; failed drills keep their folder and logs. Where no tmpfs can be mounted (root, or user
namespaces), the drills that need one are reported as skipped.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "scripts" / "fault_worker.py"
BIN = Path(sys.executable).parent
MARK, MOUNTS = "DSFT_DRILL", "DSFT_DRILLS_CAN_MOUNT"

STEPS = 60
END_LIMIT = 60.0
"""Seconds in which every process of a broken run must be gone."""
STOP_STEPS, STOP_SECONDS = 2, 5.0
"""How far a run may go on that was asked to stop: the running step, and one whose sum was on its way already."""
START_LIMIT = 150.0
DRILLS_A_LIFE = 5
RESTARTS = 2
"""torchrun's --max_restarts in elastic drills, so also how many of them a life can have."""
REDRAWS = 5
DAMAGES = ("bit flip", "truncated", "deleted", "swapped", "emptied", "another run's")
STEP_KEYS = ("step", "epoch", "train/loss", "train/grad_norm", "train/lr", "train/targets", "train/tokens")
VALIDATION_KEYS = ("step", "epoch", "val/loss")
CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")


# What is drilled


@dataclass(frozen=True)
class Kind:
    """A way to break a run."""

    launched: bool = False
    """Needs several ranks and a launcher."""
    launchers: tuple[str, ...] = ("none", "torchrun", "deepspeed")
    needs_mount: bool = False
    ends_cleanly: bool = False
    """The run saves where it stands: nothing is repeated."""
    error_lines: int | None = None
    """How many lines "error: …" a launched run owes its user; None: any number, nobody is left to print."""


KINDS = {
    "kill-rank": Kind(launched=True, error_lines=1),
    "kill-all": Kind(),
    "kill-launcher": Kind(launched=True, ends_cleanly=True),
    "kill-in-save": Kind(error_lines=1),
    "kill-before-marker": Kind(error_lines=1),
    "term": Kind(ends_cleanly=True, error_lines=0),
    "int": Kind(ends_cleanly=True, error_lines=0),
    "usr1": Kind(ends_cleanly=True, error_lines=0),
    "disk-full": Kind(needs_mount=True, error_lines=1),
    "corrupt": Kind(),
    "read-only": Kind(needs_mount=True, error_lines=1),
    "stop-rank": Kind(launched=True, error_lines=1),
    "elastic": Kind(launched=True, launchers=("torchrun",)),
}
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1}


@dataclass(frozen=True)
class Mix:
    """What is trained, and how it is started."""

    backend: str
    launcher: str
    method: str
    saving: str

    @property
    def ranks(self) -> int:
        """Without a launcher there is one."""
        return 1 if self.launcher == "none" else 2

    @property
    def save_steps(self) -> int:
        """Both intervals occur, and never more than one in a reference run's sequence."""
        return 2 if self.method == "lora" else 3

    def __str__(self) -> str:
        return f"{self.backend}/{self.launcher}/{self.method}/{self.saving}"


MIXES = [
    Mix(backend, launcher, method, saving)
    for backend in ("fsdp", "zero3")
    for launcher in ("none", "torchrun", "deepspeed")
    for method in ("lora", "full")
    for saving in ("sync", "async")
]
WEIGHTS = {"none": 3.0}  # a start without a launcher costs a third of one with: where both will do, it is drawn more


@dataclass(frozen=True)
class Drill:
    """One planned fault. Its instant and target are drawn from (seed, number) alone."""

    number: int
    kind: str
    mix: Mix
    turn: int
    """The how-manieth of its kind: what goes in turn (which damage to which file, which target) follows from it."""
    first: int
    """The fault comes when the run has taken between `first` …"""
    last: int
    """… and `last` steps."""


def mixes_of(kind: str, pattern: str = "") -> list[Mix]:
    """Where a kind can be drilled, as far as `pattern` allows."""
    rules = KINDS[kind]
    fitting = [mix for mix in MIXES if mix.launcher in rules.launchers and not (rules.launched and mix.ranks == 1)]
    return [mix for mix in fitting if re.search(pattern, str(mix))]


def plan(count: int, seed: int, kinds: Sequence[str] = tuple(KINDS), pattern: str = "") -> list[list[Drill]]:
    """`count` drills of mixes that `pattern` finds, as the lives of runs, each a list in the order of its steps.

    Kinds have equal shares. Each drill gets the mix that its kind has had least of, value by value and pair by pair,
    so that any number of drills covers all of them evenly; then the drills are shuffled.
    """
    random = Random(seed)
    order = random.sample(list(kinds), len(kinds))
    used: Counter[Any] = Counter()
    drawn = []
    for index in range(count):
        kind = order[index % len(order)]

        def crowding(mix: Mix, kind: str = kind) -> tuple[float, float]:
            values = asdict(mix).items()
            singles = sum(used[kind, value] / WEIGHTS.get(value, 1) for _, value in values)
            return singles + used[kind, mix] + used[mix] / WEIGHTS.get(mix.launcher, 1) / 4, random.random()

        mix = min(mixes_of(kind, pattern), key=crowding)
        used.update([mix, (kind, mix), *((kind, value) for value in asdict(mix).values())])
        drawn.append((kind, mix, index // len(order)))
    random.shuffle(drawn)
    groups: dict[tuple[Mix, bool], list[tuple[int, str, int]]] = {}
    for number, (kind, mix, turn) in enumerate(drawn):
        groups.setdefault((mix, kind == "elastic"), []).append((number, kind, turn))
    lives = []
    for (mix, elastic), members in groups.items():
        size = RESTARTS if elastic else DRILLS_A_LIFE
        parts = -(-len(members) // size)
        for part in range(parts):
            chosen = members[part::parts]
            edges = [4 + (STEPS - 8) * i // len(chosen) for i in range(len(chosen) + 1)]
            lives.append(
                [
                    Drill(number, kind, mix, turn, edges[i], edges[i + 1] - 2)
                    for i, (number, kind, turn) in enumerate(chosen)
                ]
            )
    return sorted(lives, key=lambda life: life[0].number)


# What a run has left on the disk, read without dsft


def sequence(metrics: Path) -> list[tuple[Any, ...]]:
    """Everything that must be equal, line by line in the file's order. A last line without its end is not there yet."""
    try:
        text = metrics.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        values = json.loads(line)
        keys = STEP_KEYS if "train/loss" in values else VALIDATION_KEYS
        lines.append(tuple(values[key] for key in keys))
    return lines


def difference(ours: list[tuple[Any, ...]], reference: list[tuple[Any, ...]], *, whole: bool) -> str | None:
    """What is wrong with a sequence: it must be the beginning of the reference's, or all of it."""
    for index, line in enumerate(ours):
        if index == len(reference):
            return f"line {index + 1} of metrics.jsonl is one too many: {line}"
        if line != reference[index]:
            return f"line {index + 1} of metrics.jsonl is {line}, of the undisturbed run {reference[index]}"
    if whole and len(ours) < len(reference):
        return f"metrics.jsonl ends after {len(ours)} of {len(reference)} lines; {reference[len(ours)]} is missing"
    return None


def soundness(checkpoint: Path) -> str:
    """sound, damaged, unmarked (no COMPLETE), or unverified (COMPLETE vouches for no tensors, yet no file is wrong)."""
    marker = checkpoint / "COMPLETE"
    if not marker.is_file():
        return "unmarked"
    listed = set()
    for line in marker.read_bytes().splitlines():
        match = re.fullmatch(rb"([0-9a-f]{64}) [ *]([^/\0]+)", line)
        if not match:
            return "damaged"
        path = checkpoint / os.fsdecode(match[2])
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != match[1].decode():
            return "damaged"
        listed.add(path.name)
    return "sound" if listed >= {path.name for path in checkpoint.iterdir()} - {marker.name} else "unverified"


def checkpoints(out: Path) -> dict[int, Path]:
    """Step -> folder, newest first, whatever state they are in."""
    found = {int(m[1]): path for path in out.iterdir() if (m := CHECKPOINT.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def allowed_starts(out: Path) -> list[int]:
    """The steps from which a run may go on: of the newest sound checkpoint, 0 if there is none.

    A newer one whose marker was damaged so that it vouches for less than all may be used or not: its files are whole.
    """
    starts = []
    for step, folder in checkpoints(out).items():
        state = soundness(folder)
        if state == "unverified":
            starts.append(step)
        if state == "sound":
            return [*starts, step]
    return starts or [0]


def temporary(out: Path) -> dict[str, tuple[int, int]]:
    """Files and folders that a next start must remove, with what tells one from a later one of its name."""
    # os.walk, not rglob, which fails where a folder is renamed meanwhile
    found = [
        Path(place, name) for place, inner, files in os.walk(out) for name in inner + files if name.endswith(".tmp")
    ]
    found += [path for path in checkpoints(out).values() if not (path / "COMPLETE").is_file()]
    marks = {}
    for path in found:
        with suppress(FileNotFoundError):  # a run is at work here
            stat = path.lstat()
            marks[str(path.relative_to(out))] = (stat.st_ino, stat.st_ctime_ns)
    return marks


# Processes


class RunEndedError(Exception):
    """A run has ended before the fault that was meant for it."""


@dataclass
class Run:
    """One start of the command: its processes, found by a variable in their environment, and its logs."""

    words: list[str]
    out: Path
    log: Path
    fault: dict[str, Any] | None = None
    popen: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", MARK)}
        self.mark = f"{os.getpid()}-{self.log}"
        environment = kept | {"OMP_NUM_THREADS": "1", MARK: self.mark, "DSFT_CACHE": str(cache_folder())}
        if self.fault is not None:
            environment["DSFT_FAULT"] = json.dumps(self.fault)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.log}.out", "wb") as stdout, open(f"{self.log}.err", "wb") as stderr:
            self.popen = subprocess.Popen(
                self.words, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
            )
        self.process = psutil.Process(self.popen.pid)

    def said(self, since: int = 0) -> str:
        """Standard output from a place on."""
        return read(Path(f"{self.log}.out"), since)

    def complained(self, since: int = 0) -> str:
        """Standard error from a place on."""
        return read(Path(f"{self.log}.err"), since)

    def size(self) -> tuple[int, int]:
        """The places where the two logs end now."""
        return Path(f"{self.log}.out").stat().st_size, Path(f"{self.log}.err").stat().st_size

    def members(self) -> list[psutil.Process]:
        """Every living process of this run, orphans too."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error, OSError):
            return process.environ().get(MARK) == self.mark and is_alive(process)
        return False

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank; not those that they have started."""
        found = {}
        for process in self.members():
            with suppress(psutil.Error):
                rank = process.environ().get("RANK", "0" if process.pid == self.process.pid else None)
                if rank is None or WORKER.name not in " ".join(process.cmdline()):
                    continue
                parent = process.parent()
                if process.pid == self.process.pid or parent is None or "RANK" not in parent.environ():
                    found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def wait(
        self, limit: float, members: Sequence[psutil.Process] = (), meanwhile: Callable[[], None] | None = None
    ) -> bool:
        """Wait until no process of the run lives, `members` first; False if some still do after `limit` seconds."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if meanwhile is not None:
                meanwhile()
            if self.popen.poll() is not None and not any(map(is_alive, members)) and not self.members():
                return True
            time.sleep(0.005)
        return False

    def end(self) -> None:
        """Kill what is left."""
        while left := self.members():
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.005)
        self.popen.wait()


def is_alive(process: psutil.Process) -> bool:
    """Neither gone nor a zombie: an orphan's may stay for ever where nobody collects them."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read(path: Path, since: int = 0) -> str:
    """A log from a place on."""
    with open(path, "rb") as handle:
        handle.seek(since)
        return handle.read().decode(errors="replace")


def last_step(metrics: Path) -> int:
    """The step of the last whole line, 0 before the first; reads only the end of the file."""
    with suppress(FileNotFoundError), open(metrics, "rb") as handle:
        handle.seek(max(0, os.fstat(handle.fileno()).st_size - 4096))
        steps = re.findall(rb'^\{"step": (\d+),.*\}$', handle.read(), re.M)
        return int(steps[-1]) if steps else 0
    return 0


# A run nothing happens to


@cache
def work_folder() -> Path:
    """Where everything is written; the options may name it."""
    return Path(tempfile.mkdtemp(prefix="dsft-drills-"))


def cache_folder() -> Path:
    """The cache of tokens, shared by all runs."""
    return work_folder() / "cache"


def make_inputs(folder: Path) -> None:
    """A two-layer Llama with a tokenizer of single bytes, and rows: a step takes milliseconds, a checkpoint 100 KB."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dsft.distributed.runtime import silence_libraries

    silence_libraries()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    names = {"eos_token": special[0], "pad_token": special[0], "additional_special_tokens": special[1:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    rows = [
        {"prompt": " ".join(words[i % 7 :]) + f" {i}", "response": " ".join(words[i * i % 10 :][:3])} for i in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def command(mix: Mix, out: Path, *, elastic: bool = False, **flags: Any) -> list[str]:
    """The command line of a run, which is also the one that resumes it."""
    if mix.launcher == "none":
        start = [sys.executable]
    elif mix.launcher == "torchrun":
        start = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(mix.ranks)]
        start += ["--max_restarts", str(RESTARTS)] if elastic else []
    else:
        start = [str(BIN / "deepspeed"), "--num_accelerators", str(mix.ranks), "--master_port", str(free_port())]
    model = work_folder() / "model"
    all_flags = {
        "backend": mix.backend, "model": model, "train_files": model / "rows.parquet",
        "val_files": model / "rows.parquet", "max_val_rows": 4, "dtype": "float32", "lr": 1e-3, "train_batch_size": 8,
        "max_tokens_per_micro_batch": 2048, "total_training_steps": STEPS, "save_steps": mix.save_steps,
        "eval_steps": 5, "lora_rank": 4 if mix.method == "lora" else 0,
        "lora_dropout": 0.1 if mix.method == "lora" else 0.0, "output_dir": out,
    } | flags  # fmt: skip
    words = [*start, str(WORKER), *(word for name, value in all_flags.items() for word in (f"--{name}", str(value)))]
    return [*words, "--async_save"] if mix.saving == "async" else words


def free_port() -> int:
    """For the deepspeed launcher, of which two may be at work."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Reference:
    """What a run that nothing happens to writes, and when."""

    out: Path
    lines: list[tuple[Any, ...]]
    times: list[tuple[float, int]]
    """(seconds, step) of each new line of metrics.jsonl."""
    save_operations: dict[int, int]
    """How many file operations one save takes, by rank; those that write none are left out."""
    checkpoint_bytes: int

    def draw_instant(self, random: Random, first: int, last: int) -> tuple[int, float]:
        """An instant, uniform in time over the steps from `first` to `last`: a step, and seconds after its line."""
        begin, end = (next(when for when, step in self.times if step >= edge) for edge in (first, last))
        instant = random.uniform(begin, end)
        line, step = [(when, step) for when, step in self.times if when <= instant][-1]
        return step, instant - line


class References:
    """The undisturbed runs, each made when it is first needed. The numbers depend on backend, ranks and method only."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Reference] = {}
        self._locks: dict[tuple[Any, ...], threading.Lock] = {}
        self._lock = threading.Lock()

    def of(self, mix: Mix) -> Reference:
        """The undisturbed run of a mix."""
        key = (mix.backend, mix.ranks, mix.method)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._made:
                launcher = "none" if mix.ranks == 1 else "torchrun"
                self._made[key] = self._make(Mix(mix.backend, launcher, mix.method, "sync"))
            return self._made[key]

    def _make(self, mix: Mix) -> Reference:
        folder = work_folder() / "reference" / f"{mix.backend}-{mix.ranks}-{mix.method}"
        out, record = folder / "out", folder / "operations"
        folder.mkdir(parents=True)
        run = Run(command(mix, out), out, folder / "run", {"root": str(out), "record": str(record)})
        times: list[tuple[float, int]] = []

        def look() -> None:
            step = last_step(out / "metrics.jsonl")
            if step > (times[-1][1] if times else 0):
                times.append((time.monotonic(), step))

        if not run.wait(START_LIMIT, meanwhile=look) or run.popen.returncode != 0:
            run.end()
            raise RuntimeError(f"the undisturbed run of {mix} failed:\n{run.complained()}")
        step = STEPS // 2 // mix.save_steps * mix.save_steps
        operations = {}
        for rank in range(mix.ranks):
            lines = record.with_name(f"{record.name}-{rank}").read_text(encoding="utf-8").splitlines()
            begins = [
                [i for i, where in enumerate(lines) if f".checkpoint-{s:06d}.tmp" in where][:1]
                for s in (step, step + mix.save_steps)
            ]
            if all(begins):
                operations[rank] = begins[1][0] - begins[0][0]
        newest = checkpoints(out)[STEPS]
        return Reference(
            out,
            sequence(out / "metrics.jsonl"),
            times,
            operations,
            sum(path.stat().st_blocks * 512 for path in newest.iterdir()),
        )


# Mounts


def mount(*words: str | Path) -> None:
    """mount, which says why it could not."""
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True, text=True)


def mount_read_only(path: Path, aside: Path) -> None:
    """Make a folder read-only for whoever opens a file in it from now on.

    A file system with files open for writing cannot be made read-only; another mount of it above it can, where it is
    read-only before anybody sees it. So it is made at `aside`, which is an empty folder afterwards.
    """
    aside.mkdir(exist_ok=True)
    mount("--bind", path, aside)
    mount("-o", "remount,bind,ro", aside)
    mount("--bind", aside, path)
    unmount(aside)


def unmount(path: Path) -> None:
    """umount; lazily, as a process may still be going."""
    subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True, text=True)


def enter_mount_namespace() -> None:
    """Start this script again where its mounts are its own and vanish with it, if the system lets it mount at all."""
    if MOUNTS in os.environ:
        return
    os.environ[MOUNTS] = ""
    if not shutil.which("unshare"):
        return
    for words in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        with tempfile.TemporaryDirectory() as folder:
            probe = [*words, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
            works = subprocess.run(probe, capture_output=True).returncode == 0
        if works:
            os.environ[MOUNTS] = " ".join(words)
            os.execvp(words[0], [*words, sys.executable, *sys.argv])


# One drill


@dataclass
class Result:
    """What came of a drill; a line of the JSON file."""

    drill: Drill
    details: dict[str, Any] = field(default_factory=dict)
    """What was done to whom, and when."""
    checks: dict[str, bool] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    step_at_fault: int | None = None
    may_start_from: list[int] = field(default_factory=list)
    """Steps of the checkpoints from which the next start may go on, as this script finds them."""
    started_from: int | None = None
    seconds_to_end: float | None = None
    seconds: float = 0.0
    redrawn: int = 0
    skipped: str | None = None
    folder: str | None = None
    temporary: dict[str, tuple[int, int]] = field(default_factory=dict)
    marked: list[str] = field(default_factory=list)
    since: tuple[int, int] = (0, 0)
    """Where in the logs of the resumed run its own lines begin."""

    @property
    def repeated(self) -> int | None:
        """Steps that were taken twice."""
        if self.step_at_fault is None or self.started_from is None:
            return None
        return max(0, self.step_at_fault - self.started_from)

    def check(self, name: str, good: bool, why: str) -> None:
        """Note one check. One that fails once stays failed."""
        self.checks[name] = self.checks.get(name, True) and good
        if not good:
            self.failures.append(f"{name}: {why}")

    def as_json(self) -> dict[str, Any]:
        """Everything but what only later checks needed."""
        values = asdict(self)
        drill = values.pop("drill")
        del values["temporary"], values["marked"], values["since"]
        return drill | {"ranks": self.drill.mix.ranks, "repeated": self.repeated} | values


class Life:
    """A run that is broken and resumed several times; in one folder after the other, where something went wrong."""

    def __init__(self, drills: list[Drill], options: argparse.Namespace, references: References) -> None:
        can_mount = bool(os.environ.get(MOUNTS))
        self.seed, self.keep, self.references = options.seed, options.keep, references
        self.mix = drills[0].mix
        self.skipped = [drill for drill in drills if KINDS[drill.kind].needs_mount and not can_mount]
        self.left = [drill for drill in drills if drill not in self.skipped]
        self.is_elastic = drills[0].kind == "elastic"
        self.on_tmpfs = any(KINDS[drill.kind].needs_mount for drill in self.left)
        self.rotates = self.on_tmpfs or bool(drills[0].number % 2)
        self.redrawn: Counter[int] = Counter()
        self.folders = 0

    def run(self, report: Callable[[Result], None]) -> None:
        """Carry out every drill, and report each when it has been judged."""
        for drill in self.skipped:
            report(Result(drill, skipped="no tmpfs can be mounted here: that needs root, or user namespaces"))
        while self.left:
            self.reference = self.references.of(self.mix)
            self.folder = work_folder() / f"life-{self.left[0].number:04d}-{self.folders}"
            self.folders += 1
            self.out, self.starts = self.folder / "out", 0
            self.out.mkdir(parents=True)
            if self.on_tmpfs:
                size = 16 * self.reference.checkpoint_bytes + 2**20
                mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.out)
            self.current: Run | None = None
            self.judged: list[Result] = []
            self.pending: Result | None = None
            try:
                self._one_folder()
            except Exception:  # of this script, or a run that hangs: the other drills go on
                broken = [Result(self.left.pop(0), folder=str(self.folder))] if self.left else []
                for result in [*([self.pending] if self.pending else []), *broken]:
                    result.check("carried out", False, traceback.format_exc())
                    self.judged.append(result)
            finally:
                if self.current is not None:
                    self.current.end()
                self._leave_folder()
            for result in self.judged:
                report(result)

    def _leave_folder(self) -> None:
        """Keep it where a drill in it has failed."""
        failed = any(result.failures for result in self.judged)
        if self.on_tmpfs:
            if failed or self.keep:
                shutil.copytree(self.out, self.folder / "out-copied-from-tmpfs", symlinks=True)
            unmount(self.out)
        if not (failed or self.keep):
            shutil.rmtree(self.folder)
            for result in self.judged:
                result.folder = None

    def _one_folder(self) -> None:
        """Fault, resume, comparison, next fault, …, until the run has ended or a drill has failed for good."""
        while self.left:
            drill, pending = self.left[0], self.pending
            result = Result(drill, redrawn=self.redrawn[drill.number], folder=str(self.folder))
            self.random = Random(f"{self.seed}/{drill.number}/{result.redrawn}")
            after = max(pending.may_start_from) if pending else 0
            if self.current is None:
                self.current = self._start(self._trap(result, after) if drill.kind in TRAPS else None)
            run, began = self.current, time.monotonic()
            try:
                self._break(result, run, pending.since if pending else (0, 0), after)
            except RunEndedError:
                self._ended_early(result, run)
                return
            if pending is not None:
                self._judge_resumed(pending, run)
                self._close(pending)
                if pending.failures:
                    return  # what comes after would only repeat them; this drill has a folder of its own
            self.pending = result
            self.left.pop(0)
            if not self.is_elastic:
                self._judge_end(result, run)
                self.current = None
                self._repair(result)
            self._take_stock(result, after)
            result.seconds = time.monotonic() - began
        run = self.current = self.current or self._start(None)
        self._judge_finished(run, run.wait(START_LIMIT))

    def _close(self, result: Result) -> None:
        self.judged.append(result)
        self.pending = None

    def _ended_early(self, result: Result, run: Run) -> None:
        """The run came to its end before the fault: all that was drilled so far is judged, and this fault drawn again.

        Or it broke by itself, which is what the drill before has to answer for.
        """
        ended, number = run.wait(END_LIMIT), result.drill.number
        if self.pending is not None:
            self._judge_finished(run, ended)
        elif run.popen.returncode != 0:
            result.check("start", False, f"status {run.popen.returncode}: {run.complained()[-500:]}")
        self.redrawn[number] += 1
        if self.redrawn[number] > REDRAWS:
            result.check("drawn", False, f"the run has ended before the fault {REDRAWS + 1} times")
        if result.failures:
            self.left.pop(0)
            self._close(result)

    def _start(self, trap: dict[str, Any] | None, **flags: Any) -> Run:
        """The same command, once more."""
        words = command(
            self.mix, self.out, elastic=self.is_elastic, **({"max_checkpoints": 4} if self.rotates else {}), **flags
        )
        self.starts += 1
        return Run(words, self.out, self.folder / "logs" / f"{self.starts:02d}", trap)

    # Breaking

    def _trap(self, result: Result, after: int) -> dict[str, Any]:
        """What fault_worker.py is told: a save within the drill's steps, and an operation of it."""
        drill, every = result.drill, self.mix.save_steps
        first = max(after + 1, self.random.randint(drill.first, drill.last))
        trap: dict[str, Any] = {
            "root": str(self.out), "rank": 0, "save": min(-(-first // every) * every, STEPS), "pattern": "", "nth": 1,
            "delay": 0.0, "marker": str(self.folder / f"sprung-{drill.number}-{result.redrawn}"),
        }  # fmt: skip
        if drill.kind == "kill-before-marker":
            # The marker's temporary file is about to be opened, or to be renamed.
            trap |= {"pattern": r"^(open|os\.rename) checkpoint-\d+/\.COMPLETE\.tmp", "nth": self.random.choice([1, 2])}
        else:
            trap["rank"] = self.random.choice(sorted(self.reference.save_operations))
            trap["nth"] = self.random.randint(1, self.reference.save_operations[trap["rank"]])
            trap["delay"] = self.random.choice([0.0, 10 ** self.random.uniform(-4.3, -2.5)])
        result.details["trap"] = {name: trap[name] for name in ("rank", "save", "pattern", "nth", "delay")}
        return trap

    def _await_sprung(self, run: Run, result: Result) -> None:
        marker = self.folder / f"sprung-{result.drill.number}-{result.redrawn}"
        deadline = time.monotonic() + START_LIMIT
        while not (marker.is_file() and marker.stat().st_size):
            if run.popen.poll() is not None and not marker.exists():
                raise RunEndedError
            if time.monotonic() > deadline:
                raise TimeoutError("the trap has not sprung")
            time.sleep(0.005)
        sprung = json.loads(marker.read_text(encoding="utf-8"))
        result.details |= {"where": sprung["where"]}
        self.fault_time = sprung["time"]

    def _await_instant(self, run: Run, result: Result, since: tuple[int, int], after: int) -> list[psutil.Process]:
        """Wait for the drawn instant; the run's processes, ranks first, as they were shortly before."""
        drill, deadline = result.drill, time.monotonic() + START_LIMIT
        step, delay = self.reference.draw_instant(self.random, drill.first, drill.last)
        step = max(step, after + 1)
        if drill.kind == "corrupt":  # one checkpoint to damage, and one to go back to
            step = min(max(step, after + 4 * self.mix.save_steps), STEPS - 2)

        def wait_until(is_there: Callable[[], bool], pause: float) -> None:
            while not is_there():
                if run.popen.poll() is not None:
                    raise RunEndedError
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no step {step} within {START_LIMIT:.0f} s")
                time.sleep(pause)

        # Before this line metrics.jsonl still holds the steps that are about to be taken back.
        wait_until(lambda: re.search("^output ", run.said(since[0]), re.M) is not None, 0.02)
        ranks = run.ranks()
        others = [process for process in run.members() if process not in ranks]
        wait_until(lambda: last_step(self.out / "metrics.jsonl") >= step, 0.001)
        time.sleep(delay)
        if run.popen.poll() is not None or len(ranks) < self.mix.ranks:
            raise RunEndedError
        result.details["instant"] = f"{delay * 1000:.1f} ms after step {step}"
        return [*ranks, *others]

    def _break(self, result: Result, run: Run, since: tuple[int, int], after: int) -> None:
        """Wait for the instant and do it.

        Raises:
            RunEndedError: the run was faster.
        """
        kind, turn, self.meanwhile = result.drill.kind, result.drill.turn, lambda: None
        if kind in TRAPS:
            self.members = []
            self._await_sprung(run, result)
            return
        self.members = self._await_instant(run, result, since, after)
        ranks, rank = self.members[: self.mix.ranks], self.random.randrange(self.mix.ranks)
        self.fault_step, self.fault_clock = last_step(self.out / "metrics.jsonl"), time.time()
        self.fault_time = time.monotonic()
        if kind in ("kill-all", "corrupt"):
            for process in self.members:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            run.end()
        elif kind in ("kill-rank", "elastic", "stop-rank"):
            ranks[rank].send_signal(signal.SIGSTOP if kind == "stop-rank" else signal.SIGKILL)
            result.details["target"] = f"rank {rank}"
            if kind == "elastic":
                self._await_restart(result, run, ranks)
        elif kind == "kill-launcher":
            target = self._targets(run, ranks, with_ranks=False)
            self._signal(target[turn % len(target)], signal.SIGKILL, result)
        elif kind in SIGNALS:
            target = self._targets(run, ranks, with_ranks=True)
            self._signal(target[turn % len(target)], SIGNALS[kind], result)
        elif kind == "disk-full":
            ballast = open(self.out / "ballast", "wb", buffering=0)  # noqa: SIM115 (closed by _repair)
            self.ballast = ballast
            self.meanwhile = lambda: fill(ballast)  # a checkpoint that is rotated away must not make room again
            fill(ballast)
        elif kind == "read-only":
            mount_read_only(self.out, self.folder / "read-only")

    def _targets(
        self, run: Run, ranks: list[psutil.Process], *, with_ranks: bool
    ) -> list[tuple[str, psutil.Process | int]]:
        """Whom a signal can go to: what the user has started, the ranks' parent where that is another, a rank."""
        if self.mix.launcher == "none":
            return [("the process", run.process)]
        targets: list[tuple[str, psutil.Process | int]] = [("the launcher", run.process)]
        parent = ranks[0].parent()
        if parent is not None and parent.pid != run.process.pid:
            targets.append(("the ranks' parent", parent))
        if with_ranks:
            targets += [(f"rank {rank}", process) for rank, process in enumerate(ranks)]
            targets.append(("the launcher's process group", -run.process.pid))  # as Ctrl-C in a terminal does
        return targets

    def _signal(self, target: tuple[str, psutil.Process | int], number: int, result: Result) -> None:
        result.details["target"], process = target
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if isinstance(process, int):
                os.killpg(-process, number)
            else:
                process.send_signal(number)

    def _await_restart(self, result: Result, run: Run, ranks: list[psutil.Process]) -> None:
        """The launcher ends the other rank and starts both again. What they can go on from is known in between."""
        result.since = run.size()
        deadline = time.monotonic() + END_LIMIT
        while any(map(is_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.01)
        result.seconds_to_end = time.monotonic() - self.fault_time
        result.check("all ended", not any(map(is_alive, ranks)), f"the old ranks still lived after {END_LIMIT:.0f} s")

    # Judging

    def _judge_end(self, result: Result, run: Run) -> None:
        """How the broken run has ended: all of it, in time, and with the words that are due."""
        drill, kind = result.drill, KINDS[result.drill.kind]
        ended = run.wait(END_LIMIT, self.members, self.meanwhile)
        result.seconds_to_end = time.monotonic() - self.fault_time
        living = [f"{process.pid} {' '.join(process.cmdline())[-60:]}" for process in run.members()]
        run.end()
        result.check("all ended", ended, f"after {END_LIMIT:.0f} s there still lived {living}")
        status = run.popen.returncode
        result.details["status"] = status
        to_launcher = "launcher" in result.details.get("target", "") or "parent" in result.details.get("target", "")
        if kind.ends_cleanly:
            result.check("stops", *self._has_stopped(run, is_rank=not to_launcher))
        if kind.ends_cleanly and not to_launcher:
            result.check("status", status == 0, f"it was {status} after a stop that was asked for")
        elif not kind.ends_cleanly:
            result.check("status", status != 0, "it was 0, though the run was broken")
        text = run.complained()
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        result.details["errors"] = errors
        alone = drill.mix.launcher == "none" and drill.kind in TRAPS  # the one process that could have spoken is dead
        if kind.error_lines is not None and not alone:
            result.check("error lines", len(errors) == kind.error_lines, f"{len(errors)}, due {kind.error_lines}")
        if kind.needs_mount and errors:
            reason = "the disk is full" if drill.kind == "disk-full" else "ead-only file system"
            good = reason in errors[0] and errors[0].startswith("error: cannot ")
            if "cannot save" in errors[0] and allowed_starts(self.out) != [0]:
                good = good and "is still valid" in errors[0]
            result.check("reason", good, errors[0])
        result.check("no traceback", *own_traceback(text))

    def _has_stopped(self, run: Run, *, is_rank: bool) -> tuple[bool, str]:
        """Whether a stop was heard: at once by a rank; that their launcher has ended, ranks notice after a while."""
        metrics = self.out / "metrics.jsonl"
        more, seconds = last_step(metrics) - self.fault_step, metrics.stat().st_mtime - self.fault_clock
        told = re.search("^stopped by .*", run.said(), re.M)
        went = f"it took {more} more steps in {seconds:.1f} s"
        if (is_rank and more > STOP_STEPS) or seconds > STOP_SECONDS:
            return False, went
        return told is not None or last_step(metrics) == STEPS, f"no line 'stopped by …'; {went}"

    def _repair(self, result: Result) -> None:
        """Put right what a user would put right; or damage what the disk would damage."""
        if result.drill.kind == "disk-full":
            self.ballast.close()
            (self.out / "ballast").unlink()
        if result.drill.kind == "read-only":
            unmount(self.out)
        if result.drill.kind == "corrupt":
            self._damage(result)

    def _damage(self, result: Result) -> None:
        """One file of the newest checkpoint in turn, in one way after the other."""
        turn = result.drill.turn
        whole = [folder for folder in checkpoints(self.out).values() if soundness(folder) in ("sound", "unverified")]
        if len(whole) < 2:
            raise RuntimeError(f"only {len(whole)} checkpoints to damage one of")
        newest, older = whole[:2]
        files = sorted(newest.iterdir())
        file = files[turn % len(files)]
        damage = DAMAGES[(turn + turn // len(files)) % len(DAMAGES)]
        others = checkpoints(self.reference.out).values()
        foreign = next(folder for folder in others if folder.name != newest.name) / file.name
        if damage == "another run's" and (not foreign.is_file() or foreign.read_bytes() == file.read_bytes()):
            damage = "bit flip"  # such as the tokenizer's files, which all runs have in common
        result.details["damage"] = f"{newest.name}/{file.name} {damage}"
        spoil(file, damage, self.random, foreign)
        self.damaged, self.was_marked = newest, (newest / "COMPLETE").is_file()
        if soundness(newest) == "damaged" and self.mix.launcher == "none":
            before = sorted(path.name for path in self.out.iterdir())
            run = self._start(None, resume=newest)
            ended = run.wait(START_LIMIT)
            run.end()
            errors = [line for line in run.complained().splitlines() if line.startswith("error: ")]
            named = len(errors) == 1 and newest.name in errors[0] and older.name in errors[0]
            refused = ended and run.popen.returncode != 0 and named
            result.check("--resume PATH refused", refused, f"status {run.popen.returncode}, {errors}")
            after = sorted(path.name for path in self.out.iterdir())
            result.check("--resume PATH refused", set(before) <= set(after), f"it changed {before} to {after}")

    def _take_stock(self, result: Result, before: int) -> None:
        """What the next start finds, looked at without dsft; `before` is what this one had found."""
        result.step_at_fault = last_step(self.out / "metrics.jsonl")
        result.may_start_from = allowed_starts(self.out)
        result.temporary = temporary(self.out)
        folders = checkpoints(self.out).values()
        result.marked = [folder.name for folder in folders if soundness(folder) in ("sound", "unverified")]
        kind, drill = KINDS[result.drill.kind], result.drill
        lost = result.step_at_fault - max(result.may_start_from)
        if kind.ends_cleanly:
            result.check("saved where it stood", lost == 0, f"{lost} steps after the newest checkpoint")
        elif drill.kind not in ("corrupt", "disk-full", "read-only"):
            most = self.mix.save_steps * (2 if self.mix.saving == "async" else 1)
            result.check("saved in time", lost <= most, f"{lost} steps after the newest checkpoint")
        if drill.kind != "corrupt":
            newest = max(result.may_start_from)
            result.check("no checkpoint lost", newest >= before, f"{before} was whole, the newest now is {newest}")
        if drill.kind == "kill-before-marker":
            unmarked = [folder.name for folder in folders if soundness(folder) == "unmarked"]
            result.check(
                "instant", bool(unmarked), "there is no folder without COMPLETE, so the kill missed its instant"
            )

    def _judge_resumed(self, result: Result, run: Run) -> None:
        """Whether the run that came after a fault goes on where it must, and with the same numbers."""
        text, complaints = run.said(result.since[0]), run.complained(result.since[1])
        if not re.search("^output ", text, re.M):
            result.check("resumed", False, f"status {run.popen.poll()}: {complaints[-1000:]}")
            return
        told = re.search(r"^resumed +(\S+), (?:resuming at step (\d+)|already complete)", text, re.M)
        name = Path(told[1]).name if told else None
        result.started_from = int(name.rsplit("-", 1)[1]) if name else 0
        good = result.started_from in result.may_start_from
        result.check("resumed", True, "")
        result.check("no step lost", good, f"it went on from {result.started_from}, not {result.may_start_from}")
        good = name is None or name in result.marked
        result.check("only marked checkpoints", good, f"it went on from {name}; whole were {result.marked}")
        wrong = difference(sequence(self.out / "metrics.jsonl"), self.reference.lines, whole=False)
        result.check("sequence", wrong is None, str(wrong))
        now = temporary(self.out)
        left = [path for path, mark in result.temporary.items() if now.get(path) == mark]
        result.check("no temporary files", not left, f"the next start left {left}")
        if result.drill.kind == "corrupt" and (self.damaged.name not in result.marked):
            aside = self.damaged.with_name(self.damaged.name + ".damaged")
            if self.was_marked:
                warned = re.search(rf"^warning: .*{self.damaged.name}\b", complaints + text, re.M) is not None
                result.check("warned", warned, "no line warns of the damaged checkpoint")
                result.check("put aside", aside.is_dir(), f"there is no {aside.name}")

    def _judge_finished(self, run: Run, ended: bool) -> None:
        """Whether a run that was broken and resumed ends with all that an unbroken one has."""
        assert self.pending is not None
        result = self.pending
        run.end()
        self._judge_resumed(result, run)
        result.check("resumed", ended and run.popen.returncode == 0, f"status {run.popen.returncode} at its end")
        wrong = difference(sequence(self.out / "metrics.jsonl"), self.reference.lines, whole=True)
        result.check("sequence", wrong is None, str(wrong))
        result.check("no temporary files", not temporary(self.out), f"at the end there are {list(temporary(self.out))}")
        result.check("no traceback", *own_traceback(run.complained()))
        last, theirs = self.out / f"checkpoint-{STEPS:06d}", self.reference.out / f"checkpoint-{STEPS:06d}"
        result.check("latest", (self.out / "latest").resolve() == last.resolve(), "the link is wrong")
        for file in sorted(theirs.glob("*.safetensors")):
            ours = last / file.name
            same = ours.is_file() and ours.read_bytes() == file.read_bytes()
            result.check("weights", same, f"{file.name} differs from that of the undisturbed run")
        best = self.reference.out / "best"
        if not any(other.drill.kind == "corrupt" for other in [*self.judged, result]):  # it may have hit the best one
            here = (self.out / "best").resolve().name
            result.check("best", here == best.resolve().name, f"the link shows to {here}, not {best.resolve().name}")
        self._close(result)


TRAPS = ("kill-in-save", "kill-before-marker")


def fill(ballast: Any) -> None:
    """Write until there is no room left."""
    for size in (2**16, 2**12, 1):
        with suppress(OSError):
            while ballast.write(bytes(size)):
                pass


def spoil(file: Path, damage: str, random: Random, foreign: Path) -> None:
    """Damage a file in one of the ways of DAMAGES."""
    content = file.read_bytes()
    if damage == "deleted" or (damage != "another run's" and not content):
        file.unlink()
    elif damage == "bit flip":
        place = random.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :])
    elif damage == "truncated":
        file.write_bytes(content[: random.randrange(len(content))])
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "swapped":
        other = random.choice([path for path in sorted(file.parent.iterdir()) if path != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        file.write_bytes(foreign.read_bytes())


def own_traceback(text: str) -> tuple[bool, str]:
    """Whether standard error is free of tracebacks and crashes of dsft's own; launchers print some of theirs."""
    for block in re.split("^(?=.*Traceback \\(most recent call last\\))", text, flags=re.M)[1:]:
        if re.search(rf'File "{re.escape(str(ROOT))}/(dsft|scripts)/', block.split("\n\n")[0]):
            return False, block[:2000]
    crash = re.search("terminate called|Segmentation fault|Fatal Python error|core dumped", text)
    return crash is None, crash[0] if crash else ""


# The report


def table(results: Sequence[Result]) -> str:
    """A row for each kind."""
    head = ["kind", "drills", "resumed", "equal", "most repeated", "longest end s", "redrawn", "skipped", "failed"]
    rows = [head]
    for kind in [*KINDS, "all"]:
        of_kind = [result for result in results if kind in (result.drill.kind, "all")]
        done = [result for result in of_kind if result.skipped is None]
        if not of_kind:
            continue
        ends = [result.seconds_to_end for result in done if result.seconds_to_end is not None]
        rows.append(
            [
                kind,
                str(len(done)),
                str(sum(result.checks.get("resumed", False) for result in done)),
                str(sum(result.checks.get("sequence", False) for result in done)),
                str(max((result.repeated or 0 for result in done), default="")),
                f"{max(ends):.1f}" if ends else "",
                str(sum(result.redrawn for result in done)),
                str(len(of_kind) - len(done)),
                str(sum(bool(result.failures) for result in done)),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def line_of(result: Result) -> str:
    """What is printed of a drill when it is done."""
    drill = result.drill
    if result.skipped:
        outcome = f"skipped: {result.skipped}"
    elif result.failures:
        outcome = f"FAILED ({result.folder}): " + "; ".join(failure[-400:] for failure in result.failures)
    else:
        outcome = f"fine, {result.repeated} steps repeated, ended in {result.seconds_to_end:.1f} s"
    done = ", ".join(
        str(result.details[key]) for key in ("target", "instant", "where", "damage") if key in result.details
    )
    return f"drill {drill.number:4d} {drill.kind:18} {drill.mix!s:28} {outcome} [{done}]"


def run_drills(options: argparse.Namespace) -> int:
    """Plan, carry out, report; the number of failures."""
    from tqdm import tqdm

    lives = plan(options.drills, options.seed, options.kinds, options.mixes)
    if options.only is not None:
        lives = [[drill] for life in lives for drill in life if drill.number == options.only]
    count = sum(map(len, lives))
    make_inputs(work_folder() / "model")
    results: list[Result] = []
    lock = threading.Lock()
    started = time.monotonic()
    references = References()
    with tqdm(total=count, unit=" drills", disable=None, dynamic_ncols=True) as bar:

        def report(result: Result) -> None:
            with lock:
                results.append(result)
                tqdm.write(line_of(result), file=sys.stdout)
                sys.stdout.flush()
                bar.update()

        def carry_out(life: list[Drill]) -> None:
            Life(life, options, references).run(report)

        with ThreadPoolExecutor(options.jobs) as pool:
            futures = [pool.submit(carry_out, life) for life in lives]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                end_everything()
                raise
    results.sort(key=lambda result: result.drill.number)
    seconds = time.monotonic() - started
    failed = sum(bool(result.failures) for result in results) + count - len(results)
    print(f"\n{table(results)}\n\n{count} drills, {failed} failed, {seconds / 60:.1f} minutes, seed {options.seed}")
    if options.output:
        again = f"python scripts/fault_drills.py --drills {options.drills} --seed {options.seed}"
        again += f" --kinds {','.join(options.kinds)}" if options.kinds != list(KINDS) else ""
        again += f" --mixes {options.mixes}" if options.mixes else ""
        report_file = {
            "seed": options.seed, "repeat_one": f"{again} --only NUMBER", "seconds": round(seconds, 1),
            "failed": failed, "drills": [result.as_json() for result in results],
        }  # fmt: skip
        Path(options.output).write_text(json.dumps(report_file, indent=1) + "\n", encoding="utf-8")
    if not failed and not options.keep:
        shutil.rmtree(work_folder())
    return failed


def end_everything() -> None:
    """Kill every process that any drill of this script has started."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK, "").startswith(f"{os.getpid()}-"):
                process.kill()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=200, help="how many are planned")
    parser.add_argument("--seed", type=int, default=1, help="of the plan and of every instant and target")
    parser.add_argument("--jobs", type=int, default=2, help="how many runs go on side by side")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated; default: %(default)s")
    parser.add_argument(
        "--mixes", default="", help="a pattern: only mixes that it finds, such as /none/ or zero3/.*/lora"
    )
    parser.add_argument("--only", type=int, metavar="N", help="only drill N of the same plan, in a run of its own")
    parser.add_argument("--output", help="JSON file with every drill")
    parser.add_argument("--keep", action="store_true", help="keep all folders, not only those of failed drills")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown or options.drills < 1 or options.jobs < 1:
        parser.error(f"no such kind: {', '.join(unknown)}" if unknown else "--drills and --jobs must be 1 or more")
    enter_mount_namespace()
    if homeless := [kind for kind in options.kinds if not mixes_of(kind, options.mixes)]:
        print(f"not drilled, as --mixes {options.mixes} leaves them none: {', '.join(homeless)}")
        options.kinds = [kind for kind in options.kinds if kind not in homeless]
    if not options.kinds or (options.only is not None and not 0 <= options.only < options.drills):
        parser.error("--mixes leaves nothing to drill" if not options.kinds else "--only must be below --drills")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # runs must hear it, even if a shell lets us ignore it
    sys.exit(1 if run_drills(options) else 0)


if __name__ == "__main__":
    main()
