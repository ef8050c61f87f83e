#!/usr/bin/env python
"""Tokens per second and MFU of a 7 B model on one CUDA GPU, dsft beside TRL's SFTTrainer.

    python scripts/bench_gpu.py --json gpu.json
    python scripts/bench_gpu.py --cases turns --arms dsft:fsdp:batch,trl:plain --epochs 2

The model has the shape of Qwen2.5-7B and random weights (15 GB, written to the cache folder once), with LoRA on all
linear layers. Two cases of random words, in bfloat16:

    single    rows of exactly --length tokens that share no text, nearly all of them targets
    turns     dialogues of --turns rows, each the row before plus a turn, up to --length tokens; folding computes each
              dialogue once, 4.5 times fewer tokens with 8 turns

Losses are compared before times are shown, as in bench_throughput.py. MFU counts what LoRA needs: two multiply-adds a
frozen weight and token (forward, and the gradient to the inputs), the head on targets only, causal attention three
times; of the tokens that were computed. A published figure stands beside it: NVIDIA NeMo Automodel, Qwen2.5-7B LoRA,
4,096 tokens a row, one H100.

Without a CUDA GPU the same runs with a tiny model on CPU, which shows that it works; the GPU's rows are 'unmeasured'.
"""

import argparse
import itertools
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import (
    Arm,
    Case,
    check_case,
    describe,
    export_rows,
    finish,
    judge,
    numbers,
    parse_arms,
    positive,
    run_all,
    say,
    stop,
    time_table,
    trl_environment,
)

from dsft.cache import build_once

DEFAULT_ARMS = "dsft:fsdp:batch,dsft:fsdp:off,dsft:zero3:batch,trl:plain,trl:zero3"
SHAPES = {
    "qwen2.5-7b-shape": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
    "tiny-qwen2-shape": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 49152,
        "max_position_embeddings": 4096,
    },
}
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "A100": 312.0}  # dense bfloat16
PUBLISHED = "| published: NeMo Automodel, Qwen2.5-7B LoRA, one H100 | 14110 tokens/s | 42.8 % of peak |"
CASES = ("single", "turns")


def random_model(name: str) -> Path:
    """A folder with config, random bfloat16 safetensors and the embedded model's tokenizer; made once."""

    def build(folder: Path) -> None:
        process = multiprocessing.get_context("spawn").Process(target=write_model, args=(name, folder))
        process.start()
        process.join()
        if process.exitcode:
            stop(f"the model {name} could not be written to {folder}")

    return build_once(f"models/bench-{name}-1", build)


def write_model(name: str, folder: Path) -> None:
    """In a process of its own, which gives the GPU's memory back at its end."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from dsft.distributed import runtime
    from dsft.model.embedded import embedded_model

    runtime.silence_libraries()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    special = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen2Config(**SHAPES[name], tie_word_embeddings=False, use_cache=False, **special)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Rows


def make_rows(case: str, tokenizer: Any, *, length: int, rows: int, dialogues: int, turns: int) -> list[dict[str, Any]]:
    """Rows of random words in dsft's columns."""
    import numpy as np

    from dsft.dataset.chat_format import ChatFormat
    from dsft.dataset.readers import Cell

    words = single_token_words(tokenizer)
    form = ChatFormat(tokenizer)

    def tokens_of(row: dict[str, Any]) -> int:
        segments = form.prompt_and_response(row["prompt"], row["response"], Cell("made up", 0))
        return len(form.tokenize([segments])[0][0])

    made = []
    for index in range(rows if case == "single" else dialogues):
        draw = np.random.default_rng([index, len(case)])
        text = [words[i] for i in draw.integers(0, len(words), length + 40 * turns)]
        if case == "single":
            made.append(fit(length, lambda count, text=text: single_row(text, count), tokens_of))
        else:
            last = fit(length, lambda count, text=text: dialogue_row(text, count, turns, turns), tokens_of)
            count = len(last["response"].split())
            made += [dialogue_row(text, count, turn, turns) for turn in range(1, turns + 1)]
    return made


def single_row(text: list[str], count: int) -> dict[str, Any]:
    """A short question and an answer of `count` words; what a template would put before all rows is replaced."""
    prompt = [{"role": "system", "content": " ".join(text[-8:])}, {"role": "user", "content": "Tell me"}]
    return {"prompt": prompt, "response": " ".join(text[:count])}


def dialogue_row(text: list[str], count: int, turn: int, turns: int) -> dict[str, Any]:
    """The first `turn` turns of a dialogue; each asks `count` words and answers as many."""
    parts = [" ".join(text[start : start + count]) for start in range(0, 2 * count * turns, count)]
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": part} for role, part in zip(roles, parts[: 2 * turn], strict=False)]
    return {"prompt": messages[:-1], "response": messages[-1]["content"]}


def fit(
    length: int, make: Callable[[int], dict[str, Any]], tokens_of: Callable[[dict[str, Any]], int]
) -> dict[str, Any]:
    """The row of the most words that has at most `length` tokens: tokens grow evenly with words."""
    ten, twenty = tokens_of(make(10)), tokens_of(make(20))
    a_word = (twenty - ten) / 10
    count = int(10 + (length - ten) / a_word)
    if count < 1:
        stop(f"--length {length} is too short for this case")
    return make(count)


def single_token_words(tokenizer: Any) -> list[str]:
    """Words that are one token at a text's start and after a space."""
    vocabulary = tokenizer.get_vocab()
    words = sorted(
        word for word in vocabulary if word.isascii() and word.isalpha() and word.islower() and len(word) > 2
    )
    found = []
    for word in words:
        if all(len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1 for text in (word, f" {word}")):
            found.append(word)
        if len(found) == 1000:
            break
    return found


# Work


def flops_per_token(shape: dict[str, int], lora_rank: int, mean_length: float, target_share: float) -> float:
    """Floating-point operations that LoRA training needs for one token, a multiply-add as two."""
    hidden, layers, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linear = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
    frozen = layers * sum(a * b for a, b in linear) + hidden * shape["vocab_size"] * target_share
    trained = layers * lora_rank * sum(a + b for a, b in linear)
    attention = layers * 2 * hidden * mean_length / 2  # scores and their sum of values, half of them masked
    return 4 * frozen + 6 * trained + 6 * attention


def gpu_name() -> str | None:
    """The first CUDA GPU, if there is one; asked in another process, so that this one takes none of its memory."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() or None


def peak_tflops(name: str | None, given: float | None) -> float | None:
    """The GPU's peak in bfloat16, as far as it is known."""
    return given or next((peak for part, peak in PEAK_TFLOPS.items() if name and part in name), None)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="any of single, turns")
    parser.add_argument(
        "--arms", default=DEFAULT_ARMS, help="dsft:BACKEND[:FOLD] and trl:BACKEND[:ROWS], comma-separated"
    )
    parser.add_argument("--length", type=positive, help="tokens of the longest row (default: 4096; 256 on CPU)")
    parser.add_argument("--rows", type=positive, default=16, help="rows of the case single, one optimizer step")
    parser.add_argument("--dialogues", type=positive, default=4, help="dialogues of the case turns, one optimizer step")
    parser.add_argument("--turns", type=positive, default=8, help="rows of each dialogue")
    parser.add_argument("--epochs", type=positive, default=3, help="the first one warms up, where there are more")
    parser.add_argument("--lora_rank", type=positive, default=16)
    parser.add_argument("--lora_alpha", type=positive, default=32)
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="in all arms (else: as dsft decides, none in TRL)"
    )
    parser.add_argument("--dsft_tokens", type=positive, help="dsft's --max_tokens_per_micro_batch (default: its own)")
    parser.add_argument("--trl_micro_batch", type=numbers, default=[1], help="rows a micro-batch; 1,2 tries several")
    parser.add_argument("--peak_tflops", type=float, help="of the GPU in bfloat16, where this script does not know it")
    parser.add_argument("--repeats", type=positive, default=1, help="runs of each arm, in turn")
    parser.add_argument("--work_dir", help="keeps runs and results; a later call with it measures only what is missing")
    parser.add_argument("--json", help="where everything goes as JSON")
    return parser.parse_args()


def run_case(
    name: str, arms: list[Arm], options: argparse.Namespace, work_dir: Path, gpu: str | None
) -> dict[str, Any]:
    """One case: rows, all arms, its record."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    shape = "qwen2.5-7b-shape" if gpu else "tiny-qwen2-shape"
    length = options.length or (4096 if gpu else 256)
    model = random_model(shape)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"rows": options.rows, "dialogues": options.dialogues, "turns": options.turns}
    rows = make_rows(name, tokenizer, length=length, **sizes)
    folder = work_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    case = Case(
        model=str(model),
        train_files=str(folder / "data.parquet"),
        rows=len(rows),
        train_batch_size=len(rows),
        epochs=options.epochs,
        max_length=length,
        dtype="bfloat16" if gpu else "float32",
        ranks=1,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        gradient_checkpointing=options.gradient_checkpointing,
        max_tokens_per_micro_batch=options.dsft_tokens,
        sampling="sequential",
    )
    check_case(case, arms)
    facts = export_rows(case, folder / "rows.parquet")
    facts |= {"rows_file": str(folder / "rows.parquet"), "gpu": gpu, "shape": shape}
    lengths = np.array([len(ids) for ids in pq.read_table(facts["rows_file"])["input_ids"].to_pylist()])
    facts["mean_length"] = float((lengths**2).sum() / lengths.sum())  # of the row in which a token stands
    if any(not arm.is_dsft for arm in arms):
        facts["trl_python"] = trl_environment()
    print(f"{name}: {describe(case, facts)}\n", flush=True)
    return judge(run_all(arms, case, options.repeats, folder, facts), case, facts)


def add_mfu(record: dict[str, Any], peak: float | None) -> dict[str, dict[str, str]]:
    """MFU into the record's summary; the column for the table."""
    facts, rank = record["facts"], record["case"]["lora_rank"]
    column = {}
    for arm, row in record["summary"].items():
        share = facts["targets"] / row["computed_tokens"]
        flops = flops_per_token(SHAPES[facts["shape"]], rank, facts["mean_length"], share)
        row["mfu"] = flops * row["computed_tokens_per_second"] / (peak * 1e12) if peak else None
        column[arm] = f"{row['mfu']:.1%}" if peak else "unmeasured"
    return {"MFU": column}


def main() -> None:
    """Run the cases, compare losses, print times."""
    options = parse()
    cases = options.cases.split(",")
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        stop(f"--cases: '{unknown[0]}' is none of {', '.join(CASES)}")
    arms = parse_arms(options.arms, options.trl_micro_batch)
    work_dir = Path(options.work_dir or tempfile.mkdtemp(prefix="dsft-bench-")).resolve()
    say(f"runs and results stand in {work_dir}")
    gpu = gpu_name()
    from dsft.distributed import runtime

    runtime.silence_libraries()
    print(f"GPU: {gpu or 'none found; a tiny model on CPU'}\n")
    records = {name: run_case(name, arms, options, work_dir, gpu) for name in cases}
    peak = peak_tflops(gpu, options.peak_tflops) if gpu else None
    columns = {name: add_mfu(record, peak) for name, record in records.items()}
    finish(records, options.json)
    for name, record in records.items():
        print(f"{name}, {record['facts']['shape']}, on {gpu or 'CPU'}:\n")
        print(time_table(record["summary"], columns[name]) + "\n")
        if gpu is None:
            print(unmeasured(name, arms) + "\n")
    print(PUBLISHED)


def unmeasured(name: str, arms: list[Arm]) -> str:
    """The GPU's table where there is none."""
    lines = [f"{name}, qwen2.5-7b-shape, on a GPU:", "", "| arm | tokens/s | MFU |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {arm} | unmeasured | unmeasured |" for arm in arms)])


if __name__ == "__main__":
    main()
