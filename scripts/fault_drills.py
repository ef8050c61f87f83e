#!/usr/bin/env python
"""Breaks real training runs in many ways, resumes them, and checks that nothing is lost.

    python scripts/fault_drills.py --drills 200 --seed 1 --jobs 2 --output drills.json [--kinds a,b] [--keep]
    python scripts/fault_drills.py --drills 200 --seed 1 --only 17          # rerun drill 17
    python scripts/fault_drills.py --drills 40 --kinds kill-host,cut-link,slow-link,late-host

Each drill breaks a run of a tiny model, reruns the same command, and compares every line of metrics.jsonl with that of
an undisturbed run, bit for bit. docs/reliability.md lists the kinds and what is checked.

Exits with status 1 if a drill failed; failed drills keep their folder and logs.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product, zip_longest
from pathlib import Path
from random import Random
from typing import Any

import psutil
from compare_backends import free_port
from hosts import NETWORK, Cluster, Host, unavailable_reason

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "scripts" / "fault_worker.py"
MARK = "DSFT_DRILL"
NODE_RANK, FIRST_HOST = "NODE_RANK", f"{NETWORK}.1"

STEPS = 60
WINDOWS = ((4, 16), (26, 38))  # steps between which the first and the second fault of a run happen
MAX_DELAY = 0.1  # seconds after a step's line in metrics.jsonl: a few steps, or a validation and a save
SAVE_OPERATIONS = {0: 40, 1: 3}  # of a save, by rank, that can be hit; rank 1 writes in full fine-tuning only
END_LIMIT = 60.0  # seconds in which every process of a broken run must be gone
STOP_STEPS, STOP_SECONDS = 2, 10.0  # how far a run may continue that was asked to stop: it is one sum behind
START_LIMIT = 150.0
ATTEMPTS = 4  # a run can end before its fault; the drill then starts over
DAMAGES = ("bit flip", "truncated", "deleted", "swapped", "emptied", "another run's")
STEP_KEYS = ("step", "epoch", "train/loss", "train/grad_norm", "train/lr", "train/targets", "train/tokens")
VALIDATION_KEYS = ("step", "epoch", "val/loss")


@dataclass(frozen=True)
class Kind:
    """A way to break a run, and what is expected of it."""

    error_lines: int | None  # lines "error: …"; None: any number, no process is left to print
    launchers: tuple[str, ...] = ("none", "torchrun", "deepspeed")
    stops: bool = False  # the run saves the running step, so no step is repeated
    goes_on: bool = False  # the same start trains to the end
    action: str | None = None  # what fault_worker.py does in a save
    reason: str = ""  # a part of the error line


RANKS, LAUNCHED = {"none": 1, "torchrun": 2, "deepspeed": 2, "hosts": 2}, ("torchrun", "deepspeed")
HOSTS = ("hosts",)  # torchrun on two hosts
SAVE_STEPS = {"lora": 2, "full": 3}
KINDS = {
    "kill-rank": Kind(1, LAUNCHED),
    "kill-all": Kind(None),
    "kill-launcher": Kind(None, LAUNCHED, stops=True),
    "kill-in-save": Kind(1, action="kill"),
    "kill-before-marker": Kind(1, action="kill"),
    "term": Kind(0, stops=True),
    "int": Kind(0, stops=True),
    "usr1": Kind(0, stops=True),
    "disk-full": Kind(1, action="disk-full", reason="the disk is full"),
    "corrupt": Kind(None),
    "read-only": Kind(1, action="read-only", reason="ead-only file system"),
    "stop-rank": Kind(1, LAUNCHED),
    "elastic": Kind(None, ("torchrun",), goes_on=True),
    "kill-host": Kind(1, HOSTS),
    "cut-link": Kind(2, HOSTS),  # one on each side
    "slow-link": Kind(None, HOSTS, goes_on=True),
    "late-host": Kind(None, HOSTS, goes_on=True),
}
ON_ONE_MACHINE = tuple(kind for kind, rules in KINDS.items() if rules.launchers != HOSTS)
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1, "stop-rank": signal.SIGSTOP}


@dataclass(frozen=True)
class Mix:
    """What is trained, and how it is started."""

    saving: str
    method: str
    backend: str
    launcher: str

    @property
    def reference(self) -> "Mix":
        """The mix of the undisturbed run: launcher and saving do not change the numbers."""
        return Mix("sync", self.method, self.backend, "none" if self.launcher == "none" else "torchrun")

    def __str__(self) -> str:
        return f"{self.backend}/{self.launcher}/{self.method}/{self.saving}"


@dataclass(frozen=True)
class Drill:
    """A fault in a run. All random choices follow from (seed, number)."""

    number: int
    kind: str
    mix: Mix
    turn: int
    """Counts the drills of this kind; selects what goes in turn, such as the damaged file."""


def mixes_of(kind: str, pattern: str = "") -> list[Mix]:
    """The mixes of a kind that match `pattern`."""
    every = product(("sync", "async"), ("lora", "full"), ("fsdp", "zero3"), KINDS[kind].launchers)
    return [mix for values in every if re.search(pattern, str(mix := Mix(*values)))]


def plan(count: int, seed: int, kinds: Sequence[str] = ON_ONE_MACHINE, pattern: str = "") -> list[Drill]:
    """`count` drills: the kinds in turn, each with its mixes in turn."""
    drills = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        turn = number // len(kinds) + Random(f"{seed}/{kind}").randrange(24)
        mixes = mixes_of(kind, pattern)
        drills.append(Drill(number, kind, mixes[7 * turn % len(mixes)], turn))  # 7: neighbours differ in every value
    return drills


# What a run has written, read without dsft


def sequence(out: Path) -> list[tuple[Any, ...]]:
    """Everything in metrics.jsonl that must be equal, line by line; an unfinished last line is left out."""
    metrics = out / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [tuple(line[key] for key in (STEP_KEYS if "train/loss" in line else VALIDATION_KEYS)) for line in lines]


def last_step(out: Path) -> int:
    """The step of the last whole line, 0 before the first."""
    return next((line[0] for line in reversed(sequence(out))), 0)


def is_sound(checkpoint: Path) -> bool:
    """Whether COMPLETE lists every file, and each has its checksum."""
    files = {path.name: path for path in checkpoint.iterdir()}
    content = files.pop("COMPLETE").read_bytes() if "COMPLETE" in files else b""
    lines = [re.fullmatch(rb"([0-9a-f]{64})  ([^/\0]+)", line) for line in content.removesuffix(b"\n").split(b"\n")]
    listed = {os.fsdecode(line[2]): line[1].decode() for line in lines if line}
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return content.endswith(b"\n") and listed == sums


def checkpoints(out: Path) -> dict[int, Path]:
    """Step -> folder, newest first, whatever state they are in."""
    found = {int(path.name[11:]): path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()}
    return dict(sorted(found.items(), reverse=True))


def newest_sound(out: Path) -> int:
    """The step that the next start must resume from."""
    return next((step for step, path in checkpoints(out).items() if is_sound(path)), 0)


def unmarked(out: Path) -> list[Path]:
    """Checkpoints without COMPLETE, which must not be used."""
    return [path for path in checkpoints(out).values() if not (path / "COMPLETE").is_file()]


def own_traceback(text: str) -> str:
    """A traceback or crash of dsft in standard error, "" if none; launchers print some of their own."""
    for block in re.split("^(?=.*Traceback \\(most recent call last\\))", text, flags=re.M)[1:]:
        if re.search(rf'File "{re.escape(str(ROOT))}/(dsft|scripts)/', block.split("\n\n")[0]):
            return block[:2000]
    crash = re.search("terminate called|Segmentation fault|Fatal Python error|core dumped", text)
    return crash[0] if crash else ""


class RunEndedError(Exception):
    """A run has ended before its fault."""


class Run:
    """One start of a command. Its processes are found by a variable in their environment.

    On a cluster it starts on every host, on the first one `late` seconds before the others.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        fault: dict[str, Any] | None = None,
        cluster: Cluster | None = None,
        late: float = 0,
    ) -> None:
        self.log = log
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "DSFT_CACHE": str(work_folder() / "cache"), MARK: str(log)}
        environment |= {"DSFT_FAULT": json.dumps(fault)} if fault else {}
        log.parent.mkdir(parents=True, exist_ok=True)
        if cluster is None:
            with open(f"{log}.out", "wb") as stdout, open(f"{log}.err", "wb") as stderr:
                self._started = [
                    psutil.Popen(words, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True)
                ]
            return
        environment["DSFT_CACHE"] = f"{log}.cache"  # empty, and shared by the hosts
        self._started = []
        for rank, host in enumerate(cluster.hosts):
            time.sleep(late if rank else 0)
            typed = [str(rank) if word == NODE_RANK else word for word in words]
            self._started.append(host.start(typed, Path(f"{log}.err"), env=environment))
        Path(f"{log}.out").touch()

    @property
    def process(self) -> psutil.Popen:
        """What the user has started, on the first host."""
        return self._started[0]

    @property
    def is_over(self) -> bool:
        """Whether it has ended, on every host."""
        return all(process.poll() is not None for process in self._started)

    @property
    def status(self) -> int:
        """The exit status of a run that is over; of several hosts one that is not 0, if any."""
        return next((process.returncode for process in self._started if process.returncode), 0)

    def read(self, end: str) -> str:
        """Standard output ("out") or standard error ("err") so far; hosts write both to the same file."""
        return Path(f"{self.log}.{end}").read_text(encoding="utf-8", errors="replace")

    @property
    def printed(self) -> str:
        """Everything so far."""
        return self.read("out") + self.read("err")

    @property
    def errors(self) -> list[str]:
        """What dsft has printed for the user."""
        return [line for line in self.read("err").splitlines() if line.startswith("error: ")]

    def members(self) -> list[psutil.Process]:
        """Every living process of this run, orphans too."""
        return [process for process in psutil.process_iter() if environment_of(process).get(MARK) == str(self.log)]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank."""
        found = {int(rank): process for process in reversed(self.members()) if (rank := rank_of(process)) is not None}
        return [found[rank] for rank in sorted(found)] or [self.process]

    def wait_until(self, is_true: Callable[[], bool], pause: float) -> None:
        """Raises RunEndedError if the run ends first."""
        deadline = time.monotonic() + START_LIMIT
        while not is_true():
            if self.is_over and not is_true():
                raise RunEndedError
            if time.monotonic() > deadline:
                raise TimeoutError(f"the instant of the fault did not come within {START_LIMIT:.0f} s")
            time.sleep(pause)

    def has_ended(self, limit: float) -> bool:
        """Wait until no process of the run lives; False if some still do after `limit` seconds. They are killed."""
        deadline = time.monotonic() + limit
        while (not self.is_over or self.members()) and time.monotonic() < deadline:
            time.sleep(0.01)
        ended = self.is_over and not self.members()
        self.kill()
        return ended

    def kill(self) -> None:
        """End every process."""
        while left := self.members():
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.005)
        for process in self._started:
            process.wait()


def rank_of(process: psutil.Process) -> str | None:
    """RANK of a process that trains under a launcher."""
    with suppress(psutil.Error):
        return environment_of(process).get("RANK") if str(WORKER) in process.cmdline() else None
    return None


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Of a living process. Empty for a zombie: an orphan's may stay forever where nothing reaps it."""
    with suppress(psutil.Error, OSError):
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.environ()
    return {}


@cache
def work_folder() -> Path:
    """Where everything is written."""
    return Path(tempfile.mkdtemp(prefix="dsft-drills-"))


def make_inputs(folder: Path) -> None:
    """A two-layer Llama with a tokenizer of single bytes, and rows: a step takes milliseconds, a checkpoint 100 KB."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dsft.distributed.runtime import silence_libraries

    silence_libraries()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator([], special_tokens=special)
    names = {"eos_token": special[0], "pad_token": special[0], "additional_special_tokens": special[1:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    prompts = [" ".join(words[i % 7 :]) + f" {i}" for i in range(40)]
    responses = [" ".join(words[i * i % 10 :][:3]) for i in range(40)]
    pq.write_table(pa.table({"prompt": prompts, "response": responses}), folder / "rows.parquet")


def command(mix: Mix, out: Path, *launcher_flags: str, **flags: Any) -> list[str]:
    """The command line of a run, which is also the one that resumes it."""
    scripts = Path(sys.executable).parent
    start = {
        "none": [sys.executable],
        "torchrun": [str(scripts / "torchrun"), "--standalone", "--nproc_per_node", "2", *launcher_flags],
        "deepspeed": [str(scripts / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())],
        "hosts": [str(scripts / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", NODE_RANK],
    }[mix.launcher]
    start += ["--master_addr", FIRST_HOST] if mix.launcher == "hosts" else []
    model, is_lora = work_folder() / "model", mix.method == "lora"
    all_flags = {
        "backend": mix.backend, "model": model, "train_files": model / "rows.parquet",
        "val_files": model / "rows.parquet", "max_val_rows": 4, "dtype": "float32", "lr": 1e-3, "train_batch_size": 8,
        "max_tokens_per_micro_batch": 2048, "total_training_steps": STEPS, "save_steps": SAVE_STEPS[mix.method],
        "eval_steps": 5, "lora_rank": 4 if is_lora else 0, "lora_dropout": 0.1 if is_lora else 0.0,
        "async_save": mix.saving == "async", "output_dir": out,
    } | flags  # fmt: skip
    return [*start, str(WORKER), *(word for name, value in all_flags.items() for word in (f"--{name}", str(value)))]


def make_reference(mix: Mix) -> Path:
    """The output folder of an undisturbed run."""
    folder = work_folder() / "reference" / str(mix).replace("/", "-")
    run = Run(command(mix, folder / "out"), folder / "log")
    if not run.has_ended(START_LIMIT) or run.status:
        raise RuntimeError(f"the undisturbed run of {mix} failed:\n{run.read('err')}")
    return folder / "out"


class BrokenRun:
    """A run that is broken once or twice, resumed, and compared with the undisturbed one."""

    def __init__(self, drill: Drill, seed: int, reference: Path, folder: Path, cluster: Cluster | None = None) -> None:
        self.drill, self.kind, self.mix, self._cluster = drill, KINDS[drill.kind], drill.mix, cluster
        self.reference, self.folder, self.out = reference, folder, folder / "out"
        self.random = Random(f"{seed}/{folder.name}")
        self.details: dict[str, Any] = {}  # what was done to which process, and when
        self.checks: dict[str, bool] = {}
        self.failures: list[str] = []
        self.repeated, self.seconds_to_end = 0, 0.0
        self.step, self.start = 0, 0  # the last step of metrics.jsonl, and from which the next start must resume
        self.damaged: str | None = None  # the checkpoint that the next start must report
        self.run: Run | None = None
        self.out.mkdir(parents=True)

    def check(self, name: str, good: bool, why: str) -> None:
        """Record one check; one that failed stays failed."""
        self.checks[name] = self.checks.get(name, True) and good
        if not good:
            self.failures.append(f"{name}: {why[-1500:]}")

    def carry_out(self) -> None:
        """Break, check, and resume until the end."""
        goes_on = self.kind.goes_on
        twice = self.drill.turn % 3 == 2 and not goes_on and self.drill.kind != "corrupt"
        for window in WINDOWS[: 1 + twice]:
            step = max(last_step(self.out) + 1, self.random.randint(*window))
            fault = self._fault_in_save(step) if self.kind.action else None
            late = self.random.uniform(5, 30) if self.drill.kind == "late-host" else 0
            self.run = run = self._start(f"broken-{window[0]}", fault, late)
            if late:
                self.details["instant"] = f"{late:.0f} s late"
            elif fault:
                marker = Path(fault["marker"])
                run.wait_until(lambda marker=marker: marker.is_file() and marker.stat().st_size > 0, 0.005)
                self.details["where"], self.fault_time = json.loads(marker.read_text(encoding="utf-8"))
            else:
                self._break(run, step)
            if not goes_on:
                self._check_end(run)
                self.check_resumed(run)
            if self.drill.kind == "corrupt":
                self._damage()
            if self._cluster is None or not goes_on:
                self.take_stock()
        self.run = run = run if goes_on else self._start("resumed")
        self.check_finished(run, run.has_ended(START_LIMIT))

    def _start(self, log: str, fault: dict[str, Any] | None = None, late: float = 0, **flags: Any) -> Run:
        for host in self._cluster.hosts if self._cluster else []:
            host.connect()
        restarts = ("--max_restarts", "1") if self.drill.kind == "elastic" else ()
        rotation = {"max_checkpoints": 4} if self.drill.turn // 4 % 2 else {}
        words = command(self.mix, self.out, *restarts, **rotation, **flags)
        return Run(words, self.folder / log, fault, self._cluster, late)

    def _fault_in_save(self, step: int) -> dict[str, Any]:
        """What fault_worker.py does: at an operation of the first save at or after `step`."""
        is_kill, rank, pattern = self.kind.action == "kill", 0, ""
        if is_kill and self.mix.method == "full":
            rank = self.random.randrange(RANKS[self.mix.launcher])
        nth, delay = self.random.randint(1, SAVE_OPERATIONS[rank]), 10 ** self.random.uniform(-4.3, -1 - 1.5 * is_kill)
        if self.drill.kind == "kill-before-marker":  # COMPLETE's temporary file is about to be opened, or renamed
            rank, pattern = 0, r"^(open|os\.rename) checkpoint-\d+/\.COMPLETE\.tmp"
            nth, delay = self.random.choice([1, 2]), 0.0
        save = -(-step // SAVE_STEPS[self.mix.method]) * SAVE_STEPS[self.mix.method]
        fault = {"rank": rank, "save": save, "pattern": pattern, "nth": nth, "delay": self.random.choice([0.0, delay])}
        self.details["fault"] = fault
        marker = self.folder / f"marker-{step}"
        return fault | {"root": str(self.out), "action": self.kind.action, "marker": str(marker)}

    def _break(self, run: Run, step: int) -> None:
        """Wait until the run has written `step`, and a moment longer, then send the signals."""
        if self.drill.kind == "corrupt":  # one checkpoint to damage, and one to fall back to
            step = max(step, 4 * SAVE_STEPS[self.mix.method] + 1)
        kind, delay, first = self.drill.kind, self.random.uniform(0, MAX_DELAY), last_step(self.out) + 1
        run.wait_until(lambda: last_step(self.out) >= first, 0.003)
        ranks, members = run.ranks(), run.members()  # ahead of the instant, which would be over by then
        run.wait_until(lambda: last_step(self.out) >= step, 0.003)
        time.sleep(delay)
        if run.is_over or len(ranks) < RANKS[self.mix.launcher]:
            raise RunEndedError
        self.details["instant"] = f"{delay * 1000:.1f} ms after step {step}"
        self.fault_step, self.fault_clock, self.fault_time = last_step(self.out), time.time(), time.monotonic()
        targets = self._targets(run, ranks, members)
        self.details["target"] = name = list(targets)[self.drill.turn % len(targets)]
        for send in targets[name]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                send(SIGNALS.get(kind, signal.SIGKILL))
        if kind == "elastic":
            while any(map(environment_of, ranks)):  # the launcher ends the other rank and restarts both
                if time.monotonic() > self.fault_time + END_LIMIT:
                    raise TimeoutError(f"the old ranks were still alive after {END_LIMIT:.0f} s")
                time.sleep(0.01)
            self.seconds_to_end = time.monotonic() - self.fault_time

    def _targets(
        self, run: Run, ranks: list[psutil.Process], members: list[psutil.Process]
    ) -> dict[str, list[Callable[[int], Any]]]:
        """To which processes the signal can go."""
        if self.drill.kind in ("kill-all", "corrupt"):
            return {"every process": [process.send_signal for process in members]}
        if self._cluster is not None:
            faults = {"kill-host": Host.kill, "cut-link": Host.cut, "slow-link": partial(Host.slow, rate="10mbit")}
            fault = faults[self.drill.kind]
            return {host.name: [lambda _, host=host: fault(host)] for host in self._cluster.hosts}
        if self.mix.launcher == "none":
            return {"the process": [run.process.send_signal]}
        of_ranks = {f"rank {rank}": [process.send_signal] for rank, process in enumerate(ranks)}
        launchers = {"the launcher": [run.process.send_signal]}
        if (parent := ranks[0].parent()) not in (None, run.process):
            launchers["the ranks' parent"] = [parent.send_signal]
        if self.kind.error_lines == 0:
            return (
                launchers | of_ranks | {"the launcher's process group": [partial(os.killpg, run.process.pid)]}
            )  # Ctrl-C
        return launchers if self.drill.kind == "kill-launcher" else of_ranks

    def _damage(self) -> None:
        """One file of the newest checkpoint in turn, in one way after the other."""
        turn, (newest, older, *_) = self.drill.turn, checkpoints(self.out).values()
        if newest in unmarked(self.out):  # killed in the middle of a save
            raise RunEndedError
        files = sorted(newest.iterdir())
        file = files[turn % len(files)]
        damage = DAMAGES[(turn + turn // len(files)) % len(DAMAGES)]
        foreign = next(p for p in checkpoints(self.reference).values() if p.name != newest.name) / file.name
        if damage == "another run's" and (not foreign.is_file() or foreign.read_bytes() == file.read_bytes()):
            damage = "bit flip"  # such as the tokenizer's files, which all runs share
        self.details["damage"] = f"{newest.name}/{file.name} {damage}"
        spoil(file, damage, self.random, foreign)
        self.damaged = None if newest in unmarked(self.out) else newest.name
        if self.mix.launcher == "none":
            before = set(self.out.iterdir())
            run = self._start("refused", resume=newest)
            ended, errors = run.has_ended(START_LIMIT), run.errors
            named = len(errors) == 1 and newest.name in errors[0] and older.name in errors[0]
            refused = ended and run.status != 0 and named and before <= set(self.out.iterdir())
            self.check("--resume PATH refused", refused, f"status {run.status}, {errors}")

    def _check_end(self, run: Run) -> None:
        """How the broken run has ended: all of it, in time, and with the expected messages."""
        kind, check, target = self.kind, self.check, self.details.get("target", "")
        check("all ended", run.has_ended(END_LIMIT), f"processes were still alive after {END_LIMIT:.0f} s")
        self.seconds_to_end = max(self.seconds_to_end, time.monotonic() - self.fault_time)
        status, errors, to_rank = run.status, run.errors, "launcher" not in target and "parent" not in target
        self.details |= {"status": status, "errors": errors}
        if kind.stops:
            seconds = (self.out / "metrics.jsonl").stat().st_mtime - self.fault_clock
            more = last_step(self.out) - self.fault_step
            good = seconds <= STOP_SECONDS and (more <= STOP_STEPS or not to_rank)  # a dead parent is noticed later
            good = good and ("\nstopped by " in run.read("out") or last_step(self.out) == STEPS)
            check("stops", good, f"{more} more steps in {seconds:.1f} s, or no line 'stopped by …'")
            check("status", status == 0 or not to_rank, f"it was {status} after a stop that was asked for")
        else:
            check("status", status != 0, "it was 0, though the run was broken")
        alone = self.mix.launcher == "none" and kind.action == "kill"  # the only process that could print is dead
        if kind.error_lines is not None and not alone:
            check("error lines", len(errors) == kind.error_lines, f"{len(errors)} instead of {kind.error_lines}")
        if kind.reason and errors:
            good = kind.reason in errors[0] and errors[0].startswith("error: cannot ")
            if "cannot save" in errors[0] and newest_sound(self.out):
                good = good and "is still valid" in errors[0]
            check("reason", good, errors[0])

    def take_stock(self) -> None:
        """What the next start finds."""
        before, kind = self.start, self.drill.kind
        self.step, self.start = last_step(self.out), newest_sound(self.out)
        lost = self.step - self.start
        if self.kind.stops:
            self.check("saved the running step", lost == 0, f"{lost} steps after the newest checkpoint")
        elif kind != "corrupt" and not self.kind.reason:
            most = SAVE_STEPS[self.mix.method] * (2 if self.mix.saving == "async" else 1)
            self.check("saved in time", lost <= most, f"{lost} steps after the newest checkpoint")
        if kind != "corrupt":
            self.check("no checkpoint lost", self.start >= before, f"{before} was sound, the newest is {self.start}")
        if kind == "kill-before-marker":
            self.check("instant", bool(unmarked(self.out)), "no folder without COMPLETE: the kill missed its instant")

    def check_resumed(self, run: Run, *, whole: bool = False) -> None:
        """Whether a start resumed where it must, and with the same numbers."""
        found = re.findall(r"^resum\w+ .*?checkpoint-(\d+)\b", run.printed, re.M)
        start = int(found[-1]) if found else 0
        self.repeated = max(self.repeated, self.step - start)
        self.check("no step lost", start == self.start, f"it resumed from {start} instead of {self.start}")
        ours, theirs = sequence(self.out), sequence(self.reference)
        pairs = zip_longest(ours, theirs if whole else theirs[: len(ours)])
        wrong = next((f"{line} instead of {expected}" for line, expected in pairs if line != expected), "")
        self.check("sequence", not wrong, f"metrics.jsonl has {wrong}")
        crash = own_traceback(run.read("err"))
        self.check("no traceback", not crash, crash)
        if self.damaged is not None:
            aside = self.out / f"{self.damaged}.damaged"
            self.check("put aside", aside.is_dir(), f"{aside.name} is missing")
            warned = re.search(rf"^warning: .*{self.damaged}\b", run.printed, re.M) is not None
            self.check("warned", warned, "no line warns of the damaged checkpoint")

    def check_finished(self, run: Run, ended: bool) -> None:
        """Whether a resumed run ends with everything that an undisturbed one has."""
        good = ended and run.status == 0
        self.check("resumed", good, f"status {run.status} at its end: {run.read('err')}")
        self.check_resumed(run, whole=True)
        left = [*self.out.rglob("*.tmp"), *unmarked(self.out)]
        self.check("no temporary files", not left, f"at the end: {left}")
        last, links = f"checkpoint-{STEPS:06d}", ["latest", "best"]
        for file in sorted((self.reference / last).glob("*.safetensors")):
            copy = self.out / last / file.name
            same = copy.is_file() and copy.read_bytes() == file.read_bytes()
            self.check("weights", same, f"{file.name} differs from that of the undisturbed run")
        for link in links[:1] if self.drill.kind == "corrupt" else links:  # which may have hit the best one
            ours_to, to = ((folder / link).resolve().name for folder in (self.out, self.reference))
            self.check(link, ours_to == to, f"the link points to {ours_to} instead of {to}")


def spoil(file: Path, damage: str, random: Random, foreign: Path) -> None:
    """Damage a file in one of the ways of DAMAGES."""
    content = file.read_bytes()
    place = random.randrange(len(content) or 1)
    if damage == "deleted" or not content:
        file.unlink()
    elif damage == "bit flip":
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :])
    elif damage == "swapped":
        other = random.choice([path for path in sorted(file.parent.iterdir()) if path != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif damage == "another run's":
        file.write_bytes(foreign.read_bytes())
    else:
        file.write_bytes(content[:place] if damage == "truncated" else b"")


def run_drill(drill: Drill, reference: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One drill, started over if its run ended before the fault; its entry of the JSON file."""
    for attempt in range(ATTEMPTS):
        with ExitStack() as stack:
            on_hosts = drill.mix.launcher == "hosts"
            cluster = stack.enter_context(Cluster(2, f"{drill.number}-")) if on_hosts else None
            folder = work_folder() / f"drill-{drill.number:04d}-{attempt}"
            broken = BrokenRun(drill, options.seed, reference, folder, cluster)
            try:
                broken.carry_out()
                break
            except RunEndedError:
                broken.check("fault", False, f"the run ended first: {broken.run.read('err') if broken.run else ''}")
            except Exception:  # a run that hangs, or a defect of this script: the other drills continue
                broken.check("carried out", False, traceback.format_exc())
                break
            finally:
                if broken.run is not None:
                    broken.run.kill()
    outcome = f"passed, {broken.repeated} steps repeated, ended in {broken.seconds_to_end:.1f} s"
    if broken.failures:
        outcome = f"FAILED ({broken.folder}): " + "; ".join(broken.failures)
    elif not options.keep:
        shutil.rmtree(broken.folder)
    done = [str(broken.details[key]) for key in ("target", "instant", "where", "damage") if key in broken.details]
    print(f"drill {drill.number:4} {drill.kind:18} {drill.mix!s:28} {outcome} [{', '.join(done)}]", flush=True)
    kept = ("details", "checks", "failures", "repeated", "seconds_to_end")
    return asdict(drill) | {name: getattr(broken, name) for name in kept}


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each kind."""
    lines = [f"{'kind':18}  drills  resumed  equal  most repeated  longest end s  failed"]
    for kind in [*KINDS, "all"]:
        if rows := [result for result in results if kind in (result["kind"], "all")]:
            resumed, equal = (sum(row["checks"].get(check, False) for row in rows) for check in ("resumed", "sequence"))
            repeated, seconds = (max(row[name] for row in rows) for name in ("repeated", "seconds_to_end"))
            failed = sum(bool(row["failures"]) for row in rows)
            done = f"{kind:18}  {len(rows):6}  {resumed:7}  {equal:5}"
            lines.append(f"{done}  {repeated:13}  {seconds:13.1f}  {failed:6}")
    return "\n".join(lines)


def run_drills(options: argparse.Namespace) -> int:
    """Plan, carry out, report; returns the number of failures."""
    drills = plan(options.drills, options.seed, options.kinds, options.mixes)
    drills = drills if options.only is None else [drills[options.only]]
    make_inputs(work_folder() / "model")
    started = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            mixes = list(dict.fromkeys(drill.mix.reference for drill in drills))
            references = dict(zip(mixes, pool.map(make_reference, mixes), strict=True))
            results = list(pool.map(lambda drill: run_drill(drill, references[drill.mix.reference], options), drills))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in psutil.process_iter():
                if environment_of(process).get(MARK, "").startswith(str(work_folder())):
                    process.kill()
            raise
    seconds, failed = time.monotonic() - started, sum(bool(result["failures"]) for result in results)
    print(f"\n{table(results)}\n\n{len(results)} drills, {failed} failed, {seconds / 60:.1f} min, seed {options.seed}")
    if options.output:
        report = {"command": sys.argv, "seconds": round(seconds, 1), "failed": failed, "drills": results}
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not failed and not options.keep:
        shutil.rmtree(work_folder())
    return failed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=200, help="how many are planned")
    parser.add_argument("--seed", type=int, default=1, help="of the plan and of every instant and target")
    parser.add_argument("--jobs", type=int, default=2, help="how many runs at a time")
    parser.add_argument(
        "--kinds",
        default=",".join(ON_ONE_MACHINE),
        help=f"of {', '.join(KINDS)} (default: all on one machine)",
    )
    parser.add_argument("--mixes", default="", help="a regular expression such as /none/ or zero3/.*/lora")
    parser.add_argument("--only", type=int, metavar="N", help="only drill N of the same plan")
    parser.add_argument("--output", help="JSON file with every drill")
    parser.add_argument("--keep", action="store_true", help="keep all folders, not only those of failed drills")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"--kinds: unknown kind '{unknown[0]}' (choose from {', '.join(KINDS)})")
    if not all(mixes_of(kind, options.mixes) for kind in options.kinds):
        parser.error(f"--mixes {options.mixes} matches no mix of one of the kinds")
    on_hosts = any(KINDS[kind].launchers == HOSTS for kind in options.kinds)
    if on_hosts and (reason := unavailable_reason()):
        parser.error(reason)
    if options.drills < 1 or options.jobs < 1 or options.only not in (None, *range(options.drills)):
        parser.error("--drills and --jobs must be at least 1, --only below --drills")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # runs must hear it, even if a shell lets us ignore it
    sys.exit(1 if run_drills(options) else 0)


if __name__ == "__main__":
    main()
