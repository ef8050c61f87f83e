"""Fixtures shared by all tests. The embedded model's tokenizer is real; the tiny model is a real Llama, untrained."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run two at a time, on two cores

import pytest

from dsft.errors import UserError
from tests.commands import Commands, TrainedRuns
from tests.error_table import code_of, entries
from tests.helpers import PRODUCED, write_parquet


def _note(error: UserError, *arguments: object) -> None:
    ValueError.__init__(error, *arguments)
    if sys._getframe(1).f_globals.get("__name__", "").startswith("dsft."):
        PRODUCED.add(str(error))


UserError.__init__ = _note  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that produces an error which docs/errors.yaml lacks, or not the one for which it names this test."""
    try:
        yield
        codes = {line: code_of(line) for text in PRODUCED for line in text.split("\n")}
    finally:
        PRODUCED.clear()
    unknown = [line for line, code in codes.items() if code is None]
    assert not unknown, f"not in docs/errors.yaml: {unknown}"
    names = {item.nodeid.removeprefix("tests/"), item.nodeid.removeprefix("tests/").partition("[")[0]}
    missing = {entry.code for entry in entries().values() if names & set(entry.examples)} - set(codes.values())
    assert not missing, f"docs/errors.yaml names this test for {missing}, which it does not produce"


@pytest.fixture(scope="session")
def embedded() -> str:
    """Folder of the embedded model."""
    from dsft.model.embedded import embedded_model

    return str(embedded_model())


@pytest.fixture(scope="session")
def tokenizer(embedded):
    from dsft.model.source import load_tokenizer

    return load_tokenizer(embedded, trust_remote_code=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """A two-layer Llama with random float32 weights and the embedded model's tokenizer: a step takes milliseconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model):
    from dsft.model.source import load_tokenizer

    return load_tokenizer(str(tiny_model), trust_remote_code=False)


@pytest.fixture
def one_tokenizer(tiny_model, tiny_tokenizer, monkeypatch) -> None:
    """Previews of the tiny model share its tokenizer: to load it takes half of the time of a small one."""
    from dsft.previewing import preview

    load = preview.load_tokenizer

    def load_once(path: str, *, chat_template: str | None, **options):
        is_known = Path(path).resolve() == tiny_model.resolve() and chat_template is None
        return tiny_tokenizer if is_known else load(path, chat_template=chat_template, **options)

    monkeypatch.setattr(preview, "load_tokenizer", load_once)


@pytest.fixture(scope="session")
def uneven_rows(tmp_path_factory) -> Path:
    """Ten rows of very different lengths, as parquet."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    rows = [
        {"prompt": " ".join(words[: 1 + i % 7] * (1 + i * i % 11)), "response": " ".join(words[i % 5 :] * (1 + i % 4))}
        for i in range(10)
    ]
    return write_parquet(tmp_path_factory.mktemp("rows") / "uneven.parquet", rows)


@pytest.fixture
def port() -> int:
    """A free TCP port, so that two launchers never meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[Commands]:
    """Runs command lines quickly, one at a time."""
    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def trained_runs(commands, tiny_model, uneven_rows, tmp_path_factory) -> TrainedRuns:
    """Runs of two steps, each with a checkpoint, that differ in one thing from each other."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes that run tests
    return TrainedRuns(commands, tiny_model, uneven_rows, folder / "trained_runs")
