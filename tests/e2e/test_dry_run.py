"""--dry_run: what would fail later fails now, and nothing is left but a report."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers import Done, contents, flags, run, start_words, write_parquet

SECONDS = 60  # within which everything must be told

LIMITED = """
import resource, sys

import psutil

from dsft import train
from dsft.distributed import runtime
from dsft.training import trainer
from dsft.backends import fsdp

limit = psutil.Process().memory_info().vms + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
train.main()
"""


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def words(tiny_model, uneven_rows, out):
    """Flags of a small run, with the values a test changes."""

    def made(**changed) -> list[str]:
        usual = {
            "model": tiny_model, "train_files": uneven_rows, "output_dir": out, "train_batch_size": 4, "lora_rank": 4,
            "dtype": "float32", "dry_run": True,
        }  # fmt: skip
        return flags(**usual | changed)

    return made


def told(done: Done, out: Path) -> dict:
    """A dry run has ended well, and has written its report alone."""
    assert (done.status, done.errors) == (0, []), done.err
    assert [path.name for path in out.iterdir()] == ["dry_run.json"]
    report = json.loads((out / "dry_run.json").read_text())
    for label in ("model ", "data ", "batch ", "backend ", "output ", "memory ", "time ", "dry run ", "measured "):
        assert any(line.startswith(label) for line in done.out.splitlines()), done.out
    assert -0.1 < report["predicted_bytes"] / report["measured_bytes"] - 1 < 0.6
    assert report["memory_bytes"] >= report["predicted_bytes"]
    assert report["seconds_per_epoch"] == pytest.approx(report["seconds_per_step"] * report["steps_per_epoch"])
    assert report["seconds_per_step"] > 0
    return report


def refused(done: Done, out: Path, *parts: str) -> None:
    assert done.status == 1
    assert len(done.errors) == 1, done.err
    assert "Traceback" not in done.err
    assert all(part in done.errors[0] for part in parts), done.errors
    assert done.seconds < SECONDS
    assert not out.exists() or not list(out.iterdir())


def test_a_dry_run_reports_and_writes_nothing_else(commands, words, out):
    report = told(commands.run("dsft.train", words(total_epochs=2)), out)
    assert report["total_steps"] == 2 * report["steps_per_epoch"]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("zero3", 1), ("fsdp", 2)])
def test_a_dry_run_as_it_is_started(words, out, port, backend, ranks):
    told(run([*start_words(backend, ranks, port), *words()]), out)


def test_a_dry_run_beside_a_finished_run_leaves_it_as_it_is(trained_runs, commands, tmp_path):
    folder = trained_runs.copy("lora", tmp_path / "run")
    before = contents(folder)
    done = commands.run("dsft.train", trained_runs.words("lora", folder, dry_run=True))
    assert done.status == 0, done.err
    assert "already complete" in done.out
    after = contents(folder)
    del after["dry_run.json"]
    after.pop(".lock", None)
    before.pop(".lock", None)
    assert after == before


def test_other_flags_than_those_of_the_run_are_refused(trained_runs, commands, tmp_path):
    folder = trained_runs.copy("lora", tmp_path / "run")
    before = contents(folder)
    done = commands.run("dsft.train", trained_runs.words("lora", folder, dry_run=True, lr=0.5))
    assert done.status == 1
    assert "lr was 0.001, is 0.5" in done.errors[0]
    assert contents(folder) == before


def test_an_output_that_cannot_be_written(commands, words, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    out = file / "below"
    done = commands.run("dsft.train", words(output_dir=out))
    assert done.status == 1
    assert done.errors == [f"error: cannot write {out}: Not a directory; choose another folder, or make it writable"]
    assert done.seconds < SECONDS


def test_a_bad_ds_config(commands, words, out, tmp_path):
    settings = tmp_path / "ds.json"
    settings.write_text('{"train_batch_size": 7}')
    done = commands.run("dsft.train", [*words(), "--backend", "zero3", "--ds_config", str(settings)])
    refused(done, out, "train_batch_size is 7, but --train_batch_size sets it to 4")


def test_an_unusable_validation_file(commands, words, out, tmp_path):
    rows = write_parquet(tmp_path / "val.parquet", [{"question": "a", "answer": "b"}])
    refused(commands.run("dsft.train", words(val_files=rows)), out, "val.parquet has no column 'prompt' (--prompt_key)")


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer):
    """A model and a row that take some GiB together."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=8192, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = write_parquet(folder / "rows.parquet", [{"prompt": "one two " * 2000, "response": "three"}])
    return {"model": folder / "model", "train_files": rows, "max_length": 8192, "gradient_checkpointing": False}


@pytest.mark.slow
@pytest.mark.parametrize(("dry", "limit"), [(True, 1900), (False, 2600)], ids=["dry run", "training"])
def test_memory_that_runs_out_is_one_line_with_settings_to_try(large, words, out, dry, limit):
    """The system lets the process map so many MiB more than at its start, threads included; the run needs 3700."""
    done = run([sys.executable, "-c", LIMITED, limit, *words(**large, dry_run=dry)])
    assert done.status == 1
    assert len(done.errors) == 1, done.err
    assert done.seconds < SECONDS
    assert "Traceback" not in done.err
    assert ("by prediction" if dry else "out of memory") in done.errors[0]
    assert "--gradient_checkpointing True" in done.errors[0]
    if dry:
        assert not list(out.iterdir())


@pytest.mark.slow
def test_the_same_fits_without_the_limit(large, words, out):
    told(run([sys.executable, "-m", "dsft.train", *words(**large)]), out)
