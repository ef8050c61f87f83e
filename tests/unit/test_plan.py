"""What a run needs, and what is said where it does not fit."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from dsft.config import PreviewConfig, TrainConfig
from dsft.errors import UserError
from dsft.planning.out_of_memory import out_of_memory, refuse
from dsft.planning.plan import Needs
from dsft.previewing.preview import needs_findings
from tests.helpers import message

GIB = 2**30


def needs(available: float, *, remedies=("--dtype bfloat16",), **changes) -> Needs:
    """Of a run whose peak is 3 GiB by prediction."""
    values = {
        "computes": "fsdp in float32 on cpu", "memory": SimpleNamespace(peak=3.0 * GIB, parts=dict),
        "available": available * GIB, "remedies": list(remedies), "step_flops": 1.0, "step_seconds": 1.0,
        "steps_per_epoch": 4, "total_steps": 8,
    }  # fmt: skip
    return Needs(**values | changes)


def test_a_run_is_refused_only_beyond_the_error_of_the_prediction():
    refuse(needs(0.63 * 3))
    with pytest.raises(UserError, match="; try --dtype bfloat16"):
        refuse(needs(0.62 * 3))
    assert (needs(2.99).fits, needs(3.01).fits) == (False, True)


def test_memory_that_runs_out_becomes_one_line():
    config = TrainConfig(model="m", train_files=["t"], output_dir="out", lora_rank=0)

    def work(remedies: list[str]) -> None:
        with out_of_memory(config, lambda: remedies):
            torch.empty(2**60)

    line = message(work, [])
    assert line.startswith("out of memory (")
    assert "--max_tokens_per_micro_batch" in line
    assert "--lora_rank 16" in line
    assert message(work, ["4 ranks"]).endswith("; try 4 ranks")
    with pytest.raises(ZeroDivisionError), out_of_memory(config, list):
        raise ZeroDivisionError


def test_a_preview_names_what_will_not_fit(tmp_path):
    config = PreviewConfig(model="m", train_files=["t"], output_dir=str(tmp_path / "not" / "yet"), save_steps=1)
    enormous = shutil.disk_usage(tmp_path).free // 12 + 1
    memory, disk = needs_findings(needs(2.0), enormous, config)
    assert (memory.kind, memory.name) == ("warning", "memory")
    assert memory.text == ("a rank needs 3.00 GiB by prediction, and 2.00 GiB are available; try --dtype bfloat16")
    assert (disk.kind, disk.name) == ("warning", "disk")
    assert f"{tmp_path} has" in disk.text
    assert not (tmp_path / "not").exists()
    assert needs_findings(needs(4.0), 100, config) == []
    without = PreviewConfig(model="m", train_files=["t"], save_steps=1)
    assert needs_findings(needs(4.0), enormous, without) == []


def test_needs_in_words_and_in_json():
    run = needs(11.57)
    assert run.memory_text() == "3.00 GiB per rank predicted (), 11.57 GiB available"
    assert run.time_text() == "1.0 s per step predicted, 4.0 s per epoch, 8.0 s for 8 steps"
    assert run.time_text(1).endswith("1.0 s for 1 step")
    assert run.as_dict()["seconds"] == 8
