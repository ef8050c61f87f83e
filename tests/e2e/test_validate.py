"""dsft.validate as a user types it: players, ranks, adapters, dialogues, wrong use."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import BIN, ROOT, SAMPLE_VAL, Done, flags, hear_interrupts, run, write_parquet

ALONE = [sys.executable, "-m", "dsft.validate"]


@pytest.fixture
def validate(commands) -> Callable[..., Done]:
    def validate(output, *launcher: str, **values) -> Done:
        words = flags(output=output, **values)
        return run([*launcher, *words]) if launcher else commands.run("dsft.validate", words)

    return validate


def report(output) -> dict:
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_expert_is_the_ceiling(validate, tmp_path):
    done = validate(tmp_path / "new" / "r.json", model="expert", env="sokoban", episodes=25)
    assert done.status == 0, done.err
    assert done.out.splitlines()[:3] == [
        "solved   25 of 25 levels: 100.0% (95 % interval 86.7% to 100.0%)",
        "moves    0.00 over the optimum on solved levels",
        f"answers  {report(tmp_path / 'new' / 'r.json')['turns']}, 0.0% of them invalid",
    ]
    episodes = (tmp_path / "new" / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in episodes] == list(range(25))
    assert done.err == ""


@pytest.mark.slow
def test_two_ranks_report_what_one_does(validate, tiny_model, tmp_path):
    values = {"model": tiny_model, "env": "frozenlake", "episodes": 5, "max_turns": 3, "max_new_tokens": 5}
    values |= {"dtype": "float32", "batch_size": 2}
    one = validate(tmp_path / "one.json", **values)
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "dsft.validate"]
    two = validate(tmp_path / "two.json", *launcher, **values)
    assert (one.status, two.status) == (0, 0), two.err
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert one.out.splitlines()[:3] == two.out.splitlines()[:3]
    assert report(tmp_path / "one.json")["transcripts"] == report(tmp_path / "two.json")["transcripts"]


@pytest.mark.slow
def test_an_adapter_plays_as_its_merged_model(validate, commands, tiny_model, tmp_path):
    game = {"env": "frozenlake", "rows": "episodes", "train_size": 16, "test_size": 2, "output_dir": tmp_path / "data"}
    made = commands.run("dsft.generate", flags(**game))
    training = {"model": tiny_model, "train_files": tmp_path / "data" / "train.parquet", "messages_key": "messages"}
    training |= {"lora_rank": 4, "lr": 0.02, "train_batch_size": 8, "total_epochs": 2, "dtype": "float32"}
    trained = commands.run("dsft.train", flags(**training, output_dir=tmp_path / "run"))
    merged = commands.run("dsft.merge", flags(checkpoint=tmp_path / "run", dtype="float32"))
    assert (made.status, trained.status, merged.status) == (0, 0, 0), made.err + trained.err + merged.err
    values = {"env": "frozenlake", "episodes": 4, "max_turns": 2, "max_new_tokens": 8, "dtype": "float32"}
    assert validate(tmp_path / "a.json", model=tiny_model, adapter=tmp_path / "run", **values).status == 0
    assert validate(tmp_path / "m.json", model=tmp_path / "run" / "merged", **values).status == 0
    assert validate(tmp_path / "b.json", model=tiny_model, **values).status == 0
    told = [(tmp_path / f"{name}.jsonl").read_text() for name in "amb"]
    assert told[0] == told[1] != told[2]


@pytest.mark.slow
def test_dialogues_are_evaluated_by_loss_and_form(validate, tiny_model, tmp_path):
    done = validate(tmp_path / "r.json", model=tiny_model, data=SAMPLE_VAL, episodes=3, max_new_tokens=4)
    assert done.status == 0, done.err
    told = report(tmp_path / "r.json")
    assert (told["rows"], told["answers"], told["form_rate"]) == (29, 3, 0)
    assert told["val/loss"] > 5
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3


WRONG = {
    "neither game nor dialogues": ({"env": None}, "give either --env (sokoban or frozenlake) or --data"),
    "both": ({"data": SAMPLE_VAL}, "give either --env (sokoban or frozenlake) or --data"),
    "unknown env": ({"env": "sokobn"}, "env: expected one of sokoban, frozenlake, got 'sokobn'"),
    "impossible size": ({"size": 1}, "--size must be from 2 to 100, got 1"),
    "no model": ({"model": "nowhere/at/all"}, "--model nowhere/at/all: no such folder"),
    "no adapter": ({"model": "smollm2-135m", "adapter": "nowhere"}, "--adapter nowhere: no such folder"),
    "adapter of a player": ({"adapter": "x"}, "--model random has no weights; drop --adapter"),
    "no levels file": ({"levels": "nowhere.parquet"}, "--levels nowhere.parquet: no such file"),
    "levels without levels": ({"levels": SAMPLE_VAL}, "row 0: extra_info has no level and seed"),
    "too few levels": ({"size": 2}, "only 3 different levels were found that are not excluded"),
    "no episodes": ({"episodes": 0}, "episodes must be 1 or more, got 0"),
    "vllm missing": ({"engine": "vllm"}, "--engine vllm needs the package vllm"),
    "output no json": ({"output": "report.txt"}, "output must be a .json file, got report.txt"),
    "dialogues' flag": ({"max_length": 100}, "--max_length belongs to --data; drop one of them"),
    "games' flag": (
        {"env": None, "data": SAMPLE_VAL, "model": "m", "style": "plain"},
        "--style belongs to --env; drop one of them",
    ),
    "beyond the model": ({"model": "smollm2-135m", "max_new_tokens": 9000}, "positions; lower it, --history_turns"),
    "dialogues for a player": ({"env": None, "data": SAMPLE_VAL}, "--model random plays games only; name --env"),
}


FOUND_LATE = (
    "no model",
    "no adapter",
    "no levels file",
    "levels without levels",
    "too few levels",
    "impossible size",
    "beyond the model",
)


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w in FOUND_LATE)) for w in WRONG])
def test_wrong_use_is_one_clear_line(commands, tmp_path, what):
    values, told = WRONG[what]
    values = {"model": "random", "env": "frozenlake", "output": tmp_path / "r.json"} | values
    done = commands.run("dsft.validate", flags(**{name: value for name, value in values.items() if value is not None}))
    assert done.status == 1
    assert len(done.errors) == 1, done.err
    assert told in done.errors[0]
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []
    assert done.seconds < 15


def test_a_report_that_cannot_be_written_is_one_line(validate, tmp_path):
    (tmp_path / "file").write_text("")
    done = validate(tmp_path / "file" / "r.json", model="random", env="frozenlake", episodes=2)
    assert done.status == 1
    assert [f"cannot write {tmp_path}/file" in line for line in done.errors] == [True]


@pytest.mark.slow
def test_a_level_file_of_another_game_ends_all_ranks(validate, tmp_path):
    levels = write_parquet(tmp_path / "l.parquet", [{"extra_info": {"seed": s, "level": f"{s}"}} for s in range(4)])
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "dsft.validate"]
    done = validate(tmp_path / "r.json", *launcher, model="random", env="frozenlake", levels=levels, episodes=4)
    assert done.status != 0
    assert "gives another level than the file's" in "\n".join(done.errors)
    assert done.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True])
def test_ctrl_c_stops_it_without_a_report(tmp_path, loaded):
    """While torch is loading, and while levels are made."""
    words = [*ALONE, *flags(model="random", env="sokoban", dim_x=12, dim_y=12, episodes=100_000)]
    with subprocess.Popen(
        [*words, "--output", str(tmp_path / "r.json")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    ) as child:
        maps = Path(f"/proc/{child.pid}/maps")
        mark = "libtorch_python" if loaded else "libtorch"
        while mark not in maps.read_text() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(6 if loaded else 0)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=30)
    assert child.returncode == 130, told
    assert told.strip().splitlines()[-1] == "stopped"
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
