"""Real checkpoints, damaged in every way: each is refused by the file's name, and the older one is used instead.

A file is always replaced, never written into: the copies of a run share their files.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsft.checkpointing.folder import CheckpointFolder, find_checkpoint
from dsft.checkpointing.integrity import COMPLETE, DamagedError, damages, verify
from dsft.checkpointing.resuming import find_resume
from dsft.checkpointing.state import STATE
from dsft.cli import parse
from dsft.config import TrainConfig
from tests.commands import TrainedRuns
from tests.helpers import contents, message, sign

COMMON = [
    "chat_template.jinja", "config.yaml", "metrics.jsonl", "optimizer.safetensors", "tokenizer.json",
    "tokenizer_config.json", STATE,
]  # fmt: skip
FILES = {
    "lora": [COMPLETE, "adapter_config.json", "adapter_model.safetensors", *COMMON],
    "full": [COMPLETE, "config.json", "generation_config.json", "model.safetensors", *COMMON],
}
BUT_COMPLETE = [("lora", name) for name in FILES["lora"][1:]] + [
    pytest.param("full", name, marks=pytest.mark.slow) for name in FILES["full"][1:] if name not in COMMON
]
ALL_FILES = [("lora", COMPLETE), *BUT_COMPLETE]
TENSORS = [("lora", "adapter_model.safetensors"), ("lora", "optimizer.safetensors"), ("full", "model.safetensors")]


def newest(run: Path) -> Path:
    return run / "checkpoint-000002"


def older(run: Path) -> Path:
    return run / "checkpoint-000001"


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def refused(run: Path, *named: str) -> None:
    """The newest checkpoint is refused by one of these names, offered the older one, and then set aside for it."""
    with pytest.raises(DamagedError) as caught:
        verify(newest(run))
    assert any(str(caught.value).startswith(f"{newest(run) / name} ") for name in named), caught.value
    assert caught.value.path.parent == newest(run)
    told = message(find_checkpoint, str(run), "resume")
    assert told == f"--resume {run}: {caught.value}; use {older(run)}, which is intact"
    warnings: list[str] = []
    assert CheckpointFolder(run).newest_sound(warnings.append) == older(run)
    aside = "checkpoint-000002.damaged"
    assert warnings == [f"{caught.value}; renamed to {aside}, resuming from checkpoint-000001"]
    assert sorted(p.name for p in run.glob("checkpoint*")) == ["checkpoint-000001", aside]


def test_the_files_of_a_checkpoint_are_these(trained_runs):
    for kind, names in FILES.items():
        for checkpoint in (older, newest):
            folder = checkpoint(trained_runs.folder(kind))
            assert sorted(p.name for p in folder.iterdir()) == sorted(names)
            verify(folder)


# Bytes

CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda b: b"",
    "one byte left": lambda b: b[:1],
    "eight bytes left": lambda b: b[:8],
    "half": lambda b: b[: len(b) // 2],
    "last line lost": lambda b: b[: b.rstrip(b"\n").rfind(b"\n") + 1] or b[:-2],
    "last byte lost": lambda b: b[:-1],
    "one byte more": lambda b: b + b"\0",
    "twice": lambda b: b + b,
    "zeros": lambda b: bytes(len(b)),
    "last page is zeros": lambda b: b[:-64] + bytes(64),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("kind", "name"), ALL_FILES)
def test_other_bytes(trained_runs, tmp_path, kind, name, change):
    run = trained_runs.copy(kind, tmp_path / "run")
    content = (newest(run) / name).read_bytes()
    changed = CHANGES[change](content)
    assert changed != content
    replace(newest(run) / name, changed)
    refused(run, *(FILES[kind] if name == COMPLETE else [name]))


@pytest.mark.parametrize(("kind", "name"), ALL_FILES)
def test_flipped_bits(trained_runs, tmp_path, kind, name):
    """In the first bytes (of safetensors the header's length, then the header), at places between, and at the end."""
    run = trained_runs.copy(kind, tmp_path / "run")
    path = newest(run) / name
    whole = path.read_bytes()
    places = {0, 3, 7, 8, 9, 40, *(len(whole) * i // 6 for i in range(1, 6)), len(whole) - 1}
    for place in sorted(places):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        replace(path, bytes(changed))
        with pytest.raises(DamagedError) as caught:
            verify(newest(run))
        assert caught.value.path.parent == newest(run)
        assert caught.value.path == path or name == COMPLETE
    refused(
        run, *(FILES[kind] if name == COMPLETE else [name]), *([caught.value.path.name] if name == COMPLETE else [])
    )


@pytest.fixture(scope="module")
def flipping(trained_runs, tmp_path_factory) -> Path:
    """A checkpoint in which one file at a time is replaced."""
    return newest(trained_runs.copy("lora", tmp_path_factory.mktemp("flipping") / "run"))


@settings(deadline=None, database=None, max_examples=200)
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_refused(flipping, data):
    path = flipping / data.draw(st.sampled_from(FILES["lora"]))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    replace(path, bytes(changed))
    try:
        told = message(verify, flipping)
        assert told.startswith(f"{flipping}/")
        assert path.name == COMPLETE or told.startswith(f"{path} is damaged: ")
    finally:
        replace(path, whole)
    verify(flipping)


# Files

GONE: dict[str, Callable[[Path], None]] = {
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir())[0],
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere"))[0],
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name))[0],
    "renamed": lambda path: (path.rename(path.with_name(f"{path.name}.bak")), None)[1],
}


@pytest.mark.parametrize("how", GONE)
@pytest.mark.parametrize(("kind", "name"), BUT_COMPLETE)
def test_a_file_that_is_gone(trained_runs, tmp_path, kind, name, how):
    run = trained_runs.copy(kind, tmp_path / "run")
    GONE[how](newest(run) / name)
    refused(run, name)


@pytest.mark.parametrize("how", GONE)
def test_without_complete_it_is_no_checkpoint_and_the_older_one_is_used(trained_runs, tmp_path, how):
    run = trained_runs.copy("lora", tmp_path / "run")
    GONE[how](newest(run) / COMPLETE)
    told = message(find_checkpoint, str(newest(run)), "resume")
    assert "no COMPLETE file" in told
    assert told.endswith(f"; use {older(run)}, which is intact")
    assert find_checkpoint(str(run), "resume") == older(run)
    assert CheckpointFolder(run).newest_sound(pytest.fail) == older(run)


@pytest.mark.parametrize(
    ("kind", "one", "two"),
    [
        ("lora", "adapter_model.safetensors", "optimizer.safetensors"),
        ("full", "model.safetensors", "optimizer.safetensors"),
        ("lora", "adapter_config.json", "tokenizer_config.json"),
        ("lora", STATE, "metrics.jsonl"),
        ("lora", "config.yaml", COMPLETE),
    ],
)
def test_two_files_swapped(trained_runs, tmp_path, kind, one, two):
    run = trained_runs.copy(kind, tmp_path / "run")
    first, second = newest(run) / one, newest(run) / two
    first.rename(newest(run) / "x")
    second.rename(first)
    (newest(run) / "x").rename(second)
    refused(run, one, two)


@pytest.mark.parametrize(
    ("kind", "name", "source"),
    [
        pytest.param("full", "model.safetensors", "older", marks=pytest.mark.slow),
        *(("lora", n, s) for n in FILES["lora"] for s in ("older", "other seed", "other shape", "other rows")),
    ],
)
def test_a_file_of_another_checkpoint(trained_runs, tmp_path, kind, name, source):
    """Valid in itself, under the right name."""
    run = trained_runs.copy(kind, tmp_path / "run")
    theirs = (older(run) if source == "older" else newest(trained_runs.folder(source))) / name
    content = theirs.read_bytes()
    if content == (newest(run) / name).read_bytes():
        verify(newest(run))
        return
    replace(newest(run) / name, content)
    refused(run, *(FILES[kind] if name == COMPLETE else [name]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_files_of_all_kinds_do_differ_between_runs(trained_runs, kind):
    """Else the test above would prove nothing."""
    one, two = contents(older(trained_runs.folder(kind))), contents(newest(trained_runs.folder(kind)))
    changed = {name for name in one if one[name] != two[name]}
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert changed == {COMPLETE, weights, "optimizer.safetensors", STATE, "metrics.jsonl"}


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model-00002-of-00002.safetensors", "optimizer-00001-of-00002.safetensors", "model.safetensors",
        "adapter_model.safetensors.index.json", "optimizer.safetensors.bak",
    ],
)  # fmt: skip
def test_a_stray_file_of_tensors(trained_runs, tmp_path, name):
    run = trained_runs.copy("lora", tmp_path / "run")
    shutil.copy(newest(run) / "optimizer.safetensors", newest(run) / name)
    refused(run, name)


def test_other_stray_files_are_a_users_own(trained_runs, tmp_path):
    run = trained_runs.copy("lora", tmp_path / "run")
    for name in ("notes.txt", ".DS_Store", "eval.json"):
        (newest(run) / name).write_text("mine")
    (newest(run) / "plots").mkdir()
    verify(newest(run))


def test_all_files_are_damaged(trained_runs, tmp_path):
    run = trained_runs.copy("lora", tmp_path / "run")
    for name in FILES["lora"][1:]:
        replace(newest(run) / name, b"")
    assert {damage.path.name for damage in damages(newest(run))} == set(FILES["lora"][1:])
    refused(run, *FILES["lora"])


def test_nothing_is_changed_where_both_are_damaged(trained_runs, tmp_path):
    run = trained_runs.copy("lora", tmp_path / "run")
    for checkpoint in (older(run), newest(run)):
        replace(checkpoint / "optimizer.safetensors", b"")
    before = contents(run)
    told = message(CheckpointFolder(run).newest_sound, pytest.fail)
    assert told.startswith(f"{newest(run)}/optimizer.safetensors is damaged: ")
    assert "no older checkpoint is intact" in told
    assert message(find_checkpoint, str(run), "adapter").endswith("; no other checkpoint of the run is intact")
    assert contents(run) == before


# With the checksums made to match: what no disk does, but a person or a program may


def one_tensor(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[3]
    if change == "shape":
        return tensors | {name: tensors[name].T.contiguous() if tensors[name].ndim == 2 else tensors[name][:-1].clone()}
    if change == "rank":
        return tensors | {name: tensors[name].reshape(-1)}
    if change == "dtype":
        return tensors | {name: tensors[name].half()}
    if change == "missing":
        return {n: t for n, t in tensors.items() if n != name}
    return tensors | {"more": torch.ones(3)}


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        pytest.param(
            kind, name, change,
            marks=() if (name, change) in (("optimizer.safetensors", "shape"), ("model.safetensors", "missing"))
            else pytest.mark.slow,
        )
        for kind, name in TENSORS
        for change in ("shape", "rank", "dtype", "missing", "additional")
    ],
)  # fmt: skip
def test_other_tensors_with_checksums_of_their_own(trained_runs, tmp_path, kind, name, change):
    run = trained_runs.copy(kind, tmp_path / "run")
    tensors = one_tensor(load_file(newest(run) / name), change)
    (newest(run) / name).unlink()
    save_file(tensors, newest(run) / name, metadata={"format": "pt"})
    sign(newest(run))
    verify(newest(run))
    done = trained_runs.resume(kind, run)
    assert done.status == 1
    [error] = done.err.splitlines()
    assert error.startswith(f"error: {newest(run) / name}")
    part = {"missing": "does not contain '", "additional": "contains 'more', which the model does not have"}
    assert part.get(change, "' to be F32 [") in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"half a li"),
        ("config.yaml", b"\xff\xfe"),
        (STATE, b"{"),
        (STATE, b"[]"),
        (STATE, b'{"step": "two"}'),
        ("adapter_model.safetensors", b"\0" * 100),
        ("optimizer.safetensors", b""),
    ],
)
def test_other_contents_with_checksums_of_their_own(trained_runs, tmp_path, name, content):
    run = trained_runs.copy("lora", tmp_path / "run")
    replace(newest(run) / name, content)
    sign(newest(run))
    done = trained_runs.resume("lora", run)
    assert (done.status, done.out) == (1, "")
    [error] = done.err.splitlines()
    assert error.startswith(f"error: {newest(run) / name} ")


def without(name: str, run: Path) -> None:
    (newest(run) / name).unlink()
    (newest(run) / COMPLETE).unlink()
    sign(newest(run))


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", pytest.param("optimizer.safetensors", marks=pytest.mark.slow)]
)
def test_a_file_less_with_checksums_of_its_own(trained_runs, tmp_path, name):
    run = trained_runs.copy("lora", tmp_path / "run")
    without(name, run)
    done = trained_runs.resume("lora", run)
    assert done.status == 1
    assert done.err.splitlines() == [f"error: {newest(run) / name} is missing; choose another checkpoint"]


# Another run's whole checkpoint, sound in itself


def exchanged(trained_runs: TrainedRuns, source: str, target: Path) -> Path:
    run = trained_runs.copy("lora", target)
    shutil.rmtree(newest(run))
    shutil.copytree(newest(trained_runs.folder(source)), newest(run))
    verify(newest(run))
    return run


@pytest.mark.parametrize(
    ("source", "differing"),
    [("other seed", "seed was 2, is 1"), ("other shape", "lora_rank was 8, is 4"), ("full", "lora_rank was 0, is 4")],
)
def test_a_checkpoint_of_a_run_with_other_flags(trained_runs, tmp_path, source, differing):
    run = exchanged(trained_runs, source, tmp_path / "run")
    config = parse(TrainConfig, trained_runs.words("lora", run))
    told = message(find_resume, config, CheckpointFolder(run), pytest.fail)
    assert told.startswith(f"{newest(run)} is of a run with other flags: {differing}; ")
    assert told.endswith(f"--resume_override {differing.split()[0]}")


def test_a_checkpoint_of_a_run_on_other_rows(trained_runs, tmp_path):
    run = exchanged(trained_runs, "other rows", tmp_path / "run")
    done = trained_runs.resume("lora", run)
    assert done.status == 1
    [error] = done.err.splitlines()
    assert error.startswith(f"error: {newest(run)} was trained on other rows than --train_files ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "part"), [("other shape", "to be F32 [4, "), ("full", "adapter_model.safetensors is missing")]
)
def test_an_override_of_what_cannot_be_overridden_meets_other_tensors(trained_runs, tmp_path, source, part):
    run = exchanged(trained_runs, source, tmp_path / "run")
    done = trained_runs.resume("lora", run, resume_override="lora_rank")
    assert done.status == 1
    [error] = done.err.splitlines()
    assert error.startswith(f"error: {newest(run)}/adapter_model.safetensors")
    assert part in error


# The run goes on


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_that_fell_back_gives_the_numbers_it_would_have_given(trained_runs, tmp_path, kind):
    run = trained_runs.copy(kind, tmp_path / "run")
    expected = contents(newest(run))
    replace(newest(run) / "optimizer.safetensors", os.urandom(1000))
    done = trained_runs.resume(kind, run)
    assert done.status == 0, done.err
    [warning] = done.err.splitlines()
    assert warning.startswith(f"warning: {newest(run)}/optimizer.safetensors is damaged: its checksum does not match")
    assert f"resumed  {older(run)}, resuming at step 2" in done.out
    verify(newest(run))
    for name, content in contents(newest(run)).items():
        if name.endswith(".safetensors"):
            assert content == expected[name], name
    assert sorted(p.name for p in run.glob("checkpoint*"))[-1] == "checkpoint-000002.damaged"
    assert (run / "best").resolve() == (run / "latest").resolve() == newest(run)
