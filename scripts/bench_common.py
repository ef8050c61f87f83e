"""What bench_throughput.py and bench_gpu.py share: arms, TRL's environment, runs with their memory, tables.

An arm is one way to train a case: dsft:BACKEND:FOLD, or trl:BACKEND:ROWS with ROWS per micro-batch;
backends are fsdp and zero3, and for TRL plain (one process, nothing sharded). All arms of a case
train the same rows in the same global batches, so their first steps must have the same loss. Only then are times shown.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's dsft, whichever is installed

from compare_backends import command as dsft_command  # noqa: E402

from dsft.processes import end_with_parent  # noqa: E402

# TRL and what it needs over requirements.txt, installed without dependencies: nothing else can come along.
TRL_PACKAGES = ("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19")
COMPARED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
BACKENDS = {"dsft": ("fsdp", "zero3"), "trl": ("fsdp", "zero3", "plain"), "trl-targets": ("fsdp", "zero3", "plain")}
FOLDS = ("batch", "off")
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of the first step's loss, relative
LR, BETAS, WEIGHT_DECAY, WARMUP_RATIO, CLIP_GRAD, SEED = 1e-4, (0.9, 0.95), 0.01, 0.1, 1.0, 1
POLL_SECONDS = 0.25


def stop(message: str) -> None:
    """End with one line."""
    sys.exit(f"error: {message}")


@dataclass(frozen=True)
class Arm:
    """One way to train. `setting` is dsft's --fold, or TRL's rows in a micro-batch."""

    trainer: str
    backend: str
    setting: str

    def __str__(self) -> str:
        return f"{self.trainer}:{self.backend}:{self.setting}"

    @property
    def is_dsft(self) -> bool:
        """Whether it is this project's Trainer."""
        return self.trainer == "dsft"


@dataclass(frozen=True)
class Case:
    """What every arm trains."""

    model: str
    train_files: str
    rows: int
    train_batch_size: int
    epochs: int
    max_length: int
    dtype: str
    ranks: int
    lora_rank: int
    lora_alpha: int
    gradient_checkpointing: bool  # in all arms; False is none for TRL and the default for dsft
    max_tokens_per_micro_batch: int | None  # of dsft; None is its default
    sampling: str  # TRL's order of rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a pass over the rows."""
        return self.rows // self.train_batch_size

    @property
    def warmup_steps(self) -> int:
        """As dsft counts them."""
        return int(WARMUP_RATIO * self.epochs * self.steps_per_epoch)


def parse_arms(text: str, micro_batches: Sequence[int]) -> list[Arm]:
    """Arms from a comma-separated list.

    `dsft:fsdp` stands for both folds, `trl:fsdp` for every one of TRL's micro-batch sizes. `trl-targets` is TRL with
    its output head on the target positions only, which TRL itself does where Triton runs.
    """
    arms = []
    for word in text.split(","):
        trainer, _, rest = word.strip().partition(":")
        backend, _, setting = rest.partition(":")
        if trainer not in BACKENDS or backend not in BACKENDS[trainer]:
            known = ", ".join(f"{t}:{b}" for t, backends in BACKENDS.items() for b in backends)
            stop(f"--arms: '{word}' is none of {known}")
        if trainer == "dsft":
            settings = [setting] if setting else list(FOLDS)
            fits = all(one in FOLDS for one in settings)
        else:
            settings = [setting] if setting else [str(rows) for rows in micro_batches]
            fits = all(one.isdecimal() and int(one) > 0 for one in settings)
        if not fits:
            stop(f"--arms: '{word}' must end with {' or '.join(FOLDS) if trainer == 'dsft' else 'a number of rows'}")
        arms += [Arm(trainer, backend, one) for one in settings]
    return list(dict.fromkeys(arms))


def check_case(case: Case, arms: Sequence[Arm]) -> None:
    """Refuse cases in which the arms would not train the same batches: TRL fills up an incomplete one, for example."""
    if case.rows % case.train_batch_size:
        stop(f"--rows {case.rows} must be a multiple of --train_batch_size {case.train_batch_size}")
    for arm in arms:
        if arm.setting == "batch" and case.train_batch_size != case.rows:
            stop(f"{arm} draws batches of whole dialogues: give --train_batch_size the value of --rows")
        if arm.backend == "plain" and case.ranks > 1:
            stop(f"{arm}: plain is one process, --ranks is {case.ranks}")
        if not arm.is_dsft and case.train_batch_size % (case.ranks * int(arm.setting)):
            stop(f"{arm}: --train_batch_size {case.train_batch_size} does not divide by {case.ranks} ranks x its rows")
    if case.sampling != "sequential" and case.train_batch_size != case.rows:
        stop(
            "--trl_sampling other than sequential draws batches of its own: give --train_batch_size the value of --rows"
        )


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def numbers(text: str) -> list[int]:
    """An argument that is a comma-separated list of such."""
    return [positive(word) for word in text.split(",")]


# TRL's environment


def trl_environment() -> Path:
    """The Python of TRL's virtual environment, made in the cache folder if it is missing.

    It sees dsft's own packages behind its own, so torch, transformers, peft, accelerate and deepspeed are the very
    same: only the trainer differs, and 10 MB are all that it takes.
    """
    from dsft.cache import build_once

    paths = [sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")]
    shared = "\n".join(dict.fromkeys(paths)) + "\n"
    key = hashlib.sha256("\n".join([sys.executable, shared, *TRL_PACKAGES]).encode()).hexdigest()[:8]

    def build(folder: Path) -> None:
        say(f"making TRL's environment ({', '.join(TRL_PACKAGES)})")
        run_quietly([sys.executable, "-m", "venv", str(folder)])
        python = str(folder / "bin" / "python")
        run_quietly([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", *TRL_PACKAGES])
        asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        own = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
        (Path(own) / "dsft_packages.pth").write_text(shared, encoding="utf-8")

    name = f"bench-trl/{TRL_PACKAGES[0].replace('==', '-')}-{key}"
    python = build_once(name, build) / "bin" / "python"
    run_quietly([str(python), "-c", "import trl, torch, peft, deepspeed"])
    return python


def run_quietly(words: Sequence[str]) -> None:
    """Run a command of the set-up; its last words if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        stop(f"'{' '.join(words[:6])} …' ended with status {done.returncode}:\n{done.stderr[-1500:]}")


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


# Rows


def export_rows(case: Case, file: Path) -> dict[str, Any]:
    """Write dsft's tokens and targets where SFTTrainer reads them, and count them.

    In the order of dsft's global batches; within one the longest first, so that the micro-batches of all ranks are
    alike in length and pad little.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dsft.config.flags import RowFlags
    from dsft.dataset.tokens import load_dataset
    from dsft.model.source import load_tokenizer, resolve_model

    model = resolve_model(case.model)
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    files = case.train_files.split(",")
    data = load_dataset(files, "train_files", tokenizer, RowFlags(max_length=case.max_length), max_rows=case.rows)
    if len(data) != case.rows:
        stop(f"--train_files {case.train_files} has {len(data)} rows, --rows asks for {case.rows}")
    batches = [np.arange(case.rows)]
    if case.train_batch_size < case.rows:
        from dsft.dataset.batches import GlobalBatches

        batches = GlobalBatches(batches[0], batches[0], case.train_batch_size, SEED).epoch(0)
    ids, labels = [], []
    for batch in batches:
        for row in batch[np.argsort(-data.lengths[batch], kind="stable")]:
            tokens, is_target = data[row]
            target = is_target.copy()
            target[0] = False  # nothing predicts a row's first token
            ids.append(tokens.astype(np.int64))
            labels.append(np.where(target, tokens, -100).astype(np.int64))
    pq.write_table(pa.table({"input_ids": ids, "labels": labels}), file)
    return {
        "rows_digest": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "model_folder": model,
        "tokens": int(data.lengths.sum()),
        "longest": int(data.lengths.max()),
        "targets": data.counts.targets,
    }


def describe(case: Case, facts: dict[str, Any]) -> str:
    """The case in words."""
    rows = f"{case.rows} rows, {facts['tokens']} tokens ({facts['targets']} targets, longest row {facts['longest']})"
    steps = f"{case.train_batch_size} rows a step, {case.epochs} epochs"
    return f"{rows}, {steps}, {case.model}, LoRA {case.lora_rank}, {case.dtype}, {case.ranks} ranks"


# Runs


def dsft_words(arm: Arm, case: Case, output: Path) -> list[str]:
    """The command of a dsft arm, as a user would type it."""
    flags = {
        "backend": arm.backend,
        "fold": arm.setting,
        "model": case.model,
        "train_files": case.train_files,
        "max_train_rows": case.rows,
        "max_length": case.max_length,
        "train_batch_size": case.train_batch_size,
        "total_epochs": case.epochs,
        "dtype": case.dtype,
        "lora_rank": case.lora_rank,
        "lora_alpha": case.lora_alpha,
        "lr": LR,
        "betas": ",".join(map(str, BETAS)),
        "weight_decay": WEIGHT_DECAY,
        "warmup_ratio": WARMUP_RATIO,
        "clip_grad": CLIP_GRAD,
        "seed": SEED,
        "save_steps": 0,
        "output_dir": output,
    }
    if case.max_tokens_per_micro_batch is not None:
        flags["max_tokens_per_micro_batch"] = case.max_tokens_per_micro_batch
    if case.gradient_checkpointing:
        flags["gradient_checkpointing"] = "true"
    words = dsft_command(arm.backend, case.ranks)
    return words + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def trl_words(arm: Arm, case: Case, facts: dict[str, Any], python: Path, folder: Path) -> list[str]:
    """The command of a TRL arm; what it trains is written beside its results."""
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))  # dsft's own settings
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ds_config |= dict.fromkeys((*automatic, "gradient_clipping"), "auto") | {"bf16": {"enabled": "auto"}}
    settings = asdict(case) | {
        "model": facts["model_folder"],
        "backend": arm.backend,
        "micro_batch_size": int(arm.setting),
        "targets_only": arm.trainer == "trl-targets",
        "rows_file": facts["rows_file"],
        "steps_file": str(folder / "steps.jsonl"),
        "output_dir": str(folder / "trl"),
        "threads": threads(case.ranks),
        "ds_config": ds_config,
        "warmup_steps": case.warmup_steps,
        "lr": LR,
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
        "clip_grad": CLIP_GRAD,
        "seed": SEED,
    }
    case_file = folder / "case.json"
    case_file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    worker = [str(ROOT / "scripts" / "bench_trl.py"), str(case_file)]
    if arm.backend == "plain":
        return [str(python), *worker]
    return [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.ranks), *worker]


def threads(ranks: int) -> int:
    """Threads of a rank: the cores shared evenly, as dsft shares them."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def run_arm(arm: Arm, case: Case, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one arm once.

    Returns:
        Its steps (seconds, loss, grad_norm, computed tokens), peak memory and versions.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if arm.is_dsft:
        words, steps_file = dsft_words(arm, case, folder / "run"), folder / "run" / "metrics.jsonl"
    else:
        words, steps_file = trl_words(arm, case, facts, facts["trl_python"], folder), folder / "steps.jsonl"
    started = time.monotonic()
    lines = []
    peaks: dict[int, float] = {}
    for line in watched(words, folder / "log.txt", steps_file, peaks, str(arm)):
        lines.append(line)
        if "step" in line and line["step"] % case.steps_per_epoch == 0:
            epoch = line["step"] // case.steps_per_epoch
            say(f"{arm} epoch {epoch} of {case.epochs} after {time.monotonic() - started:.0f} s")
    steps = [read_step(line) for line in lines if "train/loss" in line or "loss" in line]
    if len(steps) != case.epochs * case.steps_per_epoch:
        stop(
            f"{arm} wrote {len(steps)} steps instead of {case.epochs * case.steps_per_epoch}; see {folder / 'log.txt'}"
        )
    end = next((line for line in lines if line.get("end")), {})
    if arm.is_dsft:
        gpu_peak = max(line["memory"] for line in lines if "memory" in line) if facts["gpu"] else None
    else:
        gpu_peak = end.get("gpu_peak_gib")
    return {
        "arm": str(arm),
        "command": words,
        "wall_seconds": time.monotonic() - started,
        "steps": steps,
        "peak_gib_by_rank": peaks,
        "gpu_peak_gib": gpu_peak,
        "dtypes": end.get("dtypes"),
        "versions": end.get("versions") or {name: version(name) for name in COMPARED_PACKAGES},
    }


def read_step(line: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step, from a line of dsft's metrics.jsonl or of bench_trl.py."""
    step = {"cpu_seconds": line["cpu_seconds"]}
    if "train/loss" not in line:
        return step | {name: line[name] for name in ("seconds", "loss", "grad_norm", "computed_tokens")}
    effective = line["train/effective_tokens_per_second"] * line["train/step_seconds"]
    return step | {
        "seconds": line["train/step_seconds"],
        "loss": line["train/loss"],
        "grad_norm": line["train/grad_norm"],
        "computed_tokens": round(effective / line["train/fold_ratio"]),
    }


def watched(
    words: Sequence[str], log: Path, steps_file: Path, peaks: dict[int, float], name: str
) -> Iterator[dict[str, Any]]:
    """Run a command and yield the lines of its steps file as they come.

    Each gets `cpu_seconds`, what all its processes have used of the processors so far. `peaks` gets each rank's peak
    memory, start-up and saving included.
    """
    set_by_launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in set_by_launchers}
    read, parent = 0, os.getpid()
    with open(log, "w", encoding="utf-8") as output:
        process = psutil.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(parent),
        )
        family = Family(process, {}, {}, peaks)
        try:
            status = None
            while status is None:
                with suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
                    status = process.wait(POLL_SECONDS)
                family.look()
                if steps_file.exists():
                    text = steps_file.read_text(encoding="utf-8")
                    whole = text[: text.rfind("\n") + 1]
                    for line in whole[read:].splitlines():
                        yield json.loads(line) | {"cpu_seconds": sum(family.cpu.values())}
                    read = len(whole)
        finally:
            with suppress(psutil.NoSuchProcess):
                for child in [*process.children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
    if status:
        errors = [one for one in log.read_text(encoding="utf-8", errors="replace").splitlines() if "rror" in one]
        stop(f"{name} ended with status {status}; {log} says:\n" + "\n".join(errors[:8]))


@dataclass
class Family:
    """A command and all its processes, seen from outside: so the figures mean the same for every trainer."""

    root: psutil.Process
    rank: dict[int, int]  # process id -> rank; one without RANK is a launcher, or the only rank
    cpu: dict[int, float]  # process id -> processor seconds so far
    peaks: dict[int, float]  # rank -> the kernel's high-water mark of its resident memory, in GiB

    def look(self) -> None:
        """Bring the figures up to date."""
        with suppress(psutil.Error):
            for one in [self.root, *self.root.children(recursive=True)]:
                with suppress(psutil.Error, OSError, ValueError):
                    if one.pid not in self.rank:
                        self.rank[one.pid] = int(one.environ().get("RANK", 0))
                    times = one.cpu_times()
                    self.cpu[one.pid] = times.user + times.system
                    status = Path(f"/proc/{one.pid}/status").read_text(encoding="ascii", errors="replace")
                    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
                    if peak is not None:
                        rank = self.rank[one.pid]
                        self.peaks[rank] = max(self.peaks.get(rank, 0.0), int(peak.split()[1]) / 2**20)


def run_all(
    arms: Sequence[Arm], case: Case, repeats: int, work_dir: Path, facts: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Every arm, repeated in turn so that noise hits all alike; what an earlier call has measured is reused."""
    results: dict[str, list[dict[str, Any]]] = {str(arm): [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms:
            key = {"case": asdict(case), "rows": facts["rows_digest"], "code": code_digest(arm)}
            name = f"{str(arm).replace(':', '-')}-{repeat}"
            kept = work_dir / f"{name}.json"
            stored = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
            if stored.get("key") == key:
                say(f"{arm} repeat {repeat + 1}: from {kept}")
                result = stored["result"]
            else:
                say(f"{arm} repeat {repeat + 1} of {repeats}")
                result = run_arm(arm, case, facts, work_dir / name)
                kept.write_text(json.dumps({"key": key, "result": result}, indent=2), encoding="utf-8")
            results[str(arm)].append(result)
    return results


def code_digest(arm: Arm) -> str:
    """Changes with the code that an arm runs, so that no result of other code is reused."""
    files = sorted((ROOT / "dsft").rglob("*.py")) if arm.is_dsft else [ROOT / "scripts" / "bench_trl.py"]
    digest = hashlib.sha256("\n".join(TRL_PACKAGES).encode())
    for file in [*files, ROOT / "ds_configs" / "zero3.json"]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# Tables


def loss_table(results: dict[str, list[dict[str, Any]]], case: Case) -> tuple[str, list[str]]:
    """The first step of every arm, and the arms whose loss is not the first one's within the tolerance.

    The first arm of TRL is the reference.
    """
    tolerance = TOLERANCE[case.dtype]
    firsts = {name: runs[0]["steps"][0] for name, runs in results.items()}
    names = sorted(firsts, key=lambda name: name.startswith("dsft"))  # stable: TRL's arms first
    lines = ["| arm | first loss | relative | first gradient norm |", "| --- | --- | --- | --- |"]
    reference = firsts[names[0]]["loss"]
    wrong = []
    for name in names:
        losses = [run["steps"][0]["loss"] for run in results[name]]
        worst = max((abs(loss - reference) / abs(reference) for loss in losses), default=0.0)
        if not worst <= tolerance:  # a loss that is no number differs too
            wrong.append(name)
        first = firsts[name]
        lines.append(f"| {name} | {first['loss']:.6f} | {worst:.1e} | {first['grad_norm']:.5f} |")
    return "\n".join(lines), wrong


def summarize(runs: Sequence[dict[str, Any]], case: Case, tokens: int) -> dict[str, Any]:
    """One arm's figures: medians over the epochs after the first, of all repeats (of the first, where it is alone)."""
    epochs = [
        [
            run["steps"][start : start + case.steps_per_epoch]
            for start in range(0, len(run["steps"]), case.steps_per_epoch)
        ]
        for run in runs
    ]
    seconds = [[sum(step["seconds"] for step in epoch) for epoch in run] for run in epochs]
    counted = [one for run in seconds for one in run[1:]] or [run[0] for run in seconds]
    epoch_seconds = statistics.median(counted)
    computed = statistics.median(sum(step["computed_tokens"] for step in epoch) for run in epochs for epoch in run)
    ends = [[epoch[-1]["cpu_seconds"] for epoch in run] for run in epochs]
    cpu = [after - before for run in ends for before, after in itertools.pairwise(run)]
    gpu_peaks = [run["gpu_peak_gib"] for run in runs if run.get("gpu_peak_gib") is not None]
    return {
        "epoch_seconds": epoch_seconds,
        "epoch_seconds_range": [min(counted), max(counted)],
        "first_epoch_seconds": statistics.median(run[0] for run in seconds),
        "epochs_counted": len(counted),
        "cpu_seconds": statistics.median(cpu) if cpu else None,
        "tokens_per_second": tokens / epoch_seconds,
        "computed_tokens": computed,
        "computed_tokens_per_second": computed / epoch_seconds,
        "peak_gib": max(gpu_peaks) if gpu_peaks else max(max(run["peak_gib_by_rank"].values()) for run in runs),
    }


def add_ratios(summary: dict[str, dict[str, Any]]) -> None:
    """How often faster than TRL: than its fastest fsdp arm (than its fastest, where it has none), and than its fastest
    on the same backend.

    Arms of trl-targets are no reference: they are TRL as it is not.
    """
    seconds = {name: row["epoch_seconds"] for name, row in summary.items() if name.startswith("trl:")}

    def fastest(backend: str | None) -> float | None:
        return min((s for name, s in seconds.items() if backend in (None, name.split(":")[1])), default=None)

    overall = fastest("fsdp") or fastest(None)
    for name, row in summary.items():
        same = fastest(name.split(":")[1])
        row["times_trl"] = overall / row["epoch_seconds"] if overall else None
        row["times_trl_same_backend"] = same / row["epoch_seconds"] if same else None


def ratio(value: float | None) -> str:
    """A cell of a ratio."""
    return "" if value is None else f"{value:.2f}"


def time_table(summary: dict[str, dict[str, Any]], extra: dict[str, dict[str, str]] | None = None) -> str:
    """The table of times as Markdown; `extra` adds columns (heading -> arm -> cell)."""
    extra = extra or {}
    heads = [
        "arm",
        "s an epoch",
        "range",
        "first epoch",
        "CPU s an epoch",
        "tokens/s",
        "computed tokens",
        "peak GiB a rank",
    ]
    reference = "TRL fsdp" if any(name.startswith("trl:fsdp") for name in summary) else "fastest TRL"
    heads += [f"x {reference}", "x TRL same backend", *extra]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, row in summary.items():
        low, high = row["epoch_seconds_range"]
        cells = [name, f"{row['epoch_seconds']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['first_epoch_seconds']:.1f}"]
        cells += ["" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.1f}"]
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['computed_tokens']:.0f}", f"{row['peak_gib']:.2f}"]
        cells += [ratio(row["times_trl"]), ratio(row["times_trl_same_backend"])]
        cells += [column.get(name, "") for column in extra.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def judge(results: dict[str, list[dict[str, Any]]], case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    """Print the first losses; the case's record, in which `summary` has figures only where all losses agree."""
    table, wrong = loss_table(results, case)
    print(table + "\n", flush=True)
    summary: dict[str, dict[str, Any]] = {}
    if not wrong:
        summary = {name: summarize(runs, case, facts["tokens"]) for name, runs in results.items()}
        add_ratios(summary)
    stored = {name: str(value) if isinstance(value, Path) else value for name, value in facts.items()}
    return {"case": asdict(case), "facts": stored, "losses_disagree": wrong, "summary": summary, "runs": results}


def finish(records: dict[str, dict[str, Any]], json_file: str | None) -> None:
    """Write the records, then end with status 1 if a loss disagrees: no time is to be believed."""
    if json_file:
        everything = {"command": sys.argv, "machine": machine(), "cases": records}
        Path(json_file).write_text(json.dumps(everything, indent=2), encoding="utf-8")
    for name, record in records.items():
        if record["losses_disagree"]:
            arms, limit = ", ".join(record["losses_disagree"]), TOLERANCE[record["case"]["dtype"]]
            stop(f"no times of {name}: the first loss of {arms} differs by more than {limit:g} (relative)")


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    import platform

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": models[0].split(":")[1].strip() if models else platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in COMPARED_PACKAGES} | dict(p.split("==") for p in TRL_PACKAGES),
    }
