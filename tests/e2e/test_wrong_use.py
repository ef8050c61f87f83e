"""Errors end a run with one line that says what, where and how to fix it, status 1 on every rank, and no hang."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsft.checkpointing.integrity import verify
from tests.commands import Commands
from tests.helpers import ROOT, Done, contents, flags, metrics, run, sign, start_words, write_parquet

SECONDS = 60  # of a busy machine
BOTH = [("fsdp", 2), ("zero3", 2)]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory) -> Iterator[None]:
    """A cache of these tests' own, in which nothing half-written may be left."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSFT_CACHE", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")  # enough for the tiny model, and two ranks do not fight for cores
        yield
    assert not list(folder.rglob("*.tmp"))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


class Command:
    """A command line that would train one step, with the values a test changes (None leaves a flag out)."""

    def __init__(self, commands: Commands, port: int, usual: dict[str, Any]) -> None:
        self._commands, self._port, self._usual = commands, port, usual

    def values(self, **changed: Any) -> dict[str, Any]:
        return {name: value for name, value in (self._usual | changed).items() if value is not None}

    def __call__(self, backend: str = "fsdp", ranks: int = 1, **changed: Any) -> list[str]:
        return [*start_words(backend, ranks, self._port), *flags(**self.values(**changed))]

    def run(self, backend: str = "fsdp", ranks: int = 1, **changed: Any) -> Done:
        """Without the time to import torch, and without a launcher."""
        return self._commands(self(backend, ranks, **changed))

    def again(self, words: list[str]) -> Done:
        return self._commands(words)


@pytest.fixture
def command(commands, tiny_model, uneven_rows, out, port) -> Command:
    usual = {
        "model": tiny_model,
        "train_files": uneven_rows,
        "output_dir": out,
        "train_batch_size": 4,
        "lora_rank": 4,
        "total_training_steps": 1,
        "dtype": "float32",
    }
    return Command(commands, port, usual)


def refused(done: Done, *parts: str, lines: int = 1, seconds: float = SECONDS) -> None:
    """The command has ended as an error that a user can cause must end."""
    assert done.status != 0, done.out
    assert len(done.errors) == lines, done.err
    for part in parts:
        assert part in "\n".join(done.errors)
    assert done.seconds < seconds
    assert not re.search(r'File "[^"]*dsft/', done.err), done.err
    for code in re.findall(r"exitcode\s*:\s*(-?\d+)", done.err):  # torchrun's table of failed ranks
        assert code in ("1", "-15"), done.err  # -15: still starting when the launcher ended it for its peer's error


def refused_alone(done: Done, *parts: str, lines: int = 1) -> None:
    """The same for one process, which prints nothing else."""
    refused(done, *parts, lines=lines)
    assert done.status == 1
    assert "Traceback" not in done.err
    assert done.err.splitlines() == done.errors


def nothing_in(folder: Path) -> None:
    """No checkpoint, no temporary file; the lock's file stays."""
    left = [p.name for p in folder.iterdir() if p.name != ".lock"] if folder.is_dir() else []
    assert not [name for name in left if name.startswith(("checkpoint-", ".", "latest", "best"))]


def complete(folder: Path) -> list[str]:
    """The checkpoints of a run, which must all be sound, with nothing unfinished beside them."""
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == [".lock"]
    found = sorted(p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d{6}", p.name))
    for path in found:
        verify(path)
        assert not list(path.glob(".*"))
        [weights] = [file for file in path.glob("*model*.safetensors") if file.name != "optimizer.safetensors"]
        assert all(torch.isfinite(t).all() for t in load_file(weights).values())
        assert json.loads((path / "trainer_state.json").read_text())["step"] == int(path.name[-6:])
    if found:
        assert (folder / "latest").resolve() == found[-1].resolve()
    return [path.name for path in found]


# Flags: checked before torch is imported and before anything is written


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"model": None, "train_files": None}, ["--model is required: ", "--train_files is required: "]),
        ({"lr": 0, "seed": -1}, ["lr must be above 0, got 0.0", "seed must be 0 or more, got -1"]),
    ],
    ids=["missing", "out of range"],
)
def test_wrong_flags_are_reported_together_and_start_nothing(command, out, changed, parts):
    """All others are command lines of docs/errors.yaml."""
    done = run(command(**changed))
    refused_alone(done, *parts, lines=2)
    assert done.seconds < 3
    assert not out.exists()


# Data: the message names the file and the row or column; no output folder is created


def bad_file(tmp_path: Path, kind: str) -> Path:
    file = tmp_path / "bad.parquet"
    good = {"prompt": "a question", "response": "an answer"}
    if kind == "empty table":
        pq.write_table(pa.table({name: pa.array([], pa.string()) for name in good}), file)
    elif kind == "empty file":
        file.write_bytes(b"")
    elif kind == "jsonl":
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(good) + "\n{\n")
    elif kind == "folder":
        file = tmp_path / "folder"
        file.mkdir()
    elif kind == "null prompt":
        write_parquet(file, [good, good | {"prompt": None}])
    elif kind == "null response":
        write_parquet(file, [good, good, good | {"response": None}])
    elif kind == "number":
        write_parquet(file, [good | {"response": 42}])
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("missing", ["--train_files", "bad.parquet: no such file"]),
        ("empty table", ["no rows in", "bad.parquet", "name files that contain some"]),
        ("empty file", ["bad.parquet is not a valid parquet file", "0 bytes"]),
        ("jsonl", ["rows.jsonl is not a valid jsonl file: line 2: Expecting", "correct it"]),
        ("folder", ["--train_files", "contains no *.parquet"]),
        ("null prompt", ["bad.parquet, row 1", "the prompt must be a string or a list", "got null"]),
        ("null response", ["bad.parquet, row 2", "the response must be a string or one", "got null"]),
        ("number", ["bad.parquet, row 0", "the response must be a string or one", "got int 42"]),
    ],
)
def test_wrong_data(command, tmp_path, out, kind, parts):
    refused_alone(command.run(train_files=bad_file(tmp_path, kind)), *parts)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"prompt_key": "promt"}, ["no column 'promt' (--prompt_key)", "did you mean 'prompt'?", "prompt, response"]),
        ({"val_files": "no/such/*.parquet"}, ["--val_files no/such/*.parquet: no such file"]),
        ({"max_length": 20}, ["row 0 has 46 tokens, max_length is 20", "--truncation left, right or drop"]),
        ({"max_length": 2, "truncation": "drop"}, ["no row of", "is left", "raise max_length (2)"]),
        (
            {"max_tokens_per_micro_batch": 10},
            ["max_tokens_per_micro_batch is 10, but the longest row has 115 tokens; raise it, or shorten rows with"],
        ),
    ],
    ids=["column", "val_files", "long row", "all dropped", "small micro-batch"],
)
def test_flags_that_do_not_fit_the_data(command, out, changed, parts):
    refused_alone(command.run(**changed), *parts)
    assert not out.exists()


# Models


def bad_model(tiny_model: Path, tmp_path: Path, kind: str) -> Path:
    model = tmp_path / "model"
    if kind == "none":
        return model
    shutil.copytree(tiny_model, model)
    weights, config = model / "model.safetensors", model / "config.json"
    if kind == "no weights":
        weights.unlink()
    elif kind == "bin":
        weights.rename(model / "pytorch_model.bin")
    elif kind == "no config":
        config.unlink()
    elif kind == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "other shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    elif kind == "unknown":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "perceptron"}))
    elif kind == "no tokenizer":
        for file in model.glob("tokenizer*"):
            file.unlink()
    elif kind == "nan":
        tensors = load_file(weights)
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("none", ["no such folder"]),
        ("no weights", ["the folder has no model.safetensors"]),
        ("bin", ["pickled weights (.bin, .pt) are not read, convert them to safetensors"]),
        ("no config", ["the folder has no config.json, so it is not a model"]),
        ("half", ["model.safetensors is not a valid safetensors file"]),
        ("other shape", ["mlp.", "has the shape [64, 32] in the weight files, but [96, 32] by config.json"]),
        ("unknown", ["cannot be loaded", "`perceptron`"]),
        ("no tokenizer", ["the tokenizer cannot be loaded"]),
    ],
)
def test_a_wrong_model(command, tiny_model, tmp_path, out, kind, parts):
    refused_alone(command.run(model=bad_model(tiny_model, tmp_path, kind)), "--model ", *parts)
    assert not out.exists()


@pytest.mark.slow
def test_a_hub_name_without_the_hub(command, out):
    done = run(command(model="nobody/such-model"), env={"HF_HUB_OFFLINE": "1"})
    refused_alone(done, "--model nobody/such-model: the tokenizer cannot be loaded")
    assert not out.exists()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (
            {"target_modules": "q_prj"},
            ["'q_prj' matches no module (did you mean 'q_proj'?)", "or all-linear"],
        ),
        ({"attn_implementation": "eagre"}, ['`attn_implementation="eagre"` is not supported', "eager"]),
    ],
    ids=["target_modules", "attn_implementation"],
)
def test_flags_that_do_not_fit_the_model(command, out, changed, parts):
    refused_alone(command.run(**changed), *parts)
    assert not out.exists()


# The output folder


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "proc"])
def test_an_output_folder_that_cannot_be_made(command, tmp_path, place):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "below" if place == "file" else Path("/proc/dsft")
    refused_alone(command.run(output_dir=folder), f"cannot write {folder}", "choose another folder")


def finished_run(
    commands: Commands, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory, more: dict[str, Any]
) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    usual = {"train_batch_size": 4, "lora_rank": 4, "total_training_steps": 1, "dtype": "float32"}
    words = flags(**{"model": model, "train_files": rows, "output_dir": folder, **usual, **more})
    done = commands([*start_words("fsdp", 1), *words])
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="module")
def one_step(commands, tiny_model, uneven_rows, tmp_path_factory) -> Path:
    """The output folder of a run of one step that has ended well."""
    return finished_run(commands, tiny_model, uneven_rows, tmp_path_factory, {})


def snapshot(folder: Path) -> dict[str, bytes]:
    """All but the words in the lock's file."""
    return {name: content for name, content in contents(folder).items() if name != ".lock"}


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"lr": 0.5, "seed": 3}, ["other flags: lr was 0.0001, is 0.5; seed was 1, is 3", "--resume_override lr,seed"]),
        ({"fold": "off"}, ["other flags: fold was batch, is off; use its values or another --output_dir"]),
        (
            {"lr": 0.5, "seed": 3, "resume_override": "lr"},
            ["other flags: seed was 1, is 3; ", "--resume_override seed"],
        ),
        ({"resume_override": "lrr"}, ["resume_override: lrr is not compared on resume (did you mean 'lr'?)"]),
        ({"resume": "never"}, ["contains checkpoint-000001 but --resume is never; choose another --output_dir"]),
        ({"resume": "/no/such/run"}, ["--resume /no/such/run: no such folder", "give a run's folder"]),
        ({"resume": str(ROOT / "tests")}, ["tests: no complete checkpoint in this folder"]),
    ],
    ids=["other run", "other fold", "one overridden", "no such override", "never", "no folder", "no checkpoint"],
)
def test_a_used_folder(command, one_step, out, changed, parts):
    shutil.copytree(one_step, out, symlinks=True)
    before = snapshot(out)
    refused_alone(command.run(**changed), *parts)
    assert snapshot(out) == before


@pytest.mark.slow
def test_other_rows_than_before(command, one_step, out, tmp_path):
    shutil.copytree(one_step, out, symlinks=True)
    other = write_parquet(tmp_path / "other.parquet", [{"prompt": "one", "response": "two"}] * 4)
    refused_alone(command.run(train_files=other), "was trained on other rows", "use the same files")
    assert complete(out) == ["checkpoint-000001"]
    done = command.run(train_files=other, resume_override="train_files")
    assert done.status == 0, done.err
    assert "already complete" in done.out


@pytest.mark.slow
def test_flags_that_are_overridden_hold_from_the_resume_on(command, one_step, out):
    shutil.copytree(one_step, out, symlinks=True)
    changed = {"total_training_steps": 2, "schedule": "constant", "warmup_ratio": 0, "lr": 1e-3}
    done = command.run(**changed, resume_override=",".join(changed))
    assert done.status == 0, done.err
    assert [(m["step"], m["train/lr"]) for m in metrics(out)] == [(1, 1e-4), (2, 1e-3)]
    assert complete(out) == ["checkpoint-000001", "checkpoint-000002"]
    again = command.run(**changed)  # they are the run's flags now
    assert again.status == 0, again.err


def damage(checkpoint: Path, what: str) -> None:
    """Damage a file; "other tensors" and "other flags" are whole files with a checksum of their own."""
    if what == "other tensors":
        shutil.copy(checkpoint / "adapter_model.safetensors", checkpoint / "optimizer.safetensors")
        sign(checkpoint)
    elif what == "other flags":
        (checkpoint / "config.yaml").write_text("half a li")
        sign(checkpoint)
    elif what == "optimizer.safetensors":
        (checkpoint / what).unlink()
    else:
        content = (checkpoint / what).read_bytes()
        (checkpoint / what).write_bytes(content[: len(content) // 2])


ALONE = "; no older checkpoint is intact; restore the file, or choose another --output_dir"
CHECKSUM = "its checksum does not match"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("trainer_state.json", [f"checkpoint-000001/trainer_state.json is damaged: {CHECKSUM}{ALONE}"]),
        ("adapter_model.safetensors", [f"checkpoint-000001/adapter_model.safetensors is damaged: {CHECKSUM}{ALONE}"]),
        ("optimizer.safetensors", [f"checkpoint-000001/optimizer.safetensors is missing{ALONE}"]),
        ("COMPLETE", [f"checkpoint-000001/COMPLETE is damaged: the list of checksums is incomplete{ALONE}"]),
        ("other tensors", ["optimizer.safetensors does not contain 'exp_avg.", "saved with another model"]),
        (
            "other flags",
            ["checkpoint-000001/config.yaml cannot be read (not a mapping of flags); choose another checkpoint"],
        ),
    ],
)
def test_a_damaged_checkpoint(command, one_step, out, what, parts):
    shutil.copytree(one_step, out, symlinks=True)
    damage(out / "checkpoint-000001", what)
    before = snapshot(out)
    refused_alone(command.run(), *parts)
    assert {name: before[name] for name in before if "/" in name} == {
        k: v for k, v in snapshot(out).items() if "/" in k
    }


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("fsdp", 1), *BOTH])
def test_a_damaged_checkpoint_with_a_sound_one_beside_it(command, three_steps, out, backend, ranks):
    shutil.copytree(three_steps, out, symlinks=True)
    damage(out / "checkpoint-000003", "optimizer.safetensors")
    damage(out / "checkpoint-000002", "adapter_model.safetensors")
    words = command(backend, ranks, **THREE_STEPS)
    refused(
        command.again([*words, "--resume", out / "checkpoint-000003"]),
        f"{out}/checkpoint-000003/optimizer.safetensors is missing; use {out}/checkpoint-000001, which is intact",
    )
    done = command.again(words)
    assert done.status == 0, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    wrong = {3: "optimizer.safetensors is missing", 2: f"adapter_model.safetensors is damaged: {CHECKSUM}"}
    assert warnings == [
        f"warning: {out}/checkpoint-00000{step}/{what}; renamed to checkpoint-00000{step}.damaged, resuming from "
        "checkpoint-000001"
        for step, what in wrong.items()
    ]
    assert "resuming at step 2" in done.out
    assert complete(out) == [f"checkpoint-{step:06d}" for step in (1, 2, 3)]
    assert sorted(p.name for p in out.glob("*.damaged")) == ["checkpoint-000002.damaged", "checkpoint-000003.damaged"]
    for resumed, straight in zip(metrics(out), metrics(three_steps), strict=True):
        assert resumed["train/loss"] == pytest.approx(straight["train/loss"], rel=1e-5)


# Two runs in one folder


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "used"), [(1, False), (2, True)], ids=["new folder", "used folder"])
def test_two_runs_started_at_once_in_one_folder(command, out, tmp_path, used, ranks):
    """One is refused; the other one's numbers are those of a run that was alone."""
    steps = {"total_training_steps": 10_000, "save_steps": 10, "lr": 1e-3, "max_tokens_per_micro_batch": 1000}
    alone = tmp_path / "alone"
    assert command.run("fsdp", ranks, **steps, stop_after_steps=30, output_dir=alone).status == 0
    if used:
        shutil.copytree(alone, out, symlinks=True)
        shutil.rmtree(out / "checkpoint-000030")
    words = command("fsdp", ranks, **steps)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while all(process.poll() is None for process in both):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        loser, winner = sorted(both, key=lambda process: process.poll() is None)
        while len(metrics(out)) < 35:
            assert winner.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        winner.send_signal(signal.SIGTERM)
        stdout, stderr = winner.communicate(timeout=60)
        assert winner.returncode == 0 or ranks == 2, stderr  # torchrun has a status of its own where it is signalled
        assert "stopped by SIGTERM after step" in stdout
        refused(
            Done(loser.returncode, *loser.communicate(), seconds=0),
            f"{out} belongs to a run that is still running (process ",
            "wait for it, or choose another --output_dir",
        )
    finally:
        for process in both:
            process.kill()
    assert complete(out)[:3] == [f"checkpoint-{step:06d}" for step in (10, 20, 30)]
    assert not list(out.glob("*.*ed"))
    compared = ("step", "train/loss", "train/grad_norm", "train/lr")
    theirs, ours = ([[line[key] for key in compared] for line in metrics(folder)] for folder in (out, alone))
    assert theirs[: len(ours)] == ours[: len(theirs)]
    for step in (10, 20, 30):
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            paths = [folder / f"checkpoint-{step:06d}" / name for folder in (out, alone)]
            assert paths[0].read_bytes() == paths[1].read_bytes()


# Several ranks: one speaks, all end.

BY_LAUNCHER = ("flag", "row")  # which adds its own lines; the others are ranks without one

FORGETFUL = """
from transformers import LlamaConfig, LlamaForCausalLM

class ForgetfulConfig(LlamaConfig):
    model_type = "forgetful"

class ForgetfulForCausalLM(LlamaForCausalLM):
    config_class = ForgetfulConfig

    def forward(self, input_ids=None, position_ids=None, tree=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
"""


def forgetful_model(tiny_model: Path, folder: Path) -> None:
    """A model of a user's own code, which keeps the structure of folded rows from its layers."""
    shutil.copytree(tiny_model, folder)
    (folder / "forgetful.py").write_text(FORGETFUL)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "forgetful.ForgetfulConfig", "AutoModelForCausalLM": "forgetful.ForgetfulForCausalLM"}
    config |= {"model_type": "forgetful", "architectures": ["ForgetfulForCausalLM"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "ranks", "what"),
    [("fsdp", 2, what) for what in ("flag", "row", "shape", "damaged", "folder")]
    + [("zero3", 2, what) for what in ("row", "target", "damaged", "cut")]
    + [(*arm, what) for arm in BOTH for what in ("tokens", "model")],
)
def test_two_ranks_speak_with_one_voice(command, tiny_model, tmp_path, one_step, out, backend, ranks, what):
    changed, parts = {
        "flag": ({"total_epoch": 1}, ["unknown flag --total_epoch"]),
        "row": ({"train_files": bad_file(tmp_path, "null prompt")}, ["bad.parquet, row 1"]),
        "target": ({"target_modules": "q_prj"}, ["'q_prj' matches no module"]),
        "shape": ({"model": tmp_path / "model"}, ["has the shape [64, 32]"]),
        "damaged": ({}, ["optimizer.safetensors does not contain 'exp_avg.", "choose another checkpoint"]),
        "cut": ({}, [f"adapter_model.safetensors is damaged: {CHECKSUM}{ALONE}"]),
        "folder": ({"output_dir": tmp_path / "bad.parquet" / "below"}, ["cannot write"]),
        "tokens": ({"max_tokens_per_micro_batch": 10}, ["max_tokens_per_micro_batch is 10, but the longest row has"]),
        "model": (
            {"model": tmp_path / "model", "trust_remote_code": True},
            ["2 of this model's 2 layers do not follow folded rows; use --attn_implementation eager"],
        ),
    }[what]
    if what == "shape":
        bad_model(tiny_model, tmp_path, "other shape")
    elif what == "model":
        forgetful_model(tiny_model, tmp_path / "model")
    elif what in ("damaged", "cut"):
        shutil.copytree(one_step, out, symlinks=True)
        damage(out / "checkpoint-000001", "other tensors" if what == "damaged" else "adapter_model.safetensors")
    elif what == "folder":
        (tmp_path / "bad.parquet").write_text("")
    words = command(backend, ranks, **changed)
    refused(run(words) if what in BY_LAUNCHER else command.again(words), *parts)
    assert what in ("damaged", "cut") or not out.exists() or (what == "model" and not complete(out))


RANK_1_DIFFERS = """
import json, os, signal, sys
from pathlib import Path

rank = int(os.environ["RANK"])
*each, record = json.loads(sys.argv[-1])
folder, words = each[rank]
child = os.fork()
if child == 0:
    os.chdir(folder)
    sys.argv = ["dsft/train.py", *words]
    from dsft.train import main
    main()
    sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the child; this process tells how it ended
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
Path(record, f"status{rank}").write_text(str(status))
sys.exit(status != 0)
"""


def run_differing(tmp_path: Path, *each: tuple[Path, list[str]]) -> tuple[Done, list[int]]:
    """Two ranks under torchrun, each with a working directory and flags of its own, and how they ended."""
    script = tmp_path / "rank_1_differs.py"
    script.write_text(RANK_1_DIFFERS)
    launcher = start_words("fsdp", 2)[:-3]
    argument = json.dumps([*((str(folder), words) for folder, words in each), str(tmp_path)])
    done = run([*launcher, script, argument], env={"PYTHONPATH": str(ROOT)})
    return done, [int((tmp_path / f"status{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"lr": 0.5}, ["the flags on rank 1 (lr: 0.5) differ from rank 0's (lr: 0.0001)", "start all ranks alike"]),
        ({"model": "/no/such/model"}, ["the flags on rank 1 (model: /no/such/model) differ"]),
        ({"val_files": "no.parquet"}, ["the flags on rank 1 (", "no.parquet", "differ"]),
        ({"lrr": 1}, ["unknown flag --lrr"]),
    ],
    ids=["lr", "model", "val_files", "unknown flag"],
)
def test_flags_that_differ_on_one_rank(command, tmp_path, out, changed, parts):
    each = [(ROOT, flags(**command.values(**values))) for values in ({}, changed)]
    done, statuses = run_differing(tmp_path, *each)
    refused(done, *parts)
    # A rank whose own flags are good waits for the other inside a library, where only the launcher can end it.
    assert statuses in ([1, 1], [-signal.SIGTERM, 1] if "lrr" in changed else [])
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("no rows", ["--train_files rows.parquet: no such file"]),
        ("other rows", ["the rows of --train_files or --val_files on rank 1", "give all machines the same files"]),
        ("no model", ["--model ./model: no such folder"]),
        (
            "no checkpoint",
            ["out/checkpoint-000001 exists on rank 0, but not on rank 1; all machines must see the same folder"],
        ),
    ],
)
def test_files_that_differ_on_one_rank(command, tmp_path, tiny_model, uneven_rows, one_step, what, parts):
    """As on two machines that share no disk: the flags are the same, the files are not."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        shutil.copy(uneven_rows, folder / "rows.parquet")
    if what == "no rows":
        (there / "rows.parquet").unlink()
    elif what == "other rows":
        write_parquet(there / "rows.parquet", [{"prompt": "one", "response": "two"}])
    elif what == "no model":
        (here / "model").symlink_to(tiny_model)
    else:
        shutil.copytree(one_step, here / "out", symlinks=True)
    model = "./model" if what == "no model" else tiny_model
    words = flags(**command.values(model=model, train_files="rows.parquet", output_dir="out"))
    done, statuses = run_differing(tmp_path, (here, words), (there, words))
    refused(done, *parts, seconds=SECONDS + (60 if what == "no checkpoint" else 0))  # a file system may be slow
    assert statuses == [1, 1]
    nothing_in(there / "out")


# A full disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 40 MB, gone after the test."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here; test_a_file_too_large runs everywhere")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves `left` bytes on a disk."""
    free = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"x" * (free.f_bavail * free.f_bsize - left))
    return filler


THREE_STEPS: dict[str, Any] = {"total_training_steps": 3, "save_steps": 1}


@pytest.fixture(scope="module")
def three_steps(commands, tiny_model, uneven_rows, tmp_path_factory) -> Path:
    """The output folder of a run of three steps, each with a checkpoint."""
    return finished_run(commands, tiny_model, uneven_rows, tmp_path_factory, THREE_STEPS)


@pytest.fixture(scope="module")
def three_full_steps(commands, tiny_model, uneven_rows, tmp_path_factory) -> Path:
    """The same of full fine-tuning."""
    return finished_run(commands, tiny_model, uneven_rows, tmp_path_factory, THREE_STEPS | {"lora_rank": 0})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "ranks", "rank_of_lora"),
    [
        pytest.param("fsdp", 1, 4, id="tokenizer does not fit"),
        pytest.param("zero3", 2, 4, id="tokenizer does not fit on zero3"),
        pytest.param("fsdp", 2, 0, id="moments do not fit"),
    ],
)
def test_a_full_disk_while_saving(command, three_steps, three_full_steps, small_disk, backend, ranks, rank_of_lora):
    folder = small_disk / "out"
    words = command(backend, ranks, output_dir=folder, lora_rank=rank_of_lora, max_checkpoints=1, **THREE_STEPS)
    before = three_steps if rank_of_lora else three_full_steps
    folder.mkdir()
    shutil.copytree(before / "checkpoint-000001", folder / "checkpoint-000001")
    sizes = {path.name: path.stat().st_size for path in (before / "checkpoint-000001").iterdir()}
    first_to_be_made = "tokenizer.json" if rank_of_lora else "model.safetensors"  # the former at the start, too
    filler = fill(small_disk, sizes[first_to_be_made] + 10 * 4096)

    done = command.again(words)
    refused(
        done,
        f"cannot save {folder}/checkpoint-000002: the disk is full",
        "checkpoint-000001 is still valid; free some space and rerun the same command",
    )
    assert complete(folder) == ["checkpoint-000001"]

    filler.unlink()
    if not rank_of_lora:  # two of its checkpoints do not fit at all
        return
    done = command.again(words)
    assert done.status == 0, done.err
    assert complete(folder) == ["checkpoint-000003"]
    assert [m["step"] for m in metrics(folder)] == [1, 2, 3]
    for resumed, straight in zip(metrics(folder), metrics(before), strict=True):
        assert resumed["train/loss"] == pytest.approx(straight["train/loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_at_the_start(command, three_steps, small_disk, ranks):
    folder = small_disk / "out"
    shutil.copytree(three_steps, folder, symlinks=True)
    before = snapshot(folder)
    fill(small_disk, 12 * 2**10)
    done = command.run("fsdp", ranks, output_dir=folder, **THREE_STEPS)
    refused(done, f"cannot write {folder}: the disk is full; free some space and rerun the same command")
    assert {name: content for name, content in snapshot(folder).items() if name != "config.yaml"} == {
        name: content for name, content in before.items() if name != "config.yaml"
    }
    assert complete(folder) == [f"checkpoint-{step:06d}" for step in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "parts"),
    [
        (2048, ["cannot write", "out: File too large", "choose another folder"]),
        (8192, ["cannot save", "checkpoint-000001: File too large", "no older checkpoint exists"]),
    ],
    ids=["tokenizer", "moments"],
)
def test_a_file_too_large(command, out, kilobytes, parts):
    """The limit on a file's size stops the tokenizer's file at the start, or the moments, whoever runs the test."""
    done = run(["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *command(lora_rank=0)])
    refused_alone(done, *parts)
    nothing_in(out)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_while_logging(command, small_disk, ranks):
    folder = small_disk / "out"
    words = command("fsdp", ranks, output_dir=folder, total_training_steps=600, save_steps=0)
    fillers: list[Path] = []
    done = stop(words, folder, lambda process: fillers.append(fill(small_disk, 0)))
    refused(done, "metrics.jsonl: the disk is full; free some space and rerun the same command")
    assert complete(folder) == []

    fillers[0].unlink()
    shorter = command("fsdp", ranks, output_dir=folder, total_training_steps=20, save_steps=0)
    assert command.again(shorter).status == 0
    assert [m["step"] for m in metrics(folder)] == list(range(1, 21))


# Numbers that are none


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("fsdp", 1), *BOTH])
def test_weights_that_are_not_finite(command, tiny_model, tmp_path, out, backend, ranks):
    model = bad_model(tiny_model, tmp_path, "nan")
    done = command.run(backend, ranks, model=model)
    refused(done, "the loss of step 1 is nan", "nothing was saved", f"check those of --model {model}")
    nothing_in(out)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("fsdp", 1), *BOTH])
def test_a_run_that_blows_up(command, out, backend, ranks):
    done = command.run(backend, ranks, lr=1e30, warmup_ratio=0, **THREE_STEPS)
    refused(done, "of step 2 is ", "checkpoint-000001 is valid", "try a lower --lr in another --output_dir")
    assert complete(out) == ["checkpoint-000001"]
    assert [m["step"] for m in metrics(out)] == [1]


@pytest.mark.slow
def test_a_validation_loss_that_is_not_finite(command, uneven_rows, out):
    done = command.run(lr=1e30, warmup_ratio=0, val_files=uneven_rows, on_leak="ignore")
    refused_alone(done, "the validation loss after step 1 is ", "nothing was saved", "try a lower --lr")
    nothing_in(out)


# Stopped from outside


def stop(words: list[str], out: Path, how: Callable[[subprocess.Popen], None]) -> Done:
    """Start a run, stop it once it has taken a step, and wait for its end."""
    started = time.monotonic()
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        log = out / "metrics.jsonl"
        while not (log.is_file() and log.stat().st_size) and process.poll() is None:
            assert time.monotonic() - started < SECONDS
            time.sleep(0.02)
        sent = time.monotonic()
        how(process)
        stdout, stderr = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Done(process.returncode, stdout, stderr, time.monotonic() - sent)


def goes_on(command: Command, done: Done, words: list[str], out: Path, name: str, steps: int) -> None:
    """The stopped run has saved its last step, said so, and is finished by the same command."""
    told = re.search(r"^stopped by (\w+) after step (\d+); to resume: .*dsft.train", done.out, re.M)
    assert told, done.out + done.err
    assert told[1] == name
    step = int(told[2])
    assert 1 <= step < steps
    assert done.errors == []
    assert complete(out) == [f"checkpoint-{step:06d}"]
    again = command.again(words)
    assert again.status == 0, again.err
    assert f"resuming at step {step + 1}" in again.out
    assert complete(out)[-1] == f"checkpoint-{steps:06d}"
    assert [m["step"] for m in metrics(out)] == list(range(1, steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal(command, out, number):
    words = command(total_training_steps=50, save_steps=0)
    done = stop(words, out, lambda process: process.send_signal(number))
    assert done.status == 0
    assert done.err == ""
    goes_on(command, done, words, out, number.name, 50)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_to_torchrun(command, out, number):
    words = command("fsdp", 2, total_training_steps=40, save_steps=0)
    goes_on(command, stop(words, out, lambda process: process.send_signal(number)), words, out, number.name, 40)


@pytest.mark.slow
def test_control_c_under_deepspeed(command, out):
    """The terminal signals the launcher and all ranks; the launcher then adds a SIGTERM."""
    words = command("zero3", 2, total_training_steps=40, save_steps=0)
    goes_on(command, stop(words, out, lambda process: os.killpg(process.pid, signal.SIGINT)), words, out, "SIGINT", 40)


@pytest.mark.slow
def test_a_second_control_c_ends_at_once(command, out):
    """Whoever does not want to wait for the step and the checkpoint need not."""

    def twice(process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGSTOP)  # so that both wait for the process at once
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
        process.send_signal(signal.SIGINT)

    done = stop(command(total_training_steps=100, save_steps=0), out, twice)
    assert "Traceback" not in done.err
    assert done.status in (0, 130)
    if done.status == 130:
        assert done.err.strip() == "stopped"
