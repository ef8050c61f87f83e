"""trainer_state.json and config.yaml."""

import dataclasses
import json

import pytest

from dsft.checkpointing.state import CONFIG, STATE, TrainerState, read_flags, read_state
from tests.helpers import message

WHOLE = TrainerState(
    3, 6, 0.5, "fsdp", 2, "abc", position=(1, 2), val_losses={"val/loss": 1.25}, validation_due=True,
    best_step=2, best_loss=1.0, versions={"torch": "2"},
)  # fmt: skip
FIRST = TrainerState(0, 1, 0.0, "zero3", 1, "abc")


@pytest.mark.parametrize("state", [WHOLE, FIRST])
def test_the_state_reads_back_as_it_was_written(tmp_path, state):
    (tmp_path / STATE).write_text(state.to_json())
    assert read_state(tmp_path) == state


@pytest.mark.parametrize("text", ["", '{"step": 3', "[]", "3", '{"step": 3}', '{"stepp": 3}', "\x00\x01", None])
def test_a_damaged_state_is_refused_in_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / STATE).write_text(text)
    told = message(read_state, tmp_path)
    assert told.startswith(f"{tmp_path}/trainer_state.json is damaged (")
    assert told.endswith("); choose another checkpoint")


@pytest.mark.parametrize(
    "changed",
    [
        {"step": "3"}, {"step": 3.0}, {"step": -1}, {"step": None}, {"step": True}, {"total_steps": [6]},
        {"position": [1]}, {"position": [1, 2, 3]}, {"position": 5}, {"position": ["1", 2]}, {"world_size": "2"},
        {"epoch": "half"}, {"epoch": None}, {"val_losses": {"val/loss": "low"}}, {"val_losses": 1.5},
        {"best_loss": {}}, {"best_loss": None},
        {"data": 7}, {"versions": []}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_with_values_of_another_kind_is_refused_in_one_line(tmp_path, changed):
    (tmp_path / STATE).write_text(json.dumps(dataclasses.asdict(WHOLE) | changed))
    assert message(read_state, tmp_path).startswith(f"{tmp_path}/trainer_state.json is damaged (")


def test_the_flags_are_read(tmp_path):
    (tmp_path / CONFIG).write_text("model: m\nlr: 1.0e-04\n")
    assert read_flags(tmp_path) == {"model": "m", "lr": 1e-4}


@pytest.mark.parametrize(
    "content", [b"half a li", b"a: [", b"", b"\xff\xff", b"!!python/object/apply:os.getcwd []", None]
)
def test_flags_that_cannot_be_read_are_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / CONFIG).write_bytes(content)
    assert message(read_flags, tmp_path).startswith(f"{tmp_path}/config.yaml cannot be read (")
