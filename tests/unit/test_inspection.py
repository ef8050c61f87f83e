"""What dsft.checkpoint tells of a checkpoint and of a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dsft.checkpointing import inspection
from dsft.checkpointing.folder import CheckpointFolder
from dsft.checkpointing.inspection import Report, inspect
from dsft.checkpointing.integrity import COMPLETE
from dsft.checkpointing.state import CONFIG, STATE, TrainerState
from dsft.config import TrainConfig
from dsft.config.values import as_yaml
from tests.helpers import ROOT, contents, message, save_checkpoint

WEIGHTS = save({"a": torch.ones(3, 4), "b": torch.ones(5)})
MOMENTS = save({f"{kind}.{name}": torch.ones(1000, 70) for kind in ("exp_avg", "exp_avg_sq") for name in "ab"})


def made(root: Path, step: int = 3, more: dict[str, Any] | None = None, **flags: Any) -> Path:
    """A checkpoint with files of all kinds."""
    versions = {"dsft": "1.0", "torch": "2.0"}
    state = TrainerState(
        step, 12, step / 4, "zero3", 2, "rows", (0, step), val_losses={"val/loss": 2.5 - step / 10},
        best_step=3, best_loss=2.2, versions=versions,
    )  # fmt: skip
    given = {"model": "some/model", "train_files": ["a.parquet", "b.parquet"], "output_dir": "o"} | flags
    lines = [{"step": i, "train/loss": 3 - i / 10} for i in range(1, step + 1)] + [{"step": step, "val/loss": 1.0}]
    files = {
        STATE: state.to_json(),
        CONFIG: as_yaml(TrainConfig(**given)),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "adapter_model.safetensors": WEIGHTS,
        "optimizer.safetensors": MOMENTS,
    }
    return save_checkpoint(root, step, files | (more or {}))


def replace(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def facts(report: Report) -> dict[str, str]:
    lines = report.lines[: report.lines.index("")]
    return {line[:11].strip(): line[12:] for line in lines}


def rows(report: Report) -> dict[str, list[str]]:
    table = report.lines[report.lines.index("") + 2 :]
    return {line.split()[0]: line.split()[1:] for line in table[: table.index("") if "" in table else None]}


# One checkpoint


def test_a_checkpoint_says_where_it_stands_and_how_it_was_made(tmp_path):
    saved = made(tmp_path)
    report = inspect(str(saved), verify=True)
    assert report.problem is None
    assert facts(report) == {
        "checkpoint": str(saved),
        "step": "3 of 12",
        "epoch": "0.75: 0 completed, 3 batches of the next one",
        "backend": "zero3, ranks: 2",
        "train/loss": "2.700000",
        "val/loss": "2.200000",
        "best": "step 3, val/loss 2.200000, this checkpoint",
        "versions": "dsft 1.0, torch 2.0",
        "model": "some/model",
        "LoRA": "rank 64, alpha 32.0, all-linear",
        "data": "a.parquet,b.parquet",
        "batch": "128 rows",
        "lr": "0.0001, cosine, warmup 0.1",
        "seed": "1",
        "size": f"1.1 MiB in {len(list(saved.iterdir()))} files",
    }
    size = {path.name: str(path.stat().st_size) for path in saved.iterdir()}
    assert rows(report) == {
        COMPLETE: [size[COMPLETE], "B"],
        "adapter_model.safetensors": [size["adapter_model.safetensors"], "B", "2", "17"],
        "config.yaml": [f"{int(size[CONFIG]) / 1024:.1f}", "KiB"],
        "metrics.jsonl": [size["metrics.jsonl"], "B"],
        "optimizer.safetensors": ["1.1", "MiB", "4", "280,000"],
        "trainer_state.json": [size[STATE], "B"],
        "weights": ["12", "B"],
    }
    assert report.lines[-1] == "checksums   all files are intact"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora_rank": 0}, "none: full fine-tuning"),
        ({"use_rslora": True, "use_dora": True}, "rank 64, alpha 32.0, all-linear, rsLoRA, DoRA"),
        ({"lora_rank": 8, "target_modules": ["q_proj", "v_proj"]}, "rank 8, alpha 32.0, q_proj,v_proj"),
    ],
)
def test_the_shape_of_lora_is_told(tmp_path, flags, told):
    assert facts(inspect(str(made(tmp_path, **flags)), verify=True))["LoRA"] == told


def test_what_a_run_never_measured_is_told_as_such(tmp_path):
    state = TrainerState(1, 2, 0.5, "fsdp", 1, "rows", validation_due=True)
    saved = made(tmp_path, 1, {STATE: state.to_json(), "metrics.jsonl": ""})
    told = facts(inspect(str(saved), verify=True))
    assert told["train/loss"] == "unknown"
    assert told["val/loss"] == "pending: the run was stopped before it"
    assert told["best"] == "none"


def test_the_table_is_aligned_and_plain(tmp_path):
    saved = made(tmp_path, model="a\nb\x1b[31m\x00")
    replace(saved / "x\x1b[2J", "")
    lines = inspect(str(saved), verify=True).lines
    assert all(line.isprintable() for line in lines)
    head = next(line for line in lines if line.startswith("file "))
    for line in lines[lines.index(head) + 1 :]:
        if ".safetensors" in line:
            assert line.index("MiB" if "MiB" in line else " B ") <= head.index("size") + 4
            assert len(line) == len(head)
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        (STATE, "{", "is damaged"),
        (CONFIG, "half", "damaged"),
        ("adapter_model.safetensors", WEIGHTS[:-4], "is damaged"),
        ("optimizer.safetensors", b"", "is damaged"),
        (COMPLETE, "half", "is damaged: the list of checksums is incomplete"),
    ],
)
def test_a_file_that_is_damaged_is_named_and_the_rest_is_told(tmp_path, name, content, part, verify):
    saved = made(tmp_path)
    replace(saved / name, content)
    report = inspect(str(saved), verify=verify)
    assert report.problem is not None
    assert report.problem.startswith(f"{saved / name} ")
    assert part in report.problem or not verify
    assert report.lines[-1] == "checksums   1 of 7 files are damaged"
    assert name in rows(report)
    told = facts(report)
    if name != CONFIG:
        assert told["model"] == "some/model"
    if name != STATE:
        assert told["step"] == "3 of 12"


def test_a_flipped_bit_is_seen_only_where_files_are_read(tmp_path):
    saved = made(tmp_path)
    replace(saved / "optimizer.safetensors", MOMENTS[:-1] + bytes([MOMENTS[-1] ^ 1]))
    report = inspect(str(saved), verify=False)
    assert (report.problem, report.lines[-1]) == (None, "checksums   not verified (--verify False)")
    report = inspect(str(saved), verify=True)
    place = saved / "optimizer.safetensors"
    assert report.problem == f"{place} is damaged: its checksum does not match"
    assert " ".join(rows(report)["optimizer.safetensors"]).endswith("its checksum does not match")


@pytest.mark.parametrize("verify", [True, False])
def test_all_that_is_wrong_is_in_the_table_and_counted(tmp_path, verify):
    saved = made(tmp_path)
    (saved / "optimizer.safetensors").unlink()
    (saved / "weights").unlink()
    (saved / "weights").mkdir()
    replace(saved / "more.safetensors", WEIGHTS)
    replace(saved / "notes.txt", "")
    report = inspect(str(saved), verify=verify)
    table = {name: " ".join(cells) for name, cells in rows(report).items()}
    assert report.problem == f"{saved}/optimizer.safetensors is missing (and 2 more)"
    assert table["optimizer.safetensors"] == "- is missing"
    assert table["weights"] == "- is missing"
    assert table["more.safetensors"].endswith("is not listed in COMPLETE")
    assert table["notes.txt"] == "0 B not in COMPLETE"
    assert report.lines[-1] == "checksums   3 of 9 files are damaged"


def test_an_unfinished_checkpoint_says_so(tmp_path):
    saved = made(tmp_path)
    (saved / COMPLETE).unlink()
    unfinished = saved.rename(tmp_path / ".checkpoint-000003.tmp")
    report = inspect(str(unfinished), verify=True)
    assert report.lines[-1] == "checksums   incomplete"
    assert report.problem is not None
    assert report.problem.startswith(f"{unfinished} has no COMPLETE file: saving it was interrupted, or is in progress")


def test_links_and_folders_set_aside_can_be_named(tmp_path):
    saved = made(tmp_path)
    run = CheckpointFolder(tmp_path)
    run.point("best", saved)
    assert facts(inspect(str(tmp_path / "best"), verify=True))["checkpoint"] == str(saved)
    aside = run.set_aside(saved, "damaged")
    assert inspect(str(aside), verify=True).problem is None
    assert inspect(str(shutil.copytree(aside, tmp_path / "mine")), verify=True).problem is None


# A run


def test_a_run_is_a_table_of_its_checkpoints(tmp_path):
    for step in (1, 2, 3, 4, 5):
        made(tmp_path, step)
    run = CheckpointFolder(tmp_path)
    run.point("best", run.path(3))
    run.point("latest", run.path(3))
    run.set_aside(run.path(4), "damaged")
    run.set_aside(run.path(5), "superseded")
    made(tmp_path, 4)
    run.set_aside(run.path(4), "damaged")
    replace(run.path(2) / "optimizer.safetensors", b"")
    made(tmp_path, 6)
    (run.path(6) / COMPLETE).unlink()
    run.begin(7)
    report = inspect(str(tmp_path), verify=True)
    assert facts(report) == {"run": str(tmp_path), "step": "3 of 12"}
    place = run.path(2) / "optimizer.safetensors"
    wrong = "is damaged: its checksum does not match"
    assert report.problem == f"{place} {wrong}"
    assert report.lines[3:] == [
        "checkpoint                    step  epoch  val/loss     size",
        "checkpoint-000001                1   0.25  2.400000  1.1 MiB                intact",
        f"checkpoint-000002                2    0.5  2.300000  2.4 KiB                {place.name} {wrong}",
        "checkpoint-000003                3   0.75  2.200000  1.1 MiB  best, latest  intact",
        "checkpoint-000004.damaged        4      1  2.100000  1.1 MiB                set aside: damaged",
        "checkpoint-000004.damaged.2      4      1  2.100000  1.1 MiB                set aside: damaged",
        "checkpoint-000005.superseded     5   1.25  2.000000  1.1 MiB                set aside: superseded",
        "checkpoint-000006                6    1.5  1.900000  1.1 MiB                incomplete",
        ".checkpoint-000007.tmp           -      -         -      0 B                incomplete",
    ]


def test_a_run_that_is_not_read_is_told_as_such(tmp_path):
    saved = made(tmp_path)
    replace(saved / "optimizer.safetensors", b"")
    report = inspect(str(tmp_path), verify=False)
    assert report.problem is None
    assert report.lines[-1].endswith("not verified")


def test_several_damaged_checkpoints_are_counted(tmp_path):
    for step in (1, 2, 3):
        (made(tmp_path, step) / "weights").unlink()
    problem = inspect(str(tmp_path), verify=False).problem
    assert problem == f"{tmp_path}/checkpoint-000001/weights is missing (and 2 more)"


def test_a_run_without_checkpoints_says_so(tmp_path):
    (tmp_path / CONFIG).touch()
    report = inspect(str(tmp_path), verify=True)
    assert (report.lines[-1], report.problem) == ("no checkpoints", None)


def test_a_link_that_shows_to_nothing_is_told(tmp_path):
    run = CheckpointFolder(tmp_path)
    run.point("latest", made(tmp_path))
    run.point("best", run.path(9))
    told = facts(inspect(str(tmp_path), verify=True))
    assert told["best"] == "dangling link to checkpoint-000009"
    assert "latest" not in told


def test_a_checkpoint_that_vanishes_meanwhile_is_passed_over(tmp_path, monkeypatch):
    """The run goes on, and rotates its checkpoints."""
    made(tmp_path, 1)
    made(tmp_path, 2)
    examine = inspection._examine

    def vanish(path: Path, *, verify: bool):
        examined = examine(path, verify=verify)
        if path.name == "checkpoint-000001":
            shutil.rmtree(path)
        return examined

    monkeypatch.setattr(inspection, "_examine", vanish)
    assert list(rows(inspect(str(tmp_path), verify=True))) == ["checkpoint-000002"]


# Neither


def test_a_path_that_is_neither_says_so(tmp_path):
    assert message(inspect, "/no/such", verify=True).startswith(
        "/no/such: no such folder; give a checkpoint, or a run's"
    )
    (tmp_path / "file").touch()
    assert "no such folder" in message(inspect, str(tmp_path / "file"), verify=True)
    assert message(inspect, str(tmp_path), verify=True).startswith(
        f"{tmp_path} is neither a checkpoint nor a run of dsft; "
    )


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    made(tmp_path)

    def refuse(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    told = message(inspect, str(tmp_path), verify=True)
    assert told == f"{tmp_path} cannot be read: Permission denied; make it readable, or choose another"


# What it costs


def test_nothing_is_written_and_no_torch_is_loaded_and_it_is_fast(tmp_path):
    for step in (1, 2):
        made(tmp_path, step)
    before = contents(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code = (
        "import sys; from dsft.checkpointing.inspection import inspect; "
        "[inspect(path, verify=True) for path in sys.argv[1:]]; print(*sys.modules)"
    )
    paths = [str(tmp_path), str(tmp_path / "checkpoint-000001")]
    started = sum(os.times()[2:4])
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sum(os.times()[2:4]) - started < 1  # of a processor's time; a busy machine gives less of it
    assert {"torch", "transformers", "pandas", "peft"} & set(done.stdout.split()) == set()
    assert before == (contents(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")})
