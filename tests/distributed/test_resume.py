"""A run that is killed and started again gives the numbers of one that was not, bit for bit."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT, SAMPLE_TRAIN, flags, metrics, start_words, write_parquet

COMPARED = ("step", "epoch", "train/loss", "train/grad_norm", "train/lr", "train/targets", "train/tokens")


def numbers(output_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in COMPARED) for line in metrics(output_dir)]


def validations(output_dir: Path) -> list[tuple]:
    return [(line["step"], line["val/loss"]) for line in metrics(output_dir, "val/loss")]


def kill_after_checkpoint(words: list, checkpoint: Path) -> None:
    """Start a command and SIGKILL it, launcher and ranks, as soon as a checkpoint is complete."""
    process = psutil.Popen(
        list(map(str, words)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (checkpoint / "COMPLETE").exists():
        assert process.poll() is None, "the run ended before the checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    everything = [process, *process.children(recursive=True)]  # a launcher's ranks have sessions of their own
    for one in everything:
        one.kill()
    psutil.wait_procs(everything, timeout=30)


@pytest.mark.parametrize(
    ("backend", "ranks", "lora_rank"),
    [("fsdp", 2, 0), ("zero3", 2, 4)],  # one rank: the fault drills
)
@pytest.mark.slow
def test_sigkill_after_step_2_then_resume(commands, backend, ranks, lora_rank, tiny_model, tmp_path, port):
    words = [
        *start_words(backend, ranks, port),
        *flags(
            model=tiny_model, train_files=SAMPLE_TRAIN, val_files=SAMPLE_TRAIN, max_val_rows=9, dtype="float32",
            lora_rank=lora_rank, lora_dropout=0.1 if lora_rank else 0, lr=1e-3, train_batch_size=24,
            total_training_steps=4, save_steps=1, async_save=lora_rank > 0,
        ),
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert commands([*words, "--output_dir", whole]).status == 0
    kill_after_checkpoint([*words, "--output_dir", broken], broken / "checkpoint-000002")
    for later in ("checkpoint-000003", "checkpoint-000004"):  # the kill may have come late
        shutil.rmtree(broken / later, ignore_errors=True)
    (broken / ".checkpoint-000003.tmp").mkdir(exist_ok=True)  # or in the middle of a save
    done = commands([*words, "--output_dir", broken])
    assert done.status == 0, done.err
    assert "resumed" in done.out
    assert "resuming at step 3" in done.out
    assert numbers(broken) == numbers(whole)
    assert validations(broken) == validations(whole)
    assert not list(broken.glob(".*tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_a_run_over_backends_nodes_and_sharding_is_that_of_one_start(commands, lora_rank, tiny_model, tmp_path):
    words = flags(
        model=tiny_model, train_files=SAMPLE_TRAIN, val_files=SAMPLE_TRAIN, max_val_rows=9, dtype="float32",
        lora_rank=lora_rank, lr=1e-3, train_batch_size=24, total_training_steps=8, eval_steps=2, save_steps=0,
    )  # fmt: skip
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert commands([*start_words("fsdp", 2), *words, "--output_dir", whole]).status == 0
    starts: list[tuple[str, str, int, int, list]] = [
        ("fsdp", "hybrid", 4, 2, ["--stop_after_steps", 2, "--async_save"]),
        ("zero3", "trainable", 2, 1, ["--stop_after_steps", 4, "--max_tokens_per_micro_batch", 400]),
        ("zero3", "hybrid", 4, 2, ["--stop_after_steps", 6]),
        ("fsdp", "full", 1, 1, ["--gradient_checkpointing"]),
    ]
    for index, (backend, sharding, ranks, nodes, more) in enumerate(starts):
        typed = ["--backend", backend, "--sharding", sharding, *words, *more, "--output_dir", changed]
        done = commands.run("dsft.train", typed, ranks=ranks, nodes=nodes)
        assert done.status == 0, done.err
        assert index == 0 or f"resuming at step {2 * index + 1}" in done.out
        assert index == 3 or f"stopped by --stop_after_steps {2 * index + 2} after step {2 * index + 2}" in done.out
    for ours, theirs in zip(numbers(changed), numbers(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(validations(changed), validations(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_a_second_stage_starts_from_weights_alone(commands, tiny_model, tmp_path):
    """From LoRA weights, and with new LoRA from their merged model: the first validation is the last one's."""
    common = flags(
        model=tiny_model, train_files=SAMPLE_TRAIN, val_files=SAMPLE_TRAIN, max_val_rows=9, dtype="float32", lr=1e-2,
        warmup_ratio=0, train_batch_size=24, total_training_steps=2,
    )  # fmt: skip
    words = [*start_words("fsdp", 1), *common]
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    assert commands([*words, "--lora_rank", 4, "--output_dir", first]).status == 0
    [(_, reached)] = validations(first)
    more = ["--validate_before_training", "--init_from", first]
    of_second = [*start_words("zero3", 1), *common, "--lora_rank", 4, "--output_dir", second, *more]
    assert commands([*of_second, "--stop_after_steps", 1]).status == 0
    first.rename(tmp_path / "away")  # the second stage has weights of its own by now
    done = commands(of_second)
    assert done.status == 0, done.err
    (tmp_path / "away").rename(first)
    assert validations(second)[0] == pytest.approx((0, reached), rel=1e-6)
    assert metrics(second)[0]["train/lr"] == metrics(first)[0]["train/lr"]
    assert validations(second)[-1][1] < reached
    assert commands([sys.executable, "-m", "dsft.merge", "--checkpoint", first, "--dtype", "float32"]).status == 0
    more = ["--validate_before_training", "--init_from", first / "merged"]
    assert commands([*words, "--lora_rank", 2, "--output_dir", third, *more]).status == 0
    assert validations(third)[0] == pytest.approx((0, reached), rel=1e-5)
    adapter = json.loads((third / "latest" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(first / "merged")
    done = commands([*words, "--lora_rank", 8, "--output_dir", tmp_path / "no", "--init_from", first])
    assert done.status == 1
    assert done.errors == [
        f"error: --init_from {first}: its weights were trained with --lora_rank 4; give the same values"
    ]


@pytest.mark.slow
def test_other_flags_only_by_override_and_steps_taken_again_set_later_checkpoints_aside(commands, tiny_model, tmp_path):
    words = [
        *start_words("fsdp", 1),
        *flags(
            model=tiny_model, train_files=SAMPLE_TRAIN, dtype="float32", lora_rank=4, train_batch_size=24, lr=1e-3,
            total_training_steps=4, save_steps=1, schedule="constant", warmup_ratio=0, output_dir=tmp_path,
        ),
    ]  # fmt: skip
    assert commands([*words, "--stop_after_steps", 3]).status == 0
    other = [*words, "--lr", "2e-3", "--resume", tmp_path / "checkpoint-000002"]
    done = commands(other)
    assert done.status == 1
    (error,) = done.errors
    assert "lr was 0.001, is 0.002" in error
    assert "--resume_override lr" in error
    done = commands([*other, "--resume_override", "lr"])
    assert done.status == 0, done.err
    assert "checkpoint-000003 is of steps that are taken again from checkpoint-000002" in done.err
    assert [line["train/lr"] for line in metrics(tmp_path)] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-000001",
        "checkpoint-000002",
        "checkpoint-000003",
        "checkpoint-000003.superseded",
        "checkpoint-000004",
    ]


@pytest.mark.slow
def test_saving_by_time(commands, tiny_model, tmp_path):
    words = [
        *start_words("fsdp", 1),
        *flags(
            model=tiny_model, train_files=SAMPLE_TRAIN, dtype="float32", lora_rank=4, train_batch_size=91,
            total_training_steps=12, save_steps=0, save_seconds=1, output_dir=tmp_path,
        ),
    ]  # fmt: skip
    done = commands(words)
    assert done.status == 0, done.err
    steps = [int(p.name[-6:]) for p in sorted(tmp_path.glob("checkpoint-*"))]
    assert steps[-1] == 12
    assert len(steps) >= 3
    ends = {line["step"]: line["train/step_seconds"] for line in metrics(tmp_path)}
    for before, after in itertools.pairwise([0, *steps[:-1]]):
        assert sum(ends[step] for step in range(before + 1, after)) < 1.5


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing(commands, tiny_model, tmp_path):
    words = [
        *start_words("fsdp", 1),
        *flags(model=tiny_model, train_files=SAMPLE_TRAIN, max_train_rows=8, train_batch_size=4, output_dir=tmp_path),
    ]
    assert commands(words).status == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    done = commands(words)
    assert done.status == 0, done.err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_best_is_the_lowest_validation_loss_and_rotation_keeps_it(commands, tiny_model, tmp_path):
    """Training to say something else makes the validation loss rise again: best is not latest."""
    train = [{"prompt": f"say it {i}", "response": "yes yes yes yes yes"} for i in range(24)]
    val = [{"prompt": f"say it {i}", "response": "quantum chromodynamics in vacuo"} for i in range(4)]
    words = [
        *start_words("fsdp", 1),
        *flags(
            model=tiny_model, train_files=write_parquet(tmp_path / "train.parquet", train),
            val_files=write_parquet(tmp_path / "val.parquet", val), dtype="float32", lora_rank=4, lr=0.5,
            warmup_ratio=0, train_batch_size=4, save_steps=1, eval_steps=1, max_checkpoints=1,
            output_dir=tmp_path / "out",
        ),
    ]  # fmt: skip
    assert commands(words).status == 0
    out = tmp_path / "out"
    losses = dict(validations(out))
    best = min(losses, key=losses.__getitem__)
    assert best not in (5, 6), "the loss was meant to rise"
    assert (out / "best").resolve().name == f"checkpoint-{best:06d}"
    assert (out / "latest").resolve().name == "checkpoint-000006"
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == [f"checkpoint-{best:06d}", "checkpoint-000006"]
