"""What a run tells, also after it was killed, and where a tracking library fails."""

import errno
import json
import sys
from types import SimpleNamespace

import pytest

from dsft.checkpointing.state import TrainerState
from dsft.config import TrainConfig
from dsft.errors import UserError
from dsft.training.tracking import METRICS, WANDB_ID, Tracker


def metrics(step: int) -> dict:
    return {"step": step, "train/loss": 1.5 / step, "train/lr": 1e-4}


@pytest.fixture
def open_tracker(tmp_path):
    opened = []

    def open_tracker(*loggers: str, first_step: int = 0, history: str = "") -> Tracker:
        config = TrainConfig(
            model="m", train_files=["t"], output_dir="o", logger=list(loggers), lr=1.0, project_name="p",
            experiment_name="n",
        )  # fmt: skip
        state = TrainerState(first_step, 9, 0.0, "fsdp", 1, "rows")
        opened.append(Tracker(config, tmp_path, "float32", state, history))
        return opened[-1]

    yield open_tracker
    for tracker in opened:
        tracker.close()


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_every_step_and_evaluation_is_a_line_at_once(open_tracker, tmp_path):
    tracker = open_tracker()
    tracker.step(metrics(1))
    tracker.evaluation({"step": 1, "val/loss": 2.0, "val/perplexity": 7.389})
    assert lines(tmp_path) == [metrics(1), {"step": 1, "val/loss": 2.0, "val/perplexity": 7.389}]


def test_a_resumed_run_has_the_lines_of_its_checkpoint_and_no_later_ones(open_tracker, tmp_path):
    tracker = open_tracker()
    for step in (1, 2):
        tracker.step(metrics(step))
    length = tracker.metrics_bytes
    tracker.step(metrics(3))
    tracker.close()
    history = (tmp_path / METRICS).read_bytes()[:length].decode()
    resumed = open_tracker(first_step=2, history=history)
    assert resumed.metrics_bytes == length
    resumed.step(metrics(3))
    assert lines(tmp_path) == [metrics(1), metrics(2), metrics(3)]


def test_a_new_run_takes_back_all_lines(open_tracker, tmp_path):
    (tmp_path / METRICS).write_text('{"step": 0, "val/loss": 1.0}\n{"step": 1}\n')
    open_tracker()
    assert lines(tmp_path) == []


def test_metrics_that_cannot_be_written_are_an_error_for_all_ranks_to_see(open_tracker, tmp_path):
    tracker = open_tracker()

    class Full:
        def write(self, _text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    tracker._file.close()
    tracker._file = Full()
    tracker.step(metrics(1))
    assert isinstance(tracker.error, UserError)
    assert str(tracker.error).startswith(f"cannot write {tmp_path}/metrics.jsonl: the disk is full")


def test_only_the_console_logger_prints(open_tracker, capsys):
    evaluation = {"step": 4, "val/loss": 2.0, "val/perplexity": 7.389}
    open_tracker().evaluation(evaluation)
    assert capsys.readouterr().out == ""
    open_tracker("console").evaluation(evaluation)
    assert capsys.readouterr().out == "step 4: val/loss 2.000000, val/perplexity 7.3890\n"


class FakeWandb:
    """As much of wandb as the tracker uses; raises in the calls named."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.calls = failing, []

    def _call(self, name: str, /, *arguments, **options):
        self.calls.append((name, arguments, options))
        if name in self.failing:
            raise RuntimeError(f"{name} failed\nfor a long reason")
        return SimpleNamespace(
            log=lambda *a, **o: self._call("log", *a, **o), finish=lambda *a, **o: self._call("finish", *a, **o)
        )

    def module(self):
        return SimpleNamespace(Settings=lambda **_: None, init=lambda *a, **o: self._call("init", *a, **o))


@pytest.mark.parametrize(("failing", "logged"), [("init", 0), ("log", 1), ("finish", 2)])
def test_a_failing_wandb_is_one_warning_and_never_stops_the_run(
    open_tracker, tmp_path, monkeypatch, capsys, failing, logged
):
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake.module())
    tracker = open_tracker("wandb")
    tracker.step(metrics(1))
    tracker.step(metrics(2))
    tracker.close()
    assert lines(tmp_path) == [metrics(1), metrics(2)]
    assert capsys.readouterr().err == f"warning: wandb is off: {failing} failed for a long reason\n"
    assert [name for name, *_ in fake.calls].count("log") == logged  # off after the first failure


def test_wandb_gets_the_values_by_step_and_a_resumed_run_goes_on_in_the_same_one(open_tracker, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake.module())
    open_tracker("wandb").step(metrics(1))
    open_tracker("wandb", first_step=1)
    inits = [options for name, _, options in fake.calls if name == "init"]
    assert inits[0]["id"] == inits[1]["id"] == (tmp_path / WANDB_ID).read_text()
    assert {"project": "p", "name": "n"}.items() <= inits[0].items()
    assert {"lr": 1.0, "dtype": "float32"}.items() <= inits[0]["config"].items()
    assert [call for call in fake.calls if call[0] == "log"] == [
        ("log", ({"train/loss": 1.5, "train/lr": 1e-4},), {"step": 1})
    ]


def test_the_real_wandb_runs_offline(open_tracker, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = open_tracker("wandb")
    tracker.step(metrics(1))
    tracker.close()
    assert "wandb is off" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_tensorboard_gets_every_value_by_step(open_tracker, tmp_path):
    tracker = open_tracker("tensorboard")
    tracker.step(metrics(1))
    tracker.step(metrics(2))
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5), (2, 0.75)]
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr"}


def test_a_failing_tensorboard_never_stops_the_run(open_tracker, tmp_path, capsys):
    tracker = open_tracker("tensorboard")

    def fail(*_):
        raise RuntimeError("no disk")

    tracker._board.add_scalar = fail
    tracker.step(metrics(1))
    tracker.step(metrics(2))
    assert lines(tmp_path) == [metrics(1), metrics(2)]
    assert capsys.readouterr().err == "warning: tensorboard is off: no disk\n"
