#!/usr/bin/env python
"""dsft beside TRL's SFTTrainer: the same rows, model, LoRA, batch and ranks, under FSDP2 and under ZeRO-3.

    python scripts/bench_throughput.py --train_files data/sample_train.parquet --rows 64 --json table.json
    python scripts/bench_throughput.py --rows 8 --epochs 2 --arms dsft:fsdp:batch,trl:fsdp     # a quick look
    python scripts/bench_throughput.py --train_files FILE --rows 128 --epochs 1 --dsft_tokens 2048   # peak memory
    python scripts/bench_throughput.py --repeats 3 --arms dsft:fsdp:batch,dsft:fsdp:batch@../dsft-old   # two checkouts
    python scripts/bench_throughput.py --conversations 16    # the chat template strips their reasoning from the history

An arm is dsft:BACKEND[:FOLD[:SHARDING]][@TREE] or trl:BACKEND[:ROWS], with ROWS per micro-batch: backends are fsdp and
zero3, and for TRL plain (one process, not sharded). TREE is another checkout of dsft, whose speed is then printed
relative to this one's. All arms train the same tokens in the same global batches, so the loss of the first step must be
the same in all of them (1e-4 in float32, 1e-2 in bfloat16, relative); otherwise no time is printed and the status is 1.
Times are those of the optimizer steps, without start-up and saving: the median of the epochs after the first. Peak
memory is the resident memory of the largest rank as the kernel counts it, start-up included. CPU seconds are those of
all ranks together, the same median: on a machine that others use too they say more than the clock.

TRL runs in a virtual environment of its own in the cache folder, which the first call makes (10 MB; it shares dsft's
torch, transformers, peft, accelerate and deepspeed). Its settings are those with which it is fastest: no gradient
checkpointing, sdpa, rows of like length together, no data-loader processes, bf16 over a bfloat16 model with float32
LoRA, and for ZeRO-3 dsft's own ds_configs/zero3.json. On CPU, TRL computes the logits of every position, on GPUs only
those of targets; the arms trl-targets:fsdp and trl-targets:zero3 make it do so on CPU too.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's dsft, whichever is installed

from compare_backends import command  # noqa: E402

from dsft.cache import build_once  # noqa: E402
from dsft.processes import end_with_parent  # noqa: E402

# TRL and what it needs over requirements.txt, installed without dependencies: nothing else is installed along.
TRL_PACKAGES = ("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19")
COMPARED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
BACKENDS = {"dsft": ("fsdp", "zero3"), "trl": ("fsdp", "zero3", "plain"), "trl-targets": ("fsdp", "zero3", "plain")}
FOLDS = ["batch", "off"]
SHARDINGS = ("full", "hybrid", "trainable")
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of the first step's loss, relative
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "clip_grad": 1.0, "seed": 1}
WARMUP_RATIO = 0.1
TURNS = 8
STRIPS_REASONING = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
POLL_SECONDS = 0.25


def stop(message: str) -> None:
    """Exit with one line."""
    sys.exit(f"error: {message}")


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Arm:
    """One way to train. `setting` is dsft's --fold, or TRL's rows in a micro-batch; `tree` the checkout of dsft."""

    trainer: str
    backend: str
    setting: str
    tree: Path = ROOT
    sharding: str = ""

    def __str__(self) -> str:
        name = ":".join(filter(None, (self.trainer, self.backend, self.setting, self.sharding)))
        return name if self.tree == ROOT else f"{name}@{self.tree}"


def parse_arms(text: str, micro_batches: str = "1") -> list[Arm]:
    """Arms from a comma-separated list: `dsft:fsdp` is both folds, `trl:fsdp` every micro-batch size of TRL."""
    arms = []
    for word in text.split(","):
        name, _, tree = word.strip().partition("@")
        trainer, backend, setting, sharding = [*name.split(":"), "", "", ""][:4]
        if backend not in BACKENDS.get(trainer, ()):
            stop(f"--arms: '{word}' is none of {', '.join(f'{t}:{b}' for t, those in BACKENDS.items() for b in those)}")
        settings = [setting] if setting else FOLDS if trainer == "dsft" else micro_batches.split(",")
        pattern, what = ("batch|off", "batch or off") if trainer == "dsft" else ("[1-9][0-9]*", "a number of rows")
        if not all(re.fullmatch(pattern, one) for one in settings):
            stop(f"--arms: '{word}' must end with {what}")
        if tree and not (trainer == "dsft" and Path(tree, "dsft", "train.py").is_file()):
            stop(f"--arms: '{word}': {tree} is not a checkout of dsft")
        if sharding and not (trainer == "dsft" and sharding in SHARDINGS):
            stop(f"--arms: '{word}': the sharding of dsft is one of {', '.join(SHARDINGS)}")
        arms += [Arm(trainer, backend, one, Path(tree).resolve() if tree else ROOT, sharding) for one in settings]
    return list(dict.fromkeys(arms))


def steps_per_epoch(case: Namespace) -> int:
    """Optimizer steps in a pass over the rows."""
    return case.rows // case.train_batch_size


def check_case(case: Namespace, arms: Sequence[Arm]) -> None:
    """Refuse cases in which the arms would not train the same batches: TRL fills up an incomplete one, for example."""
    if min(case.rows, case.train_batch_size, case.epochs, case.ranks) < 1:
        stop("--rows, --train_batch_size, --epochs and --ranks must be at least 1")
    all_rows = f"give --train_batch_size the value of --rows, {case.rows}"
    if case.rows % case.train_batch_size:
        stop(f"--rows {case.rows} must be a multiple of --train_batch_size {case.train_batch_size}")
    for arm in arms:
        if arm.setting == "batch" and steps_per_epoch(case) > 1:
            stop(f"{arm} draws batches of whole dialogues: {all_rows}")
        if arm.backend == "plain" and case.ranks > 1:
            stop(f"{arm}: plain is one process, --ranks is {case.ranks}")
        if arm.trainer != "dsft" and case.train_batch_size % (case.ranks * int(arm.setting)):
            stop(f"{arm}: --train_batch_size {case.train_batch_size} is not divisible by {case.ranks} ranks x its rows")
    if case.trl_sampling != "sequential" and steps_per_epoch(case) > 1:
        stop(f"--trl_sampling {case.trl_sampling} draws batches of its own: {all_rows}")


def flag_parser(description: str, arms: str) -> ArgumentParser:
    """The flags that bench_throughput.py and bench_gpu.py share."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=arms, help="comma-separated, see above (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="the first is a warm-up if there are more")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--lora_alpha", type=int, default=32)
    help_text = "in all arms (default: as dsft decides, none in TRL)"
    parser.add_argument("--gradient_checkpointing", action="store_true", help=help_text)
    parser.add_argument("--dsft_tokens", type=int, help="dsft's --max_tokens_per_micro_batch (default: its own)")
    parser.add_argument("--trl_micro_batch", default="1", help="rows per micro-batch; 1,2,4 tries several")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each arm, in turn")
    parser.add_argument("--work_dir", help="keeps the runs (default: a temporary folder)")
    parser.add_argument("--json", help="write everything as JSON to this file")
    parser.set_defaults(row_flags={})
    return parser


def parse() -> Namespace:
    """The flags of this script."""
    parser = flag_parser(__doc__, "dsft:fsdp,dsft:zero3,trl:fsdp,trl:zero3")
    parser.add_argument("--train_files", default="data/sample_train.parquet", help="parquet, as for dsft.train")
    parser.add_argument("--rows", type=int, default=64, help="use the first N rows")
    help_text = f"instead of --train_files and --rows: made-up conversations with reasoning, of {TURNS} answers each"
    parser.add_argument("--conversations", type=int, help=help_text)
    parser.add_argument("--train_batch_size", type=int, help="rows per optimizer step (default: all rows)")
    parser.add_argument("--max_length", type=int, default=2048, help="no row may be longer")
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    help_text = "TRL's order of rows; sequential takes those of a global batch longest first"
    samplings = ("sequential", "group_by_length", "batch_rebalance")
    parser.add_argument("--trl_sampling", choices=samplings, default="sequential", help=help_text)
    options = parser.parse_args()
    if options.conversations:
        options.rows = TURNS * options.conversations
    options.train_batch_size = options.train_batch_size or options.rows
    return options


def write_conversations(folder: Path, count: int) -> dict[str, str]:
    """Write conversations of TURNS questions and answers, and a chat template.

    Returns:
        The flags that name them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    import numpy as np

    random = np.random.default_rng(0)

    def some_words(words: int) -> str:
        return " ".join(random.choice(["alpha", "beta", "gamma", "delta", "rho", "tau"], words))

    def turn() -> list[dict[str, str]]:
        answer = {"role": "assistant", "reasoning_content": some_words(25), "content": some_words(15)}
        return [{"role": "user", "content": some_words(80)}, answer]

    rows = [{"messages": [message for _ in range(TURNS) for message in turn()]} for _ in range(count)]
    folder.joinpath("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder.joinpath("template.jinja").write_text(STRIPS_REASONING, encoding="utf-8")
    return {
        "train_files": str(folder / "rows.jsonl"),
        "messages_key": "messages",
        "chat_template": str(folder / "template.jinja"),
    }


def trl_environment() -> Path:
    """The Python of TRL's virtual environment, made in the cache folder if it is missing.

    It sees dsft's packages behind its own, so torch, transformers, peft, accelerate and deepspeed are the same: only
    the trainer differs.
    """
    paths = [sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")]
    shared = "\n".join(dict.fromkeys(paths)) + "\n"
    key = hashlib.sha256("\n".join([sys.executable, shared, *TRL_PACKAGES]).encode()).hexdigest()[:8]

    def build(folder: Path) -> None:
        say(f"making TRL's environment ({', '.join(TRL_PACKAGES)})")
        run_quietly([sys.executable, "-m", "venv", str(folder)])
        python = str(folder / "bin" / "python")
        run_quietly([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", *TRL_PACKAGES])
        own = run_quietly([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"])
        (Path(own) / "dsft_packages.pth").write_text(shared, encoding="utf-8")

    python = build_once(f"bench-trl/{TRL_PACKAGES[0].replace('==', '-')}-{key}", build) / "bin" / "python"
    run_quietly([str(python), "-c", "import trl, torch, peft, deepspeed"])
    return python


def run_quietly(words: Sequence[str]) -> str:
    """What a command of the set-up prints; the end of its errors if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        stop(f"'{' '.join(words[:6])} …' ended with status {done.returncode}:\n{done.stderr[-1500:]}")
    return done.stdout.strip()


def export_rows(case: Namespace, file: Path) -> dict[str, Any]:
    """Write dsft's tokens and targets where SFTTrainer reads them, and count them.

    In the order of dsft's global batches; within one the longest first, so that the micro-batches of all ranks are
    alike in length and pad little.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dsft.config.flags import RowFlags
    from dsft.dataset.batches import GlobalBatches
    from dsft.dataset.tokens import load_dataset
    from dsft.model.source import load_tokenizer, resolve_model

    model = resolve_model(case.model)
    template = case.row_flags.get("chat_template")
    tokenizer = load_tokenizer(model, trust_remote_code=False, chat_template=template)
    form = RowFlags(max_length=case.max_length, messages_key=case.row_flags.get("messages_key"))
    data = load_dataset(case.train_files.split(","), "train_files", tokenizer, form, max_rows=case.rows)
    if len(data) != case.rows:
        stop(f"--train_files {case.train_files} has {len(data)} rows, --rows is {case.rows}")
    every = np.arange(case.rows)
    batches = [every]
    if steps_per_epoch(case) > 1:
        batches = GlobalBatches(every, every, case.train_batch_size, SETTINGS["seed"]).epoch(0)
    ids, labels = [], []
    for batch in batches:
        for row in batch[np.argsort(-data.lengths[batch], kind="stable")]:
            tokens, is_target = data[row]
            target = is_target.copy()
            target[0] = False  # nothing predicts a row's first token
            ids.append(tokens.astype(np.int64))
            labels.append(np.where(target, tokens, -100).astype(np.int64))
    pq.write_table(pa.table({"input_ids": ids, "labels": labels}), file)
    lengths = data.lengths.astype(float)
    counts = {"tokens": int(lengths.sum()), "longest": int(lengths.max()), "targets": data.counts.targets}
    mean_length = float((lengths**2).sum() / lengths.sum())  # of the row in which a token stands
    return counts | {"mean_length": mean_length, "model_folder": model, "rows_file": str(file)}


def dsft_words(arm: Arm, case: Namespace, output: Path) -> list[str]:
    """The command of a dsft arm, as a user would type it."""
    same = ("model", "train_files", "max_length", "train_batch_size", "dtype", "lora_rank", "lora_alpha")
    flags: dict[str, Any] = {name: getattr(case, name) for name in same} | SETTINGS
    flags |= {"backend": arm.backend, "fold": arm.setting, "output_dir": output, "save_steps": 0}
    flags |= case.row_flags | ({"sharding": arm.sharding} if arm.sharding else {})
    flags |= {"max_train_rows": case.rows, "total_epochs": case.epochs, "warmup_ratio": WARMUP_RATIO}
    flags["betas"] = ",".join(map(str, SETTINGS["betas"]))
    if case.dsft_tokens is not None:
        flags["max_tokens_per_micro_batch"] = case.dsft_tokens
    if case.gradient_checkpointing:
        flags["gradient_checkpointing"] = "true"
    words = command(arm.backend, case.ranks, arm.tree)
    return words + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def trl_words(arm: Arm, case: Namespace, facts: dict[str, Any], folder: Path) -> list[str]:
    """The command of a TRL arm; what it trains is written beside its results."""
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))  # dsft's own settings
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ds_config |= dict.fromkeys((*automatic, "gradient_clipping"), "auto") | {"bf16": {"enabled": "auto"}}
    settings = vars(case) | SETTINGS | {
        "model": facts["model_folder"], "backend": arm.backend, "micro_batch_size": int(arm.setting),
        "targets_only": arm.trainer == "trl-targets", "rows_file": facts["rows_file"], "ds_config": ds_config,
        "steps_file": str(folder / "steps.jsonl"), "output_dir": str(folder / "trl"),
        "threads": max(1, len(os.sched_getaffinity(0)) // case.ranks),  # as dsft shares the cores
        "warmup_steps": int(WARMUP_RATIO * case.epochs * steps_per_epoch(case)),
    }  # fmt: skip
    (folder / "case.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    worker = [str(ROOT / "scripts" / "bench_trl.py"), str(folder / "case.json")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.ranks)]
    return [str(facts["trl_python"]), *([] if arm.backend == "plain" else launcher), *worker]


def run_arm(arm: Arm, case: Namespace, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one arm once; its steps (seconds, loss, grad_norm, computed tokens), peak memory and versions."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if arm.trainer == "dsft":
        words, steps_file = dsft_words(arm, case, folder / "run"), folder / "run" / "metrics.jsonl"
    else:
        words, steps_file = trl_words(arm, case, facts, folder), folder / "steps.jsonl"
    started, peaks = time.monotonic(), {}
    lines = list(watch(words, folder / "log.txt", steps_file, peaks, str(arm), arm.tree))
    seconds = time.monotonic() - started
    say(f"{arm}: {seconds:.0f} s")
    steps = [read_step(line) for line in lines if "train/loss" in line or "loss" in line]
    if len(steps) != case.epochs * steps_per_epoch(case):
        stop(f"{arm} took {len(steps)} instead of {case.epochs * steps_per_epoch(case)} steps; see {folder}/log.txt")
    end = next((line for line in lines if line.get("end")), {})
    gpu_peak = end.get("gpu_peak_gib")
    if arm.trainer == "dsft" and facts["gpu"]:
        gpu_peak = max(line["memory"] for line in lines if "memory" in line)
    peaks_of = {"peak_gib_by_rank": peaks, "gpu_peak_gib": gpu_peak}
    versions = {name: version(name) for name in COMPARED_PACKAGES} | dict(
        package.split("==") for package in TRL_PACKAGES
    )
    return {"command": words, "wall_seconds": seconds, "steps": steps, "versions": versions} | end | peaks_of


def read_step(line: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step, from a line of dsft's metrics.jsonl or of bench_trl.py."""
    names = ("seconds", "loss", "grad_norm", "computed_tokens", "cpu_seconds")
    if "train/loss" in line:
        effective = line["train/effective_tokens_per_second"] * line["train/step_seconds"]
        line = line | {name: line[f"train/{name}"] for name in ("loss", "grad_norm")}
        line |= {"seconds": line["train/step_seconds"], "computed_tokens": round(effective / line["train/fold_ratio"])}
    return {name: line[name] for name in names}


def watch(
    words: Sequence[str], log: Path, steps_file: Path, peaks: dict[int, float], name: str, tree: Path = ROOT
) -> Iterator[dict[str, Any]]:
    """Run a command and yield the lines of its steps file as they come.

    Each gets `cpu_seconds`, the processor time of all its processes so far. `peaks` gets each rank's peak memory in
    GiB, start-up and saving included. Both are measured from outside, so they mean the same for every trainer.
    """
    set_by_launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in set_by_launchers}
    environment["PYTHONPATH"] = str(tree)
    read, parent, status, cpu = 0, os.getpid(), None, {}

    def children_of(process: psutil.Process) -> list[psutil.Process]:
        return process.children(recursive=True) if process.is_running() else []

    with open(log, "w", encoding="utf-8") as output:
        process = psutil.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=lambda: end_with_parent(parent),
        )  # fmt: skip
        try:
            while status is None:
                with suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
                    status = process.wait(POLL_SECONDS)
                for one in [process, *children_of(process)]:
                    with suppress(psutil.Error, OSError, TypeError):
                        rank = int(one.environ().get("RANK", 0))  # without RANK: a launcher, or the only rank
                        cpu[one.pid] = sum(one.cpu_times()[:2])
                        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{one.pid}/status").read_text())
                        peaks[rank] = max(peaks.get(rank, 0.0), int(peak[1]) / 2**20)
                text = steps_file.read_text(encoding="utf-8") if steps_file.exists() else ""
                whole = text[: text.rfind("\n") + 1]
                for line in whole[read:].splitlines():
                    yield json.loads(line) | {"cpu_seconds": sum(cpu.values())}
                read = len(whole)
        finally:
            for one in [*children_of(process), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
    if status:
        errors = [one for one in log.read_text(encoding="utf-8", errors="replace").splitlines() if "rror" in one]
        stop(f"{name} ended with status {status}; {log} says:\n" + "\n".join(errors[:8]))


def measure(case: Namespace, arms: Sequence[Arm], folder: Path, gpu: str | None = None) -> dict[str, Any]:
    """Every arm of a case, repeated in turn so that noise hits all alike; its record, see evaluate."""
    check_case(case, arms)
    folder.mkdir(parents=True, exist_ok=True)
    facts = export_rows(case, folder / "rows.parquet") | {"gpu": gpu}
    if any(arm.trainer != "dsft" for arm in arms):
        facts["trl_python"] = str(trl_environment())
    rows = f"{case.rows} rows, {facts['tokens']} tokens ({facts['targets']} targets, longest row {facts['longest']})"
    steps = f"{case.train_batch_size} rows per step, {case.epochs} epochs"
    print(f"{rows}, {steps}, {case.model}, LoRA {case.lora_rank}, {case.dtype}, {case.ranks} ranks\n", flush=True)
    results: dict[str, list[dict[str, Any]]] = {str(arm): [] for arm in arms}
    for repeat in range(case.repeats):
        for place, arm in enumerate(arms):
            results[str(arm)].append(run_arm(arm, case, facts, folder / f"arm-{place}-{repeat}"))
    return evaluate(results, case, facts)


def evaluate(results: dict[str, list[dict[str, Any]]], case: Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """Print the first losses; the case's record, in which `summary` has figures only if all losses agree."""
    table, wrong = loss_table(results, case)
    print(table + "\n", flush=True)
    summary = {} if wrong else compare(results, case, facts["tokens"])
    return {"case": vars(case), "facts": facts, "losses_disagree": wrong, "summary": summary, "runs": results}


def loss_table(results: dict[str, list[dict[str, Any]]], case: Namespace) -> tuple[str, list[str]]:
    """The first step of every arm, and the arms whose loss is not within the tolerance of the reference's.

    The first arm of TRL is the reference, or the first arm.
    """
    names = sorted(results, key=lambda name: name.startswith("dsft"))  # stable: TRL's arms first
    reference = results[names[0]][0]["steps"][0]["loss"]
    lines, wrong = ["| arm | first loss | relative | first gradient norm |", "| --- | --- | --- | --- |"], []
    for name in names:
        firsts = [run["steps"][0] for run in results[name]]
        relative = [abs(first["loss"] - reference) / abs(reference) for first in firsts]
        if not all(one <= TOLERANCE[case.dtype] for one in relative):  # NaN differs too
            wrong.append(name)
        lines.append(f"| {name} | {firsts[0]['loss']:.6f} | {max(relative):.1e} | {firsts[0]['grad_norm']:.5f} |")
    return "\n".join(lines), wrong


def summarize(runs: Sequence[dict[str, Any]], case: Namespace, tokens: int) -> dict[str, Any]:
    """One arm's figures: medians over the epochs after the first, of all repeats (of the first if there is one)."""
    size = steps_per_epoch(case)
    epochs = [[run["steps"][start : start + size] for start in range(0, len(run["steps"]), size)] for run in runs]
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
        "cpu_seconds": statistics.median(cpu) if cpu else None,
        "tokens_per_second": tokens / epoch_seconds,
        "computed_tokens": computed,
        "computed_tokens_per_second": computed / epoch_seconds,
        "peak_gib": max(gpu_peaks or (peak for run in runs for peak in run["peak_gib_by_rank"].values())),
    }


def compare(results: dict[str, list[dict[str, Any]]], case: Namespace, tokens: int) -> dict[str, dict[str, Any]]:
    """Every arm's figures, and how many times faster it is than TRL: than its fastest fsdp arm (its fastest of all, if
    there is none), and than its fastest on the same backend. Arms of trl-targets are no reference: TRL is not so.
    """
    summary = {name: summarize(runs, case, tokens) for name, runs in results.items()}
    seconds = {name: row["epoch_seconds"] for name, row in summary.items() if name.startswith("trl:")}

    def times(row: dict[str, Any], *backends: str) -> float | None:
        found = (min((s for name, s in seconds.items() if f":{backend}" in name), default=None) for backend in backends)
        fastest = next((one for one in found if one), None)
        return fastest and fastest / row["epoch_seconds"]

    for name, row in summary.items():
        row["times_trl"], row["times_trl_same_backend"] = times(row, "fsdp", ""), times(row, name.split(":")[1])
    return summary


def time_table(summary: dict[str, dict[str, Any]], extra: dict[str, dict[str, str]] | None = None) -> str:
    """The table of times as Markdown; `extra` adds columns (heading -> arm -> cell)."""
    extra = extra or {}
    reference = "TRL fsdp" if any(name.startswith("trl:fsdp") for name in summary) else "fastest TRL"
    heads = ["arm", "s per epoch", "range", "first epoch", "CPU s per epoch", "tokens/s", "computed tokens"]
    heads += ["peak GiB per rank", f"x {reference}", "x TRL same backend", *extra]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, row in summary.items():
        low, high = row["epoch_seconds_range"]
        cells = [name, f"{row['epoch_seconds']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['first_epoch_seconds']:.1f}"]
        cells += ["" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.1f}"]
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['computed_tokens']:.0f}", f"{row['peak_gib']:.2f}"]
        cells += ["" if (x := row[key]) is None else f"{x:.2f}" for key in ("times_trl", "times_trl_same_backend")]
        lines.append(f"| {' | '.join([*cells, *(column.get(name, '') for column in extra.values())])} |")
    return "\n".join(lines)


def tree_lines(summary: dict[str, dict[str, Any]]) -> list[str]:
    """This checkout's seconds and CPU seconds, relative to those of other checkouts."""
    lines = []
    for name, other in summary.items():
        arm, _, tree = name.partition("@")
        if tree and arm in summary:
            keys = [key for key in ("epoch_seconds", "cpu_seconds") if other[key]]
            ratios = ", ".join(f"{summary[arm][key] / other[key]:.3f} times the {key}" for key in keys)
            lines.append(f"{arm}: {ratios.replace('_', ' ')} of {tree}")
    return lines


def finish(records: dict[str, dict[str, Any]], json_file: str | None) -> None:
    """Write the records, then exit with status 1 if a loss disagrees: no time would mean anything."""
    if json_file:
        everything = {"command": sys.argv, "cores": os.cpu_count(), "cases": records}
        Path(json_file).write_text(json.dumps(everything, indent=2), encoding="utf-8")
    for name, record in records.items():
        if record["losses_disagree"]:
            arms, limit = ", ".join(record["losses_disagree"]), TOLERANCE[record["case"]["dtype"]]
            stop(f"no times of {name}: the first loss of {arms} differs by more than {limit:g} (relative)")


def start(options: Namespace) -> tuple[list[Arm], Path]:
    """The arms, and the folder of the runs."""
    from dsft.distributed import runtime

    arms = parse_arms(options.arms, options.trl_micro_batch)
    folder = Path(options.work_dir or tempfile.mkdtemp(prefix="dsft-bench-")).resolve()
    say(f"runs and results go to {folder}")
    runtime.silence_libraries()
    return arms, folder


def main() -> None:
    """Run all arms, compare losses, print times."""
    options = parse()
    arms, folder = start(options)
    if options.conversations:
        options.row_flags = write_conversations(folder, options.conversations)
        options.train_files = options.row_flags["train_files"]
    record = measure(options, arms, folder)
    finish({"rows": record}, options.json)
    print("\n".join([time_table(record["summary"]), *tree_lines(record["summary"])]))


if __name__ == "__main__":
    main()
