"""python -m dsft.checkpoint, as a user types it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsft.checkpointing.folder import CheckpointFolder
from tests.helpers import BIN, ROOT, Done, contents, run

SECONDS = 5  # of a busy machine; it loads no torch


def checkpoint(*words: object) -> Done:
    done = run([BIN / "python", "-m", "dsft.checkpoint", *words])
    assert "Traceback" not in done.err
    assert done.seconds < SECONDS
    return done


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))


@pytest.fixture
def out(trained_runs, tmp_path) -> Path:
    return trained_runs.copy("lora", tmp_path / "run")


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["checkpoint-000001", "latest"])
def test_a_sound_checkpoint(trained_runs, kind, name):
    path = trained_runs.folder(kind) / name
    before = contents(path)
    done = checkpoint(path)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    step = 1 if name == "checkpoint-000001" else 2
    assert lines[0] == f"checkpoint  {path.resolve()}"
    assert lines[1] == f"step        {step} of 2"
    assert lines[-1] == "checksums   all files are intact"
    for part in ("backend     fsdp, ranks: 1", "batch       4 rows", "lr          0.001, cosine", "seed        1"):
        assert part in done.out
    for label in ("train/loss", "val/loss"):
        assert re.search(rf"^{label} +\d+\.\d{{6}}$", done.out, re.M)
    if kind == "lora":
        assert "LoRA        rank 4, alpha 32.0, all-linear\n" in done.out
        assert re.search(r"^adapter_model\.safetensors +[\d.]+ KiB +28 +4,096$", done.out, re.M)
        assert re.search(r"^optimizer\.safetensors +[\d.]+ KiB +56 +8,192$", done.out, re.M)
    else:
        assert "LoRA        none: full fine-tuning\n" in done.out
        assert re.search(r"^model\.safetensors +6\.1 MiB +20 +1,591,456$", done.out, re.M)
        assert re.search(r"^optimizer\.safetensors +12\.1 MiB +40 +3,182,912$", done.out, re.M)
    assert all(name in done.out for name in before)
    assert contents(path) == before


def test_a_run(out):
    run_folder = CheckpointFolder(out)
    run_folder.set_aside(shutil.copytree(out / "checkpoint-000002", out / "checkpoint-000003"), "superseded")
    run_folder.begin(4)
    before = contents(out)
    done = checkpoint(out)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[:3] == [f"run         {out}", "step        2 of 2", ""]
    rows = [re.split(r"  +", line) for line in done.out.splitlines()[3:]]
    assert rows[0] == ["checkpoint", "step", "epoch", "val/loss", "size"]
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [
        ("checkpoint-000001", "1", "intact"),
        ("checkpoint-000002", "2", "intact"),
        ("checkpoint-000003.superseded", "2", "set aside: superseded"),
        (".checkpoint-000004.tmp", "-", "incomplete"),
    ]
    assert rows[2][-2] == "best, latest"
    assert contents(out) == before


def test_a_damaged_checkpoint_is_told_in_the_table_and_in_one_line_with_status_1(out):
    path = out / "checkpoint-000002" / "optimizer.safetensors"
    flip(path)
    before = contents(out)
    wrong = "is damaged: its checksum does not match"
    for given in (out / "checkpoint-000002", out / "latest"):
        done = checkpoint(given)
        assert (done.status, done.err) == (1, f"error: {path} {wrong}\n")
        assert re.search(rf"^optimizer\.safetensors .* {wrong}$", done.out, re.M)
        assert done.out.splitlines()[-1] == "checksums   1 of 10 files are damaged"
    done = checkpoint("--checkpoint", out)
    assert (done.status, done.err) == (1, f"error: {path} {wrong}\n")
    assert re.search(rf"^checkpoint-000002 .* best, latest  optimizer\.safetensors {wrong}$", done.out, re.M)
    assert re.search(r"^checkpoint-000001 .* intact$", done.out, re.M)
    assert contents(out) == before


def test_without_verifying_nothing_is_read(out):
    flip(out / "checkpoint-000002" / "optimizer.safetensors")
    for words in (["--verify", "False"], ["--noverify"]):
        done = checkpoint(out, *words)
        assert (done.status, done.err) == (0, "")
        assert done.out.count("not verified") == 2
        done = checkpoint(out / "checkpoint-000002", *words)
        assert (done.status, done.err) == (0, "")
        assert done.out.splitlines()[-1] == "checksums   not verified (--verify False)"


def test_both_of_a_runs_checkpoints_are_damaged(out):
    for name in ("checkpoint-000001", "checkpoint-000002"):
        replace(out / name / "config.yaml", b"")
    done = checkpoint(out)
    assert done.status == 1
    wrong = "config.yaml is damaged: its checksum does not match (and 1 more)"
    assert done.errors == [f"error: {out}/checkpoint-000001/{wrong}"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--checkpoint is required: A checkpoint or a run's output folder."),
        (["/no/such"], "/no/such: no such folder; give a checkpoint, or a run's output folder"),
        ([ROOT / "docs"], "docs is neither a checkpoint nor a run of dsft; choose another folder"),
        ([ROOT / "README.md"], "README.md: no such folder"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--chekpoint", "a"], "unknown flag --chekpoint (did you mean 'checkpoint'?)"),
        (["x", "--verify", "maybe"], "verify: expected bool, got 'maybe'"),
    ],
)
def test_wrong_use_is_one_line(words, told):
    done = checkpoint(*words)
    assert (done.status, done.out) == (1, "")
    assert told in done.errors[0]
    assert all(line.startswith("error: ") for line in done.err.splitlines())
    assert len(done.errors) == 1 + (words[:1] == ["--chekpoint"])


def test_help_says_that_a_path_is_enough():
    done = checkpoint("--help")
    assert done.status == 0
    assert "python -m dsft.checkpoint PATH" in done.out


def test_a_home_folder_is_found(out):
    done = run([BIN / "python", "-m", "dsft.checkpoint", "~/latest"], env={"HOME": str(out)})
    assert done.status == 0, done.err


def test_it_reads_what_a_pipe_takes(out):
    """Half of the output is asked for: no error, no traceback."""
    words = f"{sys.executable} -m dsft.checkpoint {out}/latest | head -2"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.slow
def test_a_run_that_goes_on_may_be_looked_at(trained_runs, tmp_path):
    """Its checkpoints come and go meanwhile; nothing is damaged, and the run is not disturbed."""
    out = tmp_path / "run"
    words = trained_runs.words("lora", out, total_training_steps=20, max_checkpoints=1, val_files=None)
    process = subprocess.Popen(
        [sys.executable, "-m", "dsft.train", *words],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    looked = 0
    try:
        while process.poll() is None:
            if not (out / "metrics.jsonl").exists():
                time.sleep(0.05)
                continue
            done = checkpoint(out)
            assert (done.status, done.err) == (0, ""), done
            looked += 1
        _, err = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert looked > 2
