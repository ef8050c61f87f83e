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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_throughput import Arm, finish, flag_parser, measure, start, stop, time_table

from dsft.cache import build_once

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SIZES += ("vocab_size", "max_position_embeddings")
SHAPES = {
    "qwen2.5-7b-shape": dict(zip(SIZES, (3584, 28, 28, 4, 18944, 152064, 32768), strict=True)),
    "tiny-qwen2-shape": dict(zip(SIZES, (64, 2, 4, 2, 128, 49152, 4096), strict=True)),
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


def make_rows(case: str, tokenizer: Any, *, length: int, rows: int, dialogues: int, turns: int) -> list[dict[str, Any]]:
    """Rows of random words in dsft's columns."""
    import numpy as np

    from dsft.dataset.chat_format import ChatFormat
    from dsft.dataset.readers import Cell

    words = single_token_words(tokenizer)
    form = ChatFormat(tokenizer)

    def tokens_of(row: dict[str, Any]) -> int:
        rendered = form.prompt_and_response(row["prompt"], row["response"], Cell("made up", 0))
        return len(form.tokenize([rendered])[0][0].tokens)

    def words_for_length(make: Callable[[int], dict[str, Any]]) -> int:
        ten, twenty = tokens_of(make(10)), tokens_of(make(20))  # tokens grow evenly with words
        count = int(10 + (length - ten) / (twenty - ten) * 10)
        if count < 1:
            stop(f"--length {length} is too short for this case")
        return count

    made = []
    for index in range(rows if case == "single" else dialogues):
        draw = np.random.default_rng([index, len(case)])
        text = [words[i] for i in draw.integers(0, len(words), length + 40 * turns)]
        if case == "single":
            made.append(single_row(text, words_for_length(partial(single_row, text))))
        else:
            count = words_for_length(partial(dialogue_row, text, turn=turns, turns=turns))
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


def single_token_words(tokenizer: Any) -> list[str]:
    """Words that are one token at a text's start and after a space."""
    vocabulary = tokenizer.get_vocab()
    words = (w for w in sorted(vocabulary) if w.isascii() and w.isalpha() and w.islower() and len(w) > 2)

    def is_one_token(text: str) -> bool:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1

    return list(itertools.islice((w for w in words if is_one_token(w) and is_one_token(f" {w}")), 1000))


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
    """The GPU's peak in bfloat16, None if unknown, or on CPU."""
    return given or next((peak for part, peak in PEAK_TFLOPS.items() if name and part in name), None)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = flag_parser(__doc__, "dsft:fsdp:batch,dsft:fsdp:off,dsft:zero3:batch,trl:plain,trl:zero3")
    parser.add_argument("--cases", default=",".join(CASES), help="any of single, turns")
    parser.add_argument("--length", type=int, help="tokens of the longest row (default: 4096; 256 on CPU)")
    parser.add_argument("--rows", type=int, default=16, help="rows of the case single, one optimizer step")
    parser.add_argument("--dialogues", type=int, default=4, help="dialogues of the case turns, one optimizer step")
    parser.add_argument("--turns", type=int, default=8, help="rows of each dialogue")
    parser.add_argument("--peak_tflops", type=float, help="of the GPU in bfloat16, if this script does not know it")
    return parser.parse_args()


def run_case(name: str, arms: list[Arm], options: argparse.Namespace, folder: Path, gpu: str | None) -> dict[str, Any]:
    """One case: model, rows, all arms; its record."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    shape = "qwen2.5-7b-shape" if gpu else "tiny-qwen2-shape"
    length = options.length or (4096 if gpu else 256)
    model = random_model(shape)
    sizes = {"rows": options.rows, "dialogues": options.dialogues, "turns": options.turns}
    rows = make_rows(name, AutoTokenizer.from_pretrained(model), length=length, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    print(f"{name}, {shape}:", flush=True)
    values = {"rows": len(rows), "train_batch_size": len(rows), "max_length": length, "ranks": 1}
    values |= {"model": str(model), "train_files": str(folder / "data.parquet"), "trl_sampling": "sequential"}
    case = argparse.Namespace(**vars(options) | values, dtype="bfloat16" if gpu else "float32")
    record = measure(case, arms, folder, gpu)
    record["facts"]["shape"] = shape
    return record


def add_mfu(record: dict[str, Any], peak: Any) -> dict[str, dict[str, str]]:
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
    arms, folder = start(options)
    gpu = gpu_name()
    print(f"GPU: {gpu or 'none found; a tiny model on CPU'}\n")
    records = {name: run_case(name, arms, options, folder / name, gpu) for name in cases}
    columns = {name: add_mfu(record, gpu and peak_tflops(gpu, options.peak_tflops)) for name, record in records.items()}
    finish(records, options.json)
    for name, record in records.items():
        table = time_table(record["summary"], columns[name])
        print(f"{name}, {record['facts']['shape']}, on {gpu or 'CPU'}:\n\n{table}\n")
        if gpu is None:
            print(f"{name}, qwen2.5-7b-shape, on a GPU:\n\n| arm | tokens/s | MFU |\n| --- | --- | --- |")
            print("".join(f"| {arm} | unmeasured | unmeasured |\n" for arm in arms))
    print(PUBLISHED)


if __name__ == "__main__":
    main()
