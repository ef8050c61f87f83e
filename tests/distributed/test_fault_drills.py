"""The fault drills: their plan, that their checks can fail, and a few of them carried out."""

import hashlib
import json
import random
import shutil
import signal
import sys
from collections import Counter

import pytest

from tests.helpers import ROOT, run

sys.path.insert(0, str(ROOT / "scripts"))
import fault_drills as drills
import fault_worker as worker
from fault_drills import BrokenRun, Drill, Mix, Run

MIX = Mix("sync", "lora", "fsdp", "none")


# The plan


def test_a_plan_follows_from_its_seed_and_keeps_to_some_mixes():
    assert all(str(drill.mix).startswith("fsdp/none/") for drill in drills.plan(8, 1, ["corrupt"], "fsdp/none"))
    assert drills.plan(60, 1) == drills.plan(60, 1)
    assert drills.plan(60, 1) != drills.plan(60, 2)


def test_every_kind_meets_every_mix_that_it_can():
    planned = drills.plan(200, 1)
    assert [drill.number for drill in planned] == list(range(200))
    for kind in drills.ON_ONE_MACHINE:
        rules = drills.KINDS[kind]
        mixes = [drill.mix for drill in planned if drill.kind == kind]
        assert 15 <= len(mixes) <= 16
        assert set(mixes) <= set(drills.mixes_of(kind))
        for feature in ("backend", "method", "saving", "launcher"):
            counts = Counter(getattr(mix, feature) for mix in mixes)
            assert len(counts) == (len(rules.launchers) if feature == "launcher" else 2), (kind, feature)
            assert max(counts.values()) - min(counts.values()) <= 3, (kind, feature, counts)
    assert {drill.mix for drill in planned} == set(drills.mixes_of("kill-all"))
    on_hosts = drills.plan(40, 1, ["kill-host", "cut-link", "slow-link", "late-host"])
    assert {drill.mix for drill in on_hosts} == set(drills.mixes_of("kill-host"))


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
    for link in ("latest", "best"):
        (out / link).symlink_to(f"checkpoint-{drills.STEPS:06d}")
    (out / "metrics.jsonl").write_text(lines(range(1, drills.STEPS + 1)))
    return out


def broken(kind, tmp_path, reference):
    """A run that was broken at step 9, and has checkpoint 8."""
    made = BrokenRun(Drill(0, kind, MIX, 0), 1, reference, tmp_path / kind)
    for step in (6, 8):
        checkpoint(made.out, step)
    (made.out / "metrics.jsonl").write_text(lines(range(1, 10)))
    return made


def printed(text, tmp_path):
    """A command that has printed `text` and ended."""
    ended = Run([sys.executable, "-c", f"print({text!r})"], tmp_path / "logs" / "1")
    assert ended.has_ended(20)
    return ended


def resumed(step):
    return f"resumed  /x/checkpoint-{step:06d}, resuming at step {step + 1}\noutput   /x"


@pytest.mark.parametrize(
    ("text", "metrics", "failure"),
    [
        (resumed(8), lines(range(1, 15)), None),
        (resumed(6), lines(range(1, 15)), "no step lost: it resumed from 6 instead of 8"),
        ("output   /x", lines(range(1, 15)), "no step lost: it resumed from 0 instead of 8"),
        (resumed(8), lines([*range(1, 9), *range(10, 15)]), "sequence: "),  # step 9 is missing
        (resumed(8), lines([*range(1, 10), *range(9, 15)]), "sequence: "),  # step 9 twice
        (resumed(8), lines(range(1, 15), (15, "train/loss", 11.333333333333336)), "sequence: "),  # the last bit
        (resumed(8), lines(range(1, 15), (11, "val/loss", 0.1251)), "sequence: "),
    ],
    ids=["good", "too early", "from zero", "a step missing", "a step twice", "another loss", "validation"],
)
def test_a_run_that_resumes_wrongly_is_found_out(tmp_path, reference, text, metrics, failure):
    made = broken("kill-all", tmp_path, reference)
    made.take_stock()
    (made.out / "metrics.jsonl").write_text(metrics)
    made.check_resumed(printed(text, tmp_path))
    assert made.failures == [] if failure is None else any(text.startswith(failure) for text in made.failures)
    assert made.repeated == 9 - int(text.partition(",")[0][-6:] if "," in text else 0)


@pytest.mark.parametrize(
    ("steps", "change", "failure"),
    [
        (drills.STEPS, lambda out: None, None),
        (drills.STEPS - 1, lambda out: None, "sequence: metrics.jsonl has None instead of"),
        (
            drills.STEPS,
            lambda out: (out / f"checkpoint-{drills.STEPS:06d}" / "optimizer.safetensors").write_text("other"),
            "weights: optimizer.safetensors differs",
        ),
        (drills.STEPS, lambda out: (out / ".latest.tmp").touch(), "no temporary files: "),
        (drills.STEPS, lambda out: (out / "checkpoint-000010").mkdir(), "no temporary files: "),
        (drills.STEPS, lambda out: (out / "latest").unlink(), "latest: "),
    ],
)
def test_the_end_of_a_run_is_checked(tmp_path, reference, steps, change, failure):
    made = broken("kill-all", tmp_path, reference)
    made.take_stock()
    checkpoint(made.out, drills.STEPS)
    for link in ("latest", "best"):
        (made.out / link).symlink_to(f"checkpoint-{drills.STEPS:06d}")
    change(made.out)
    (made.out / "metrics.jsonl").write_text(lines(range(1, steps + 1)))
    made.check_finished(printed(resumed(8), tmp_path), True)
    assert made.failures == [] if failure is None else any(text.startswith(failure) for text in made.failures)


def test_a_stop_signal_must_save_the_last_step(tmp_path, reference):
    made = broken("term", tmp_path, reference)
    made.take_stock()
    assert made.failures == ["saved the running step: 1 steps after the newest checkpoint"]


def test_a_checkpoint_that_a_start_has_found_must_not_vanish(tmp_path, reference):
    made = broken("kill-all", tmp_path, reference)
    made.take_stock()
    shutil.rmtree(made.out / "checkpoint-000008")
    made.take_stock()
    assert "no checkpoint lost: 8 was sound, the newest is 6" in made.failures


@pytest.mark.parametrize("damage", drills.DAMAGES)
@pytest.mark.parametrize("name", ["COMPLETE", "trainer_state.json", "optimizer.safetensors"])
def test_every_damage_is_seen(tmp_path, damage, name):
    for step in (6, 8):
        checkpoint(tmp_path, step)
    newest, older = tmp_path / "checkpoint-000008", tmp_path / "checkpoint-000006"
    assert drills.newest_sound(tmp_path) == 8
    drills.spoil(newest / name, damage, random.Random(1), older / name)
    assert drills.newest_sound(tmp_path) == 6


def test_tracebacks_of_the_launcher_are_not_ours():
    ours = f'Traceback (most recent call last):\n  File "{ROOT}/dsft/training/trainer.py", line 1, in x\nKeyError: 1\n'
    theirs = 'Traceback (most recent call last):\n  File "/lib/torch/run.py", line 1, in x\nChildFailedError\n'
    assert not drills.own_traceback(theirs)
    assert drills.own_traceback(theirs + ours)
    assert drills.own_traceback("terminate called without an active exception")


# The faults


def test_the_worker_knows_the_path_of_every_operation(tmp_path):
    assert worker.touched_path("a/../b", None) == str(worker.Path.cwd() / "b")
    assert worker.touched_path(3, None) == ""
    folder = worker.os.open(tmp_path, worker.os.O_RDONLY)
    assert worker.touched_path("x", folder) == str(tmp_path / "x")
    worker.os.close(folder)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("kill", []),
        ("disk-full", ["read 1", "log 28", "write 28", "link None", "below 28", "beside None"]),
        ("read-only", ["read 1", "log None", "write 30", "link 30", "below 30", "beside None"]),
    ],
)
def test_a_fault_breaks_what_a_real_one_breaks(tmp_path, action, expected):
    """From the third operation below the folder on; 28 and 30 are ENOSPC and EROFS, None no error."""
    root = tmp_path / "out"
    (root / ".checkpoint-000002.tmp").mkdir(parents=True)
    fault = {"root": str(root), "rank": 0, "save": 2, "pattern": "", "nth": 3, "delay": 0.0, "action": action}
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import fault_worker
root = {str(root)!r}
log = open(root + "/metrics.jsonl", "a", buffering=1)
fault_worker.inject({fault | {"marker": str(tmp_path / "marker")}!r}, 0)
def error(name, work):
    try:
        print(name, work())
    except OSError as error:
        print(name, error.errno)
def write(path):
    with open(path, "w") as file: file.write("x")
write(root + "/.checkpoint-000002.tmp/1")
os.replace(root + "/.checkpoint-000002.tmp/1", root + "/2")
error("read", lambda: len(open(root + "/2").read()))
error("log", lambda: log.write("x\\n") and None)
error("write", lambda: write(root + "/3"))
error("link", lambda: os.symlink("2", root + "/4"))
error("below", lambda: write(root + "/.checkpoint-000002.tmp/5"))
error("beside", lambda: write(root + "-beside"))
os._exit(0)
"""
    done = run([sys.executable, "-u", "-c", code])
    assert done.out.splitlines() == expected, done.err
    assert done.status == (-signal.SIGKILL if action == "kill" else 0)
    assert "open 2" in (tmp_path / "marker").read_text()


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
    assert [result["number"] for result in results] == [0, 1, 2, 3]
    for result in results:
        assert {"sequence", "no step lost", "weights", "latest"} <= set(result["checks"]), result


@pytest.mark.slow
def test_a_validation_that_a_stop_has_put_off_is_made_up_for(tmp_path, monkeypatch):
    """Without writing the checkpoint again."""
    monkeypatch.setattr(drills, "work_folder", lambda: tmp_path)
    drills.make_inputs(tmp_path / "model")
    out = tmp_path / "out"
    words = drills.command(MIX, out, eval_steps=1)  # every stop comes before a validation
    first = Run(words, tmp_path / "1")
    first.wait_until(lambda: drills.last_step(out) >= 5, 0.01)
    first.process.send_signal(signal.SIGTERM)
    assert first.has_ended(60)
    assert first.status == 0, first.read("err")
    step = drills.newest_sound(out)
    checkpoint = out / f"checkpoint-{step:06d}"
    before = (checkpoint / "COMPLETE").stat().st_mtime_ns
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert Run([*words, "--stop_after_steps", str(step)], tmp_path / "2").has_ended(60)
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
    assert "unknown kind 'kil-rank'" in done.err
