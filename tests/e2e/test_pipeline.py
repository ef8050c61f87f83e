"""The pipeline as a user starts it: whole, killed in every step, with other flags, with steps that fail."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml

from tests.helpers import ROOT, Done, contents, flags, hear_interrupts, metrics, run
from tests.hub import TOKEN, Hub

pytestmark = pytest.mark.xdist_group("pipeline")  # they share one whole pipeline

SMALL = {
    "generate": {"rows": "episodes", "train_size": 24, "test_size": 6, "num_processes": 2},
    "train": {
        "lora_rank": 4,
        "train_batch_size": 4,
        "max_tokens_per_micro_batch": 2048,
        "lr": 0.01,
        "eval_steps": 2,
        "save_steps": 2,
    },
    "validate": {"episodes": 6, "max_turns": 7, "max_new_tokens": 4},
}


def words(output: Path, config: Path, **more) -> list[str]:
    return [sys.executable, "-m", "dsft.pipeline", *flags(config=config, output_dir=output, **more)]


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump({"env": "frozenlake", "model": str(tiny_model), "dtype": "float32"} | SMALL))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> tuple[Path, Done]:
    """One pipeline that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    done = run(words(output, config))
    assert done.status == 0, done.err + done.out
    return output, done


def refused(done: Done, *parts: str) -> None:
    assert done.status != 0
    assert "Traceback" not in done.err + done.out
    for part in parts:
        assert part in "\n".join(done.errors), done.err


@pytest.mark.slow
def test_the_last_lines_are_the_table_and_the_report_holds_it(whole):
    output, done = whole
    table = done.out.splitlines()[-6:]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["base model", "fine-tuned model", "expert", "random"]
    assert re.search(r"\| expert +\| 100\.0% \(61\.0% to 100\.0%\) +\| 0\.00 +\| 0\.0% +\|", done.out)
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "\n".join(table) in report
    assert "### A level that the fine-tuned model failed (seed" in report
    assert "<svg" in (output / "report.html").read_text(encoding="utf-8")
    assert "\n".join(table) in (output / "merged" / "README.md").read_text(encoding="utf-8")
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "validate").glob("*.json"))]
    assert len({json.dumps([line["level"] for line in lines(output, player)]) for player in players(output)}) == 1
    assert [r["model"] for r in reports][1:] == ["expert", str(output / "merged"), "random"]


def players(output: Path) -> list[str]:
    return [path.stem for path in (output / "validate").glob("*.json")]


def lines(output: Path, player: str) -> list[dict]:
    text = (output / "validate" / f"{player}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_levels_that_are_played_occur_in_no_file(whole):
    import pyarrow.parquet as pq

    output, _ = whole
    seen = {
        info["level"]
        for split in ("train", "test")
        for info in pq.read_table(output / "data" / f"{split}.parquet")["extra_info"].to_pylist()
    }
    assert len(seen) == 30
    assert not seen & {line["level"] for line in lines(output, "expert")}


def start_and_kill(command: list[str], output: Path, marker: str, number: int, after: float) -> None:
    """Start, wait until the pipeline says that a step runs, and a moment more; then send a signal to it alone."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=hear_interrupts
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(marker):
                break
        else:
            raise AssertionError(f"{marker} never ran")
        metrics_file = output / "train" / "metrics.jsonl"
        if marker.startswith("train"):  # into the middle of the steps, past the first checkpoint
            give_up = time.monotonic() + 60
            while not (output / "train" / "latest").exists() and time.monotonic() < give_up:
                time.sleep(0.05)
            assert metrics_file.exists()
        time.sleep(after)
        child.send_signal(number)
        child.communicate(timeout=60)
        assert child.returncode != 0


@pytest.mark.slow
def test_killed_in_every_step_it_ends_with_the_same_report(whole, config, tmp_path):
    """By SIGKILL, or by Ctrl-C where that must do more: training saves, generation removes what is half done."""
    output = tmp_path / "out"
    command = words(output, config)
    steps = [
        ("generate", 0.3, signal.SIGINT),
        ("train", 0.0, signal.SIGKILL),
        ("train", 0.0, signal.SIGINT),
        ("merge", 1.0, signal.SIGKILL),
        ("validate-base-model", 1.0, signal.SIGKILL),
        ("validate-random", 0.2, signal.SIGINT),
    ]
    for step, after, number in steps:
        start_and_kill(command, output, step, number, after)
        assert not (output / "report.md").exists()
    done = run(command)
    assert done.status == 0, done.err + done.out
    undisturbed, _ = whole
    table = "\n".join(done.out.splitlines()[-6:])
    for folder in (undisturbed, output):
        assert table in (folder / "report.md").read_text(encoding="utf-8")
    losses = [(line["step"], line["train/loss"]) for line in metrics(undisturbed / "train")]
    assert {line["step"]: line["train/loss"] for line in metrics(output / "train")} == dict(losses)


@pytest.mark.slow
def test_a_second_start_does_nothing_again_and_force_goes_back(whole, config, tmp_path):
    output, _ = whole
    before = (output / "merged" / "model.safetensors").stat().st_mtime_ns
    again = run(words(output, config))
    assert again.status == 0
    assert again.out.count("done before") == 4
    assert (output / "merged" / "model.safetensors").stat().st_mtime_ns == before
    other = run(words(output, config, **{"train.lr": 0.02}))
    refused(other, "train was done with other flags: lr was 0.01, is 0.02", "--force train")
    report = (output / "report.md").read_bytes()
    forced = run(words(output, config, force="merge"))
    assert forced.status == 0
    assert forced.out.count("done before") == 2
    assert (output / "merged" / "model.safetensors").stat().st_mtime_ns > before
    assert (output / "report.md").read_bytes() == report


@pytest.mark.slow
def test_two_ranks_zero3_full_fine_tuning_and_the_checkpoint_that_plays_best(config, tmp_path):
    output = tmp_path / "out"
    more = {"backend": "zero3", "nproc": 2, "select": "success_rate", "train.lora_rank": 0, "train.total_epochs": 1}
    more |= {"env": "sokoban", "dim_x": 5, "dim_y": 5, "generate.rows": "turns", "history_turns": 1}
    done = run(words(output, config, **more, **{"train.total_training_steps": 4}))
    assert done.status == 0, done.err + done.out
    chosen = {path.stem: json.loads(path.read_text()) for path in (output / "select").glob("*.json")}
    assert set(chosen) == {"checkpoint-000002", "checkpoint-000004"}
    assert all(report["episodes"] == 6 for report in chosen.values())
    best = max(sorted(chosen), key=lambda name: chosen[name]["success_rate"])
    assert (output / "train" / "best").resolve().name == best
    assert not (output / "merged").exists()
    assert "| fine-tuned model |" in done.out


WRONG = {
    "unknown env": ({"env": "sokobn"}, "env: expected one of sokoban, frozenlake, got 'sokobn'"),
    "impossible size": ({"size": 1}, "--size must be from 2 to 100, got 1"),
    "other game's flag": ({"num_boxes": 2}, "--num_boxes belongs to --env sokoban"),
    "typo in a step": ({"train.lrr": 1}, "unknown flag --train.lrr (did you mean 'lr'?)"),
    "value in a step": ({"validate.episodes": 0}, "--validate: episodes must be 1 or more, got 0"),
    "the pipeline's own": ({"train.backend": "zero3"}, "--train.backend is set by the pipeline; give --backend"),
    "no weights": ({"model": "expert"}, "--model expert plays without weights"),
    "nothing to push": (
        {"merge.push_to_hub": "me/tuned", "train.lora_rank": 0},
        "--merge.push_to_hub me/tuned: full fine-tuning (--train.lora_rank 0) merges nothing",
    ),
    "no ranks": ({"nproc": 0}, "nproc must be 1 or more, got 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_flags_are_told_before_any_step(config, tmp_path, what):
    values, told = WRONG[what]
    done = run(words(tmp_path / "out", config, **values))
    refused(done, told)
    assert len(done.errors) == 1
    assert not (tmp_path / "out").exists()
    assert done.seconds < 10


@pytest.mark.slow
def test_a_step_that_fails_stops_the_pipeline_with_its_status_and_log(config, tmp_path):
    done = run(words(tmp_path / "out", config, model=tmp_path / "nowhere"))
    refused(done, "train failed with status 1", "nowhere: no such folder", f"see {tmp_path}/out/logs/train.log")
    assert done.status == 1
    assert "merge" not in done.out


@pytest.mark.slow
def test_the_reason_of_a_failed_step_is_this_starts(config, tmp_path):
    output = tmp_path / "out"
    refused(run(words(output, config, model=tmp_path / "nowhere")), "nowhere: no such folder")
    with subprocess.Popen(
        words(output, config), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as again:
        assert any(line.startswith("train    running") for line in again.stdout)
        while not (children := psutil.Process(again.pid).children()):
            time.sleep(0.01)
        children[0].kill()  # as a machine without memory does, which writes no reason
        _, err = again.communicate(timeout=60)
    assert again.returncode == 128 + signal.SIGKILL
    assert err.splitlines() == [f"error: train failed with status 137; see {output}/logs/train.log"]
    assert "nowhere: no such folder" in (output / "logs" / "train.log").read_text()


def moved(output: Path, to: Path) -> Path:
    """A copy of a pipeline's folder that stands as if it had been made there."""
    shutil.copytree(output, to, symlinks=True)
    state = to / "pipeline.json"
    state.write_text(state.read_text().replace(str(output), str(to)))
    return to


@pytest.mark.slow
def test_the_model_is_pushed_last_and_once_with_a_card_that_holds_the_results(whole, config, tmp_path):
    output = moved(whole[0], tmp_path / "out")
    state = json.loads((output / "pipeline.json").read_text())
    del state["merge"]  # as if it had been killed there; the games, which take long, are played already
    (output / "pipeline.json").write_text(json.dumps(state))
    command = words(output, config, **{"merge.push_to_hub": "me/tuned"})
    with closing(Hub()) as hub:
        failed = run(command, env=hub.environment(tmp_path / "home", "hf_wrong"))
        refused(failed, "--push_to_hub me/tuned: the Hub refuses the token (401)")
        assert "merge    done" in failed.out
        assert (output / "report.md").is_file()
        assert hub.repositories == {}
        pushed = run(command, env=hub.environment(tmp_path / "home", TOKEN))
        assert (pushed.status, pushed.err) == (0, "")
        assert pushed.out.count("done before") == 4
        assert f"pushed   {hub.address}/me/tuned\n" in pushed.out
        assert hub.repositories["me/tuned"].files == contents(output / "merged")
        card = hub.repositories["me/tuned"].files["README.md"].decode()
        assert "\n".join(pushed.out.splitlines()[-6:]) in card
        assert "model='me/tuned'" in card
        assert str(tmp_path) not in card
        requests = len(hub.requests)
        again = run(command, env=hub.environment(tmp_path / "home", TOKEN))
        assert again.out.count("done before") == 5
        assert len(hub.requests) == requests


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"validate.episodes": 4}])
def test_an_unfinished_validation_goes_on_unless_its_flags_changed(whole, config, tmp_path, more):
    output = moved(whole[0], tmp_path / "out")
    start_and_kill(words(output, config, force="validate"), output, "validate-expert", signal.SIGKILL, 0)
    played = output / "validate" / "fine-tuned_model.json"
    before = played.stat().st_mtime_ns
    done = run(words(output, config, **more))
    assert done.status == 0, done.err
    assert (played.stat().st_mtime_ns == before) == (more == {})
    reports = [json.loads(path.read_text()) for path in (output / "validate").glob("*.json")]
    expected = more.get("validate.episodes", 6)
    assert [report["episodes"] for report in reports] == [expected] * 4


def test_shared_flags_reach_every_step_that_has_them(config, tmp_path):
    from dsft.cli import parse
    from dsft.config import PipelineConfig
    from dsft.config.values import as_words
    from dsft.orchestration import Pipeline

    shared = {"dtype": "bfloat16", "attn_implementation": "eager", "trust_remote_code": True, "debug": True}
    shared |= {"size": 5, "p": 0.7, "max_steps": 60, "max_depth": 50, "history_turns": 1}
    values = flags(config=config, output_dir=tmp_path / "out", **shared, **{"generate.rows": "turns"})
    pipeline = Pipeline(parse(PipelineConfig, values))
    steps = {
        "generate": (pipeline.generate, {"size", "p", "max_steps", "max_depth", "history_turns", "debug"}),
        "train": (pipeline.train, {"dtype", "attn_implementation", "trust_remote_code", "debug"}),
        "merge": (pipeline.merge, {"trust_remote_code", "debug"}),
        **{f"validate {player}": (config, set(shared)) for player, config in pipeline.validate.items()},
    }
    for step, (made, names) in steps.items():
        assert {name: getattr(made, name) for name in names} == {name: shared[name] for name in names}, step
        assert {f"--{name}" for name in names} <= {word.partition("=")[0] for word in as_words(made)}, step


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "scripts").glob("pipeline_*.yaml")))
def test_the_configs_beside_the_script_are_accepted_by_every_step(tmp_path, file):
    from dsft.cli import parse
    from dsft.config import PipelineConfig
    from dsft.orchestration import Pipeline

    game = file.split("_")[1]
    words = flags(env=game, config=ROOT / "scripts" / file, output_dir=tmp_path / "out")
    pipeline = Pipeline(parse(PipelineConfig, words))
    assert pipeline.validate["expert"].env == pipeline.generate.env == game
    assert pipeline.train.lora_rank > 0


def test_the_script_names_its_games():
    assert "out/ENV" in run(["bash", "scripts/run_pipeline.sh", "--help"], timeout=10).out
    for words in ([], ["chess"]):
        done = run(["bash", "scripts/run_pipeline.sh", *words], timeout=10)
        assert (done.status, len(done.errors)) == (1, 1)
        assert "ENV must be frozenlake or sokoban" in done.errors[0]


def test_two_pipelines_do_not_work_in_one_folder(config, tmp_path, monkeypatch):
    import fcntl

    from dsft import orchestration
    from dsft.cli import parse
    from dsft.config import PipelineConfig
    from dsft.errors import UserError

    monkeypatch.setattr(orchestration, "WAIT_FOR_OTHER", 0.2)
    (tmp_path / "logs").mkdir()
    with open(tmp_path / orchestration.LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        pipeline = orchestration.Pipeline(parse(PipelineConfig, flags(config=config, output_dir=tmp_path)))
        with pytest.raises(UserError, match="is in use by another pipeline"):
            pipeline.run()
