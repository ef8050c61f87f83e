"""docs/adding_backend.md: its table is the contract, and its example trains, saves and resumes like fsdp."""

import re
from types import FunctionType

import pytest

from dsft.backends.base import Backend
from tests.helpers import BIN, ROOT, flags, metrics, run

PAGE = (ROOT / "docs" / "adding_backend.md").read_text(encoding="utf-8")


def test_the_table_lists_every_method_in_order():
    methods = [name for name, value in vars(Backend).items() if isinstance(value, FunctionType | classmethod)]
    assert re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE) == methods


@pytest.mark.slow
def test_the_example_trains_saves_and_resumes_like_fsdp(commands, tiny_model, uneven_rows, tmp_path):
    for name, code in zip(
        ("replicated.py", "train_replicated.py"), re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S), strict=True
    ):
        (tmp_path / name).write_text(code, encoding="utf-8")
    usual = {
        "model": tiny_model, "train_files": uneven_rows, "val_files": uneven_rows, "on_leak": "ignore",
        "dtype": "float32", "lora_rank": 4, "lr": 1e-2, "clip_grad": 0.1, "train_batch_size": 4,
        "total_training_steps": 4, "max_tokens_per_micro_batch": 200,
    }  # fmt: skip
    launcher = [BIN / "torchrun", "--standalone", "--nproc_per_node", 2, tmp_path / "train_replicated.py"]
    for steps in (2, 4):
        words = flags(**usual, output_dir=tmp_path / "replicated", stop_after_steps=steps)
        done = run([*launcher, *words], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
        assert done.status == 0, done.err
    done = commands.run("dsft.train", flags(**usual, output_dir=tmp_path / "fsdp"), ranks=2)
    assert done.status == 0, done.err
    for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        found, expected = ([line[key] for line in metrics(tmp_path / name, key)] for name in ("replicated", "fsdp"))
        assert found == pytest.approx(expected, rel=1e-5), key
