"""A run that is killed and started again gives the numbers of one that was not, bit for bit."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT, SAMPLE_TRAIN, flags, metrics, run, start_words, write_parquet

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
    [("fsdp", 1, 4), ("fsdp", 2, 4), ("fsdp", 2, 0), ("zero3", 1, 4), ("zero3", 2, 4), ("zero3", 2, 0)],
)
@pytest.mark.slow
def test_sigkill_after_step_2_then_resume(backend, ranks, lora_rank, tiny_model, tmp_path, port):
    words = [
        *start_words(backend, ranks, port),
        *flags(
            model=tiny_model, train_files=SAMPLE_TRAIN, val_files=SAMPLE_TRAIN, max_val_rows=9, dtype="float32",
            lora_rank=lora_rank, lora_dropout=0.1 if lora_rank else 0, lr=1e-3, train_batch_size=24,
            total_training_steps=4, save_steps=1,
        ),
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run([*words, "--output_dir", whole]).status == 0
    kill_after_checkpoint([*words, "--output_dir", broken], broken / "checkpoint-000002")
    for later in ("checkpoint-000003", "checkpoint-000004"):  # the kill may have come late
        shutil.rmtree(broken / later, ignore_errors=True)
    (broken / ".checkpoint-000003.tmp").mkdir(exist_ok=True)  # or in the middle of a save
    done = run([*words, "--output_dir", broken])
    assert done.status == 0, done.err
    assert "resumed" in done.out
    assert "goes on at step 3" in done.out
    assert numbers(broken) == numbers(whole)
    assert validations(broken) == validations(whole)
    assert not list(broken.glob(".*tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(("fsdp", 2), ("zero3", 1)), (("zero3", 2), ("fsdp", 1))])
def test_resume_on_the_other_backend_with_other_ranks_and_micro_batches(first, then, tiny_model, tmp_path, port):
    words = flags(
        model=tiny_model, train_files=SAMPLE_TRAIN, dtype="float32", lora_rank=4, lr=1e-3, train_batch_size=24,
        total_training_steps=4, save_steps=2,
    )  # fmt: skip
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert run([*start_words(*first, port), *words, "--output_dir", whole]).status == 0
    shutil.copytree(whole, changed, symlinks=True)
    shutil.rmtree(changed / "checkpoint-000004")
    other = ["--max_tokens_per_micro_batch", "400", "--gradient_checkpointing", "--output_dir", changed]
    done = run([*start_words(*then, port), *words, *other])
    assert done.status == 0, done.err
    assert "micro-batches of at most 400 tokens" in done.out
    for ours, theirs in zip(numbers(changed), numbers(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing(tiny_model, tmp_path):
    words = [
        *start_words("fsdp", 1),
        *flags(model=tiny_model, train_files=SAMPLE_TRAIN, max_train_rows=8, train_batch_size=4, output_dir=tmp_path),
    ]
    assert run(words).status == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    done = run(words)
    assert done.status == 0, done.err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_best_is_the_lowest_validation_loss_and_rotation_keeps_it(tiny_model, tmp_path):
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
    assert run(words).status == 0
    out = tmp_path / "out"
    losses = dict(validations(out))
    best = min(losses, key=losses.__getitem__)
    assert best not in (5, 6), "the loss was meant to rise"
    assert (out / "best").resolve().name == f"checkpoint-{best:06d}"
    assert (out / "latest").resolve().name == "checkpoint-000006"
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == [f"checkpoint-{best:06d}", "checkpoint-000006"]


@pytest.mark.slow
def test_sigkill_of_the_embedded_model_then_resume(tmp_path, port):
    """On one backend: a minute and a half. The tiny model's tests have both."""
    words = [
        *start_words("zero3", 2, port),
        *flags(
            model="smollm2-135m", train_files=SAMPLE_TRAIN, dtype="float32", lora_rank=8, train_batch_size=2,
            total_training_steps=3, save_steps=2, max_train_rows=6,
        ),
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run([*words, "--output_dir", whole]).status == 0
    kill_after_checkpoint([*words, "--output_dir", broken], broken / "checkpoint-000002")
    done = run([*words, "--output_dir", broken])
    assert done.status == 0, done.err
    assert "goes on at step 3" in done.out
    assert numbers(broken) == numbers(whole)
