"""What a report takes from a run's folder, against values worked out by hand."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from dsft.checkpointing.state import with_command
from dsft.config.games import TUNED
from dsft.reporting.document import as_markdown
from dsft.reporting.eval_reports import find_eval_reports, game_lines, samples, shortened
from dsft.reporting.report import build_report
from dsft.reporting.runs import data_figures, read_metrics, read_run, read_runs
from dsft.units import duration
from tests.helpers import message, save_checkpoint, write_parquet

FLAGS = {"model": "some/model", "train_files": ["no/such.parquet"], "output_dir": "out/run", "lr": 0.001}


def step(number: int, **values: float) -> dict:
    usual = {"loss": 1.0 / number, "tokens": 100, "targets": 10, "fold_ratio": 2.0, "step_seconds": 30.0}
    return {"step": number, "epoch": number / 4} | {f"train/{name}": value for name, value in (usual | values).items()}


def make_run(folder: Path, lines: list, flags: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(FLAGS | (flags or {})))
    return folder


def test_metrics_that_are_damaged_unfinished_or_strange(tmp_path):
    lines = [
        json.dumps(step(1)), "{", "[]", "null", '{"step": "2"}', '{"step": true}', '{"step": -1}', "", "\x00\x00",
        '{"step": 2, "train/loss": NaN, "train/lr": 1e-4, "note": "x", "big": 1' + "0" * 400 + "}", "[" * 100_000,
        '{"step": 2, "val/loss": 2.5, "val/perplexity": Infinity}', '{"step": 3, "train/loss": 0.1}', '{"step": 4, "tr',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    metrics, damaged = read_metrics(tmp_path / "metrics.jsonl")
    assert damaged == 8
    curves = {key: metrics[key].dropna().to_dict() for key in ("train/loss", "train/lr", "val/loss")}
    assert curves == {"train/loss": {1: 1.0, 3: 0.1}, "train/lr": {2: 1e-4}, "val/loss": {2: 2.5}}
    assert "val/perplexity" not in metrics
    content = [b"\xff\xfe", *(json.dumps(step(number)).encode() for number in (2, 1))]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(content))
    metrics, damaged = read_metrics(tmp_path / "metrics.jsonl")
    assert (damaged, list(metrics["train/loss"].items())) == (1, [(1, 1.0), (2, 0.5)])
    assert read_metrics(tmp_path / "none.jsonl")[0].empty


def test_data_figures_by_hand(tmp_path):
    rows = write_parquet(tmp_path / "rows.parquet", [{"prompt": "a", "response": "b"}] * 7)
    lines = [
        step(i, fold_ratio=ratio, targets=10 * i) for i, ratio in zip(range(1, 7), [2, 2, 4, 4, 1, 1], strict=True)
    ]
    run = read_run(make_run(tmp_path / "run", lines, {"train_files": [str(rows)], "max_train_rows": 5}), "run")
    figures = data_figures(run)
    assert figures == {
        "train_files": str(rows),
        "rows": "5 in the files as they are now",
        "tokens": "400 in the first epoch",
        "targets": "100 in the first epoch",  # 10 + 20 + 30 + 40
        "fold ratio": f"{600 / (50 + 50 + 25 + 25 + 100 + 100):.2f} row tokens per computed token",
        "time in steps": "3 min",
    }
    rows.unlink()
    run = read_run(make_run(tmp_path / "begun", lines[:2]), "begun")
    figures = data_figures(run)
    assert (figures["tokens"], "rows" in figures) == ("200 in 2 logged steps", False)


def test_values_that_are_no_numbers_do_not_count(tmp_path):
    """A damaged file, or one of another program, may hold them."""
    lines = [step(1), step(2, tokens=math.nan, step_seconds=math.inf), step(3, fold_ratio=math.inf, targets=math.nan)]
    figures = data_figures(read_run(make_run(tmp_path / "run", lines), "run"))
    assert figures["tokens"] == "200 in 3 logged steps"
    assert figures["targets"] == "20 in 3 logged steps"
    assert figures["fold ratio"].startswith("2.00 ")
    assert figures["time in steps"] == "60 s"


def test_a_run_that_a_newer_version_went_on_with_has_one_curve(tmp_path):
    older = [step(i) | {"train/tokens_per_second": 10.0 * i} for i in (1, 2)]
    newer = [step(3) | {"train/tokens_per_second": 1.0, "train/effective_tokens_per_second": 30.0}]
    text = as_markdown(build_report([read_run(make_run(tmp_path / "run", older + newer), "run")], [], 0)[1])
    assert "Throughput (tokens/s): run: 10 at step 1, 30 at step 3" in text


def test_a_run_with_a_strange_name_is_not_said_to_have_no_values(tmp_path):
    runs = read_runs([str(make_run(tmp_path / name, [step(1)])) for name in ("bell\x07", "other")])
    text = as_markdown(build_report(runs, [], 0)[1])
    assert "training loss" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0042, "4 ms"), (0.31, "0.3 s"), (59.7, "60 s"), (100, "2 min"), (7322, "2.0 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_state_says_how_far_a_run_has_come(tmp_path):
    folder = make_run(tmp_path / "run", [step(1), step(2), step(3)], {"total_training_steps": 8})
    assert read_run(folder, "run").status == "step 3 of 8: still running, or stopped"
    save_checkpoint(folder, 2)
    run = read_run(folder, "run")
    assert run.status == "step 3 of 10: still running, or stopped"
    save_checkpoint(folder, 10)
    assert read_run(folder, "run").status == "finished after 10 steps"


def test_the_command_is_shown_as_it_was_typed(tmp_path):
    command = "torchrun -m dsft.train --prompt_key 'two\nlines\x07' --lr 1e-3"
    runs = [make_run(tmp_path / name, [step(1)]) for name in "ab"]
    text = (runs[0] / "config.yaml").read_text()
    (runs[0] / "config.yaml").write_text(with_command(text, command))
    first, second = read_runs([str(run) for run in runs])
    assert first.flags == second.flags == FLAGS
    reports = [as_markdown(build_report(shown, [], 0)[1]) for shown in ([first], [second], [first, second])]
    shown = "```bash\ntorchrun -m dsft.train --prompt_key 'two lines\\u0007' --lr 1e-3\n```"
    assert [shown in report for report in reports] == [True, False, True]
    assert ["## Reproduce" in report for report in reports] == [True, False, True]
    assert f"### a\n\n{shown}\n" in reports[2]


def test_names_tell_runs_apart(tmp_path):
    folders = [make_run(tmp_path / name, [step(1)]) for name in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs([str(folders[0])])] == ["run"]
    assert [run.name for run in read_runs([str(f) for f in folders[1:]])] == ["run", "other"]
    assert [run.name for run in read_runs([str(f) for f in folders])] == ["a/run", "b/run", "b/other"]


def test_an_unreadable_folder_is_one_line(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    assert message(read_runs, [str(folder)]) == (
        f"{folder}/metrics.jsonl cannot be read: Is a directory; make it readable, or choose another"
    )
    assert "no such folder" in message(read_runs, [str(tmp_path / "no")])


# What dsft.validate has found


def game(folder: Path, name: str, model: str, episodes: list[tuple[int, bool, list[str]]], **more: object) -> None:
    solved = sum(won for _, won, _ in episodes)
    report = {
        "model": model, "adapter": None, "episodes": len(episodes), "success_rate": solved / len(episodes),
        "success_interval": [0.25, 0.75], "moves_over_optimum": 0.5 if solved else None, "invalid_answer_rate": 0.125,
        "settings": {"env": "sokoban", "seed": 3}, "versions": {"dsft": "1"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report | more))
    rows = [
        {
            "seed": seed, "level": f"level {seed}", "solved": won, "turns": len(answers),
            "messages": [{"role": "user", "content": f"room {seed}"}]
            + [{"role": "assistant", "content": answer} for answer in answers],
        }
        for seed, won, answers in episodes
    ]  # fmt: skip
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pipeline(tmp_path) -> Path:
    root = tmp_path / "pipe"
    make_run(root / "train", [step(1)], {"output_dir": "elsewhere/pipe/train"})
    (root / "data").mkdir()
    (root / "data" / "generate.json").write_text(json.dumps({"levels": {"train": 1000, "test": 40}}))
    steps = {
        "generate": {"env": "sokoban", "output_dir": "pipe/data"},
        "train": FLAGS | {"output_dir": "pipe/train", "train_files": ["pipe/data/a"]},
    }
    (root / "pipeline.json").write_text(json.dumps({s: {"flags": f, "done": True} for s, f in steps.items()}))
    episodes = [(1, True, ["Up"]), (2, False, ["no", "nope"]), (3, True, ["Left"])]
    folder = root / "validate"
    game(folder, "random", "random", episodes)
    game(folder, "expert", "expert", episodes)
    game(folder, "fine-tuned_model", "elsewhere/pipe/merged", episodes)  # the folder was moved since
    game(folder, "base_model", "some/model", [(2, False, ["what?"]), (1, False, ["eh"])])
    (folder / "notes.json").write_text("{}")
    return root


def test_the_players_of_a_pipeline(pipeline):
    [run] = read_runs([str(pipeline)])
    reports = find_eval_reports([run], [])
    lines = game_lines(reports)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["base model", "fine-tuned model", "expert", "random"]
    cells = [[cell.strip() for cell in line.split("|")[2:5]] for line in lines[2:]]
    assert cells[0] == ["0.0% (25.0% to 75.0%)", "none solved", "12.5%"]
    assert cells[1] == ["66.7% (25.0% to 75.0%)", "0.50", "12.5%"]
    assert data_figures(run)["levels"] == "1,000 for training, 40 for validation"
    assert run.name == "pipe"
    text = as_markdown(build_report([run], reports, 2)[1])
    assert "\n".join(lines) in text


def test_read_from_within_its_folder_a_pipeline_has_the_same_players(pipeline, monkeypatch):
    """There the name of a player, or of a model of the Hub, would be a path below it."""
    monkeypatch.chdir(pipeline)
    [run] = read_runs(["."])
    players = [report.model for report in find_eval_reports([run], [])]
    assert players == ["base model", "fine-tuned model", "expert", "random"]


def test_a_solved_and_a_failed_level_come_first_with_the_base_models_answers(pipeline):
    [run] = read_runs([str(pipeline)])
    found = find_eval_reports([run], [])
    text = as_markdown(samples(run, found, 2))
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### A level that the fine-tuned model solved (seed 1)",
        "### A level that the fine-tuned model failed (seed 2)",
    ]
    assert (
        "base model: failed in 1 answers:\n\n```\neh\n```\n\nfine-tuned model: solved in 1 answers:\n\n```\nUp" in text
    )
    assert "```\nno\nnope\n```" in text
    assert "seed 3" in as_markdown(samples(run, found, 3))
    assert samples(run, found, 0) == []


def test_answers_to_dialogues_stand_beside_the_rows_own_response(tmp_path):
    """Whatever letters they hold: U+2028 ends a line for some readers, and is no end of one in JSON."""
    root = make_run(tmp_path / "run", [step(1)])
    rows = [{"p": [{"role": "user", "content": f"question {i}"}], "r": {"content": f"response {i}"}} for i in range(3)]
    data = write_parquet(tmp_path / "rows.parquet", rows)
    settings = {"env": None, "data": str(data), "prompt_key": "p", "response_key": "r"}
    report = {
        "model": str(root / "merged"), "adapter": None, "val/loss": 0.5, "val/perplexity": math.exp(0.5), "answers": 2,
        "well_formed_rate": 1.0, "well_formed_interval": [0.3, 1.0], "settings": settings,
    }  # fmt: skip
    (root / "r.json").write_text(json.dumps(report))
    answered = [json.dumps({"row": i, "answer": f"answer {i}\u2028"}, ensure_ascii=False) + "\n" for i in (0, 2)]
    (root / "r.jsonl").write_text("".join(answered), encoding="utf-8")
    [run] = read_runs([str(root)])
    [answered] = find_eval_reports([run], [])
    assert (answered.model, answered.is_game) == (TUNED, False)
    text = as_markdown(samples(run, [answered], 5))
    assert "### Row 2\n\n```\nquestion 2\n```\n\nfine-tuned model:\n\n```\nanswer 2\\u2028\n```" in text
    assert "the row's response:\n\n```\nresponse 2\n```" in text
    data.unlink()
    assert "response" not in as_markdown(samples(run, [answered], 5))


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None}, {"success_interval": [0.1]}, {"success_rate": "high"}, {"episodes": None}, {"model": ...},
        {"invalid_answer_rate": None}, {"moves_over_optimum": "few"},
    ],
)  # fmt: skip
def test_json_files_that_are_no_reports_are_passed_over(pipeline, change):
    path = pipeline / "validate" / "random.json"
    report = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in report.items() if value is not ...}))
    [run] = read_runs([str(pipeline)])
    found = find_eval_reports([run], [])
    build_report([run], found, 1)
    assert [report.model for report in found] == ["base model", "fine-tuned model", "expert"]


def test_two_pipelines_name_their_players(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "second")
    runs = read_runs([str(pipeline), str(tmp_path / "second")])
    found = find_eval_reports(runs, [])
    text = as_markdown(build_report(runs, found, 1)[1])
    for name in ("pipe", "second"):
        assert f"| fine-tuned model, {name} " in text
    assert text.count("### A level that the fine-tuned model solved") == 2


def test_long_answers_are_cut():
    assert shortened("a" * 10, 10) == "a" * 10
    assert shortened("a" * 1010, 10) == "a" * 10 + "\n… (1,000 more characters)"


def test_a_file_of_episodes_that_is_gone_or_damaged(pipeline):
    [run] = read_runs([str(pipeline)])
    tuned = next(r for r in find_eval_reports([run], []) if r.model == TUNED)
    tuned.path.with_suffix(".jsonl").write_text("{")
    assert samples(run, [tuned], 3) == []
