"""The fault drills: their plan, that their checks can fail, and a few of them carried out."""

import hashlib
import json
import random
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections import Counter

import pytest

from tests.helpers import ROOT, run

sys.path.insert(0, str(ROOT / "scripts"))
import fault_drills as drills
import fault_worker as worker
from fault_drills import Drill, Life, Mix, Reference, Result, Run

MIX = Mix("fsdp", "none", "lora", "sync")


# The plan


def test_a_plan_follows_from_its_seed():
    assert drills.plan(60, 1) == drills.plan(60, 1)
    assert drills.plan(60, 1) != drills.plan(60, 2)


def test_every_kind_meets_every_mix_that_it_can():
    planned = [drill for life in drills.plan(200, 1) for drill in life]
    assert sorted(drill.number for drill in planned) == list(range(200))
    for kind, rules in drills.KINDS.items():
        mixes = [drill.mix for drill in planned if drill.kind == kind]
        assert 15 <= len(mixes) <= 16
        for feature in ("backend", "method", "saving"):
            counts = Counter(getattr(mix, feature) for mix in mixes)
            assert len(counts) == 2, (kind, feature)
            assert max(counts.values()) - min(counts.values()) <= 3, (kind, feature, counts)
        allowed = [one for one in rules.launchers if one != "none" or not rules.launched]
        launchers = Counter(mix.launcher for mix in mixes)
        assert set(launchers) == set(allowed)
        if "none" in allowed:
            assert launchers["none"] > max(launchers["torchrun"], launchers["deepspeed"])  # the cheap one
    assert len({drill.mix for drill in planned}) == len(drills.MIXES)


def test_a_plan_can_be_kept_to_some_mixes():
    planned = [drill for life in drills.plan(8, 1, ["kill-all", "corrupt"], "fsdp/none") for drill in life]
    assert len(planned) == 8
    assert all(str(drill.mix).startswith("fsdp/none/") for drill in planned)


def test_the_drills_of_a_life_follow_each_other():
    for life in drills.plan(200, 3):
        assert len({drill.mix for drill in life}) == 1
        assert len(life) <= drills.DRILLS_A_LIFE
        elastic = [drill.kind == "elastic" for drill in life]
        assert all(elastic) or not any(elastic)
        ends = [edge for drill in life for edge in (drill.first, drill.last)]
        assert ends == sorted(ends)
        assert ends[0] >= 1
        assert ends[-1] < drills.STEPS


# The checks, which must be able to fail


def lines(steps, change=None):
    """metrics.jsonl of a run, with a validation every second step."""
    values = []
    for step in steps:
        keys = dict.fromkeys(drills.STEP_KEYS, step + 1 / 3) | {"step": step, "train/step_seconds": random.random()}
        values.append(keys)
        if step % 2 == 0:
            values.append({"step": step, "epoch": 0.5, "val/loss": 1 / step})
    if change:
        index, key, value = change
        values[index][key] = value
    return "".join(json.dumps(value) + "\n" for value in values)


def checkpoint(out, step):
    """A sound checkpoint, as far as the drills look at one."""
    folder = out / f"checkpoint-{step:06d}"
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "adapter_model.safetensors", "optimizer.safetensors"):
        (folder / name).write_text(f"{name} of {step}")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "COMPLETE").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
    return folder


@pytest.fixture
def reference(tmp_path):
    out = tmp_path / "reference"
    checkpoint(out, drills.STEPS)
    (out / "best").symlink_to(f"checkpoint-{drills.STEPS:06d}")
    (out / "metrics.jsonl").write_text(lines(range(1, drills.STEPS + 1)))
    times = [(0.1 * step, step) for step in range(1, drills.STEPS + 1)]
    return Reference(out, drills.sequence(out / "metrics.jsonl"), times, {0: 9}, 10_000)


@pytest.fixture
def life(tmp_path, reference):
    """A life whose run has been broken at step 9, and had checkpoint 8."""
    drill = Drill(0, "kill-all", MIX, 0, 4, 10)
    made = Life([drill], Namespace(seed=1, keep=True), drills.References())
    made.reference, made.folder, made.out, made.judged = reference, tmp_path, tmp_path / "out", []
    for step in (6, 8):
        checkpoint(made.out, step)
    (made.out / "metrics.jsonl").write_text(lines(range(1, 10)))
    made.pending = Result(drill)
    return made


def resumed(life, tmp_path, text, metrics):
    """What the drill's result is when the next start has printed `text` and metrics.jsonl is `metrics`."""
    life._take_stock(life.pending, before=0)
    (life.out / "metrics.jsonl").write_text(metrics)
    words = [sys.executable, "-c", f"print({text!r})"]
    started = Run(words, life.out, tmp_path / "logs" / "1")
    assert started.wait(20)
    life._judge_resumed(life.pending, started)
    return life.pending


def told(step):
    return f"resumed  /x/checkpoint-{step:06d}, resuming at step {step + 1}\noutput   /x"


def test_a_run_that_goes_on_as_it_should_passes(life, tmp_path):
    result = resumed(life, tmp_path, told(8), lines(range(1, 15)))
    assert result.failures == []
    assert (result.started_from, result.repeated) == (8, 1)


@pytest.mark.parametrize(
    ("text", "metrics", "failure"),
    [
        (told(6), lines(range(1, 15)), "no step lost: it went on from 6, not [8]"),
        ("output   /x", lines(range(1, 15)), "no step lost: it went on from 0, not [8]"),
        ("error: the folder is damaged", lines(range(1, 10)), "resumed: status"),
        (told(8), lines([*range(1, 9), *range(10, 15)]), "sequence: line 13"),  # step 9 is missing
        (told(8), lines([*range(1, 10), *range(9, 15)]), "sequence: line 14"),  # step 9 twice
        (told(8), lines(range(1, 15), (15, "train/loss", 11.333333333333336)), "sequence: line 16"),  # the last bit
        (told(8), lines(range(1, 15), (11, "val/loss", 0.1251)), "sequence: line 12"),
    ],
    ids=["too early", "from zero", "refused", "a step missing", "a step twice", "another loss", "validation"],
)
def test_a_run_that_does_not_is_found_out(life, tmp_path, text, metrics, failure):
    assert any(text.startswith(failure) for text in resumed(life, tmp_path, text, metrics).failures)


def test_what_a_dead_run_left_must_go(life, tmp_path):
    (life.out / ".checkpoint-000010.tmp").mkdir()
    (life.out / "checkpoint-000010").mkdir()  # renamed, and not marked
    result = resumed(life, tmp_path, told(8), lines(range(1, 15)))
    assert len(result.failures) == 1
    assert "left ['.checkpoint-000010.tmp', 'checkpoint-000010']" in result.failures[0]


@pytest.mark.parametrize(
    ("steps", "change", "failure"),
    [
        (range(1, drills.STEPS + 1), lambda out: None, None),
        (range(1, drills.STEPS), lambda out: None, "sequence: metrics.jsonl ends after"),
        (
            range(1, drills.STEPS + 1),
            lambda out: (out / f"checkpoint-{drills.STEPS:06d}" / "optimizer.safetensors").write_text("other"),
            "weights: optimizer.safetensors differs",
        ),
        (range(1, drills.STEPS + 1), lambda out: (out / ".latest.tmp").touch(), "no temporary files"),
        (range(1, drills.STEPS + 1), lambda out: (out / "latest").unlink(), "latest"),
    ],
)
def test_the_end_of_a_run_is_looked_at(life, tmp_path, steps, change, failure):
    checkpoint(life.out, drills.STEPS)
    for link in ("latest", "best"):
        (life.out / link).symlink_to(f"checkpoint-{drills.STEPS:06d}")
    change(life.out)
    life.pending.may_start_from, life.pending.marked = [8], ["checkpoint-000008"]
    (life.out / "metrics.jsonl").write_text(lines(steps))
    ended = Run([sys.executable, "-c", f"print({told(8)!r})"], life.out, tmp_path / "logs" / "1")
    assert ended.wait(20)
    life._judge_finished(ended, True)
    failures = life.judged[0].failures
    assert failures == [] if failure is None else any(text.startswith(failure) for text in failures)


def test_a_stop_that_was_asked_for_must_save_its_last_step(life):
    stopped = Result(Drill(1, "term", MIX, 0, 4, 10))
    life._take_stock(stopped, before=8)
    assert stopped.failures == ["saved where it stood: 1 steps after the newest checkpoint"]


def test_a_checkpoint_that_a_start_has_found_must_not_vanish(life):
    shutil.rmtree(life.out / "checkpoint-000008")
    life._take_stock(life.pending, before=8)
    assert "no checkpoint lost: 8 was whole, the newest now is 6" in life.pending.failures


@pytest.mark.parametrize("damage", drills.DAMAGES)
@pytest.mark.parametrize("name", ["COMPLETE", "trainer_state.json", "optimizer.safetensors"])
def test_every_damage_is_seen(tmp_path, damage, name):
    for step in (6, 8):
        checkpoint(tmp_path, step)
    newest, older = tmp_path / "checkpoint-000008", tmp_path / "checkpoint-000006"
    assert drills.allowed_starts(tmp_path) == [8]
    drills.spoil(newest / name, damage, random.Random(1), older / name)
    assert drills.soundness(newest) != "sound"
    assert 6 in drills.allowed_starts(tmp_path)
    assert (8 in drills.allowed_starts(tmp_path)) == (drills.soundness(newest) == "unverified")


def test_tracebacks_of_the_launcher_are_not_ours():
    ours = f'Traceback (most recent call last):\n  File "{ROOT}/dsft/training/trainer.py", line 1, in x\nKeyError: 1\n'
    theirs = 'Traceback (most recent call last):\n  File "/lib/torch/run.py", line 1, in x\nChildFailedError\n'
    assert drills.own_traceback(theirs)[0]
    assert not drills.own_traceback(theirs + ours)[0]
    assert not drills.own_traceback("terminate called without an active exception")[0]


def test_instants_are_spread_over_the_time_of_the_steps(reference):
    drawn = [reference.draw_instant(random.Random(i), 10, 20) for i in range(200)]
    assert {step for step, _ in drawn} >= set(range(10, 19))
    assert all(0 <= delay <= 0.1 + 1e-9 for _, delay in drawn)


def test_the_worker_knows_the_path_of_every_operation(tmp_path):
    assert worker.touched_path("a/../b", None) == str(worker.Path.cwd() / "b")
    assert worker.touched_path(3, None) == ""
    folder = worker.os.open(tmp_path, worker.os.O_RDONLY)
    assert worker.touched_path("x", folder) == str(tmp_path / "x")
    worker.os.close(folder)


# The real thing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_some_drills(tmp_path):
    """One rank; all that happens within a save, to the disk, and to a checkpoint."""
    report = tmp_path / "drills.json"
    done = run(
        [
            sys.executable, "scripts/fault_drills.py", "--drills", 4, "--jobs", 1, "--mixes", "/none/",
            "--kinds", "kill-in-save,kill-before-marker,corrupt,disk-full", "--output", report,
        ],
        timeout=800,
        env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.status == 0, done.out + done.err
    results = json.loads(report.read_text(encoding="utf-8"))["drills"]
    assert results
    for result in results:
        assert result["skipped"] or (result["checks"]["sequence"] and result["checks"]["no step lost"]), result


@pytest.mark.slow
def test_a_validation_that_a_stop_has_put_off_is_made_up_for_without_writing_the_checkpoint_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(drills, "work_folder", lambda: tmp_path)
    drills.make_inputs(tmp_path / "model")
    out = tmp_path / "out"
    words = drills.command(MIX, out, eval_steps=1)  # every stop comes before a validation
    first = Run(words, out, tmp_path / "1")
    while drills.last_step(out / "metrics.jsonl") < 5 and first.popen.poll() is None:
        time.sleep(0.01)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait(60)
    assert first.popen.returncode == 0, first.complained()
    (step,) = drills.allowed_starts(out)
    checkpoint = out / f"checkpoint-{step:06d}"
    before = (checkpoint / "COMPLETE").stat().st_mtime_ns
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert Run([*words, "--stop_after_steps", str(step)], out, tmp_path / "2").wait(60)
    *old, new = (out / "metrics.jsonl").read_text().splitlines()
    assert old == lines
    assert json.loads(new)["step"] == step
    assert "val/loss" in json.loads(new)
    assert (checkpoint / "COMPLETE").stat().st_mtime_ns == before
    assert (out / "best").resolve() == checkpoint.resolve()


def test_help_and_wrong_kinds():
    words = [sys.executable, "scripts/fault_drills.py"]
    assert "--only N" in run([*words, "--help"]).out
    done = run([*words, "--kinds", "kill-all,kil-rank"])
    assert done.status == 2
    assert "no such kind: kil-rank" in done.err
