"""Leaks and splits as a user meets them: what train says, what it leaves out, and whether a resume knows."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers import Done, flags, metrics, write_parquet

pytestmark = pytest.mark.slow


def turns(topic: str, count: int) -> list[dict]:
    """The rows of a dialogue."""
    messages, rows = [], []
    for turn in range(count):
        messages.append({"role": "user", "content": f"{topic} {turn}"})
        rows.append({"prompt": list(messages), "response": f"well, {topic}"})
        messages.append({"role": "assistant", "content": f"well, {topic}"})
    return rows


TRAIN = [*turns("leaves", 3), *turns("roots", 2), *turns("stem", 1)]
VAL = [*turns("petal", 2), *turns("roots", 3)]  # two copies, and a later turn of the same dialogue


@pytest.fixture
def train(commands, tiny_model, tmp_path, monkeypatch):
    files = {name: write_parquet(tmp_path / f"{name}.parquet", rows) for name, rows in (("t", TRAIN), ("v", VAL))}

    def train(**changed) -> Done:
        usual = {
            "model": tiny_model, "train_files": files["t"], "val_files": files["v"], "output_dir": tmp_path / "out",
            "train_batch_size": 4, "lora_rank": 4, "total_training_steps": 1, "dtype": "float32",
        }  # fmt: skip
        values = {name: value for name, value in (usual | changed).items() if value is not None}
        return commands.run("dsft.train", flags(**values))

    return train


def started(done: Done) -> dict[str, str]:
    """The lines of the start, by their first word."""
    assert done.status == 0, done.err
    return dict(re.findall(r"^(\w+) +(.*)$", done.out, re.M))


def fingerprint(out: Path) -> str:
    return json.loads((out / "latest" / "trainer_state.json").read_text())["data"]


def told(tmp_path: Path) -> str:
    return (
        "3 of 5 validation rows leak from the training rows (2 by row, 2 by prompt, 3 by dialogue), "
        f"e.g. {tmp_path}/v.parquet, row 2 from {tmp_path}/t.parquet, row 3"
    )


def test_by_default_one_line_warns(train, tmp_path):
    done = train()
    remedy = "drop the rows with --on_leak drop_val or drop_train, or silence this with --on_leak ignore"
    assert done.err == f"warning: {told(tmp_path)}; {remedy}\n"
    said = started(done)
    assert said["data"].startswith("6 rows, ")
    assert said["val"].startswith("5 rows, ")
    assert "leaks" not in said


def test_an_error_is_one_line_and_makes_nothing(train, tmp_path):
    done = train(on_leak="error")
    assert done.status == 1
    remedy = "choose other --val_files, or drop the rows with --on_leak drop_val or drop_train"
    assert done.err == f"error: {told(tmp_path)}; {remedy}\n"
    assert not (tmp_path / "out").exists()


def test_validation_rows_are_dropped_and_ignoring_is_silent(train, tmp_path):
    said = started(train(on_leak="drop_val", output_dir=tmp_path / "dropped"))
    assert said["leaks"] == f"--on_leak drop_val drops 3 of 5 validation rows: {told(tmp_path)}"
    assert said["val"].startswith("2 rows, ")
    assert said["data"].startswith("6 rows, ")
    done = train(on_leak="ignore", output_dir=tmp_path / "ignored")
    assert done.err == ""
    assert started(done)["val"].startswith("5 rows, ")
    assert fingerprint(tmp_path / "dropped") == fingerprint(tmp_path / "ignored")
    losses = [metrics(tmp_path / name, "val/loss")[-1]["val/loss"] for name in ("dropped", "ignored")]
    assert losses[0] != losses[1]
    # What is dropped is as if it had not been there.
    without = train(val_files=write_parquet(tmp_path / "w.parquet", VAL[:2]), output_dir=tmp_path / "without")
    assert without.err == ""
    assert metrics(tmp_path / "without", "val/loss")[-1]["val/loss"] == losses[0]


def test_dropped_training_rows_are_part_of_the_run(train, tmp_path):
    out = tmp_path / "out"
    said = started(train(on_leak="drop_train"))
    assert said["leaks"] == f"--on_leak drop_train drops 2 of 6 training rows: {told(tmp_path)}"
    assert said["data"].startswith("4 rows, ")
    assert said["val"].startswith("5 rows, ")
    first = fingerprint(out)
    same = started(train(on_leak="drop_train"))
    assert same["resumed"].endswith("already complete")
    assert fingerprint(out) == first
    other = train(on_leak="warn")
    assert other.status == 1
    assert "is of a run with other flags: on_leak was drop_train, is warn; " in other.errors[0]
    elsewhere = write_parquet(tmp_path / "w.parquet", turns("stem", 2))
    other = train(on_leak="drop_train", val_files=elsewhere)
    assert other.status == 1
    assert (
        f"than --train_files {tmp_path}/t.parquet without what leaks into --val_files {elsewhere} gives now"
        in (other.errors[0])
    )
    all_of_it = train(on_leak="drop_train", val_files=tmp_path / "t.parquet", output_dir=tmp_path / "none")
    assert all_of_it.status == 1
    assert all_of_it.errors[0].startswith("error: --on_leak drop_train would leave no training row: 6 of 6 validation")
    assert not (tmp_path / "none").exists()


def test_a_share_of_the_rows_is_split_off_and_kept_for_a_resume(train, tmp_path):
    split = {"val_files": None, "val_fraction": 0.3, "total_training_steps": 2, "stop_after_steps": 1}
    done = train(**split)
    assert done.err == ""
    said = started(done)
    assert said["val"].startswith("2 rows, ")
    assert said["val"].endswith(", 0.3 of the rows by whole dialogues")
    assert said["data"].startswith("4 rows, ")
    assert metrics(tmp_path / "out", "val/loss")
    resumed = started(train(**split | {"stop_after_steps": None}))
    assert resumed["resumed"].endswith("resuming at step 2")
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]
    other = train(**split | {"val_fraction": 0.5})
    assert "val_fraction was 0.3, is 0.5" in other.errors[0]
    one = write_parquet(tmp_path / "one.parquet", turns("leaves", 3))
    refused = train(**split | {"train_files": one, "output_dir": tmp_path / "one"})
    assert refused.errors[0].startswith("error: --val_fraction 0.3 splits off whole dialogues, but all 3 rows of ")
    both = train(val_fraction=0.3, output_dir=tmp_path / "both")
    assert both.errors == ["error: val_fraction splits --train_files; drop it, or --val_files"]
