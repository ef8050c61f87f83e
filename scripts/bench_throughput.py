#!/usr/bin/env python
"""dsft beside TRL's SFTTrainer: the same rows, model, LoRA, batch and ranks, under FSDP2 and under ZeRO-3.

    python scripts/bench_throughput.py --train_files data/sample_train.parquet --rows 64 --json table.json
    python scripts/bench_throughput.py --rows 8 --epochs 2 --arms dsft:fsdp:batch,trl:fsdp     # a quick look
    python scripts/bench_throughput.py --train_files FILE --rows 128 --epochs 1 --dsft_tokens 2048   # peak memory

All arms train the same tokens, in the same global batches. The loss of the first step must be the same in all of them
(1e-4 in float32, 1e-2 in bfloat16, relative); otherwise no time is printed and the status is 1. Times are those of the
optimizer steps, without start-up and saving: the median of the epochs after the first. Peak memory is the resident
memory of the largest rank as the kernel counts it, start-up included. CPU seconds are those of all ranks together, the
same median: on a machine that others use too they say more than the clock.

TRL runs in a virtual environment of its own in the cache folder, which the first call makes (10 MB, it borrows dsft's
torch, transformers, peft, accelerate and deepspeed). Its settings are those with which it is fastest: no gradient
checkpointing, sdpa, rows of like length together, no data-loader processes, bf16 over a bfloat16 model with float32
LoRA, and for ZeRO-3 dsft's own ds_configs/zero3.json.
On CPU, TRL computes the logits of every position, on GPUs only those of targets; the arms trl-targets:fsdp and
trl-targets:zero3 let it do so on CPU too.
"""

import argparse
import tempfile
from pathlib import Path

from bench_common import (
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
    time_table,
    trl_environment,
)

DEFAULT_ARMS = "dsft:fsdp,dsft:zero3,trl:fsdp,trl:zero3"


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", default=DEFAULT_ARMS, help="dsft:BACKEND[:FOLD] and trl:BACKEND[:ROWS], comma-separated"
    )
    parser.add_argument("--train_files", default="data/sample_train.parquet", help="parquet, as for dsft.train")
    parser.add_argument("--rows", type=positive, default=64, help="use the first N rows")
    parser.add_argument("--train_batch_size", type=positive, help="rows an optimizer step (default: all rows)")
    parser.add_argument("--epochs", type=positive, default=3, help="the first one warms up, where there are more")
    parser.add_argument("--max_length", type=positive, default=2048, help="no row may be longer")
    parser.add_argument("--model", default="smollm2-135m", help="as for dsft.train")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ranks", type=positive, default=2, help="processes")
    parser.add_argument("--lora_rank", type=positive, default=16)
    parser.add_argument("--lora_alpha", type=positive, default=32)
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="in all arms (else: as dsft decides, none in TRL)"
    )
    parser.add_argument("--dsft_tokens", type=positive, help="dsft's --max_tokens_per_micro_batch (default: its own)")
    parser.add_argument("--trl_micro_batch", type=numbers, default=[1], help="rows a micro-batch; 1,2,4 tries several")
    parser.add_argument(
        "--trl_sampling",
        choices=("sequential", "group_by_length", "batch_rebalance"),
        default="sequential",
        help="TRL's order of rows; sequential takes those of a global batch longest first",
    )
    parser.add_argument("--repeats", type=positive, default=1, help="runs of each arm, in turn")
    parser.add_argument("--work_dir", help="keeps runs and results; a later call with it measures only what is missing")
    parser.add_argument("--json", help="where everything goes as JSON")
    return parser.parse_args()


def main() -> None:
    """Run all arms, compare losses, print times."""
    options = parse()
    from dsft.distributed import runtime

    arms = parse_arms(options.arms, options.trl_micro_batch)
    case = Case(
        model=options.model,
        train_files=options.train_files,
        rows=options.rows,
        train_batch_size=options.train_batch_size or options.rows,
        epochs=options.epochs,
        max_length=options.max_length,
        dtype=options.dtype,
        ranks=options.ranks,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        gradient_checkpointing=options.gradient_checkpointing,
        max_tokens_per_micro_batch=options.dsft_tokens,
        sampling=options.trl_sampling,
    )
    check_case(case, arms)
    work_dir = Path(options.work_dir or tempfile.mkdtemp(prefix="dsft-bench-")).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    say(f"runs and results stand in {work_dir}")
    runtime.silence_libraries()
    rows_file = work_dir / "rows.parquet"
    facts = export_rows(case, rows_file) | {"rows_file": str(rows_file), "gpu": False}
    if any(not arm.is_dsft for arm in arms):
        facts["trl_python"] = trl_environment()
    print(f"{describe(case, facts)}\n")
    results = run_all(arms, case, options.repeats, work_dir, facts)
    records = {"rows": judge(results, case, facts)}
    finish(records, options.json)
    print(time_table(records["rows"]["summary"]))


if __name__ == "__main__":
    main()
