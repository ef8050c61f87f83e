"""Ten faults of data and template, each planted in sound rows: the preview names each in one line, and nothing else."""

import copy
import re
import shutil
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest

from tests.helpers import SAMPLE_TRAIN, SAMPLE_VAL, flags, write_parquet
from tests.unit.test_preview_faults import ENDLESS

pytestmark = pytest.mark.slow

Rows = list[dict]
ROLES = {"user": "用户", "assistant": "助手"}
LEVEL = {"level": "0123456789abcdef"}


def add_copy(train: Rows, val: Rows) -> None:
    val[2] = train[7]


def add_later_turn(train: Rows, val: Rows) -> None:
    answer = {"role": "assistant", "content": train[7]["response"]}
    val[2] = train[7] | {"prompt": [*train[7]["prompt"], answer, {"role": "user", "content": "And then?"}]}


def add_level(train: Rows, val: Rows) -> None:
    for row in (*train, *val):
        row["extra_info"] = None
    train[7]["extra_info"] = val[2]["extra_info"] = LEVEL


def empty(train: Rows, val: Rows) -> None:
    train[3]["response"] = train[5]["response"] = "<think> I know it. </think>\n<answer> </answer>"


def repeat(train: Rows, val: Rows) -> None:
    train += [train[4], train[2]]


def swap(train: Rows, val: Rows) -> None:
    train[:] = [{"prompt": row["response"], "response": row["prompt"]} for row in train]


def mix_roles(train: Rows, val: Rows) -> None:
    for row in train[20:30]:
        row["prompt"] = [m | {"role": ROLES.get(m["role"], m["role"])} for m in row["prompt"]]


def nothing(train: Rows, val: Rows) -> None:
    pass


Plant = Callable[[Rows, Rows], None]
FAULTS: dict[str, tuple[Plant, dict, str]] = {
    "a row in both sets": (add_copy, {}, "leak by row: 1 of 29 validation rows are copies of training rows, "
        "e.g. v.parquet, row 2 and t.parquet, row 7, "),
    "a dialogue in both sets": (add_later_turn, {}, "leak by dialogue: 1 of 29 validation rows share 1 dialogue with "
        "training rows, e.g. v.parquet, row 2 and t.parquet, row "),
    "a level in both sets": (add_level, {}, "leak by level: 1 of 29 validation rows share 1 level with training rows, "
        "e.g. v.parquet, row 2 and t.parquet, row 7, "),
    "a template without end of turn": (nothing, {"template": ENDLESS}, "end of turn: the chat template puts no special "
        "token directly after an answer; "),
    "all answers cut": (nothing, {"max_length": 60, "truncation": "right"}, "truncation: all 40 rows lose the end "
        r"of the answer, 40 of them all of it \(these are dropped\), e.g. t.parquet, row 0"),
    "empty answers": (empty, {}, "empty answers: 2 of 40 rows have an answer without text, e.g. t.parquet, row 3;"),
    "duplicates": (repeat, {}, "duplicates: 2 of 42 rows repeat an earlier row exactly, e.g. t.parquet, row 40 that "
        "of t.parquet, row 4;"),
    "swapped columns": (swap, {}, "swapped columns: all 40 rows have what looks like a prompt in the response column, "
        "e.g. t.parquet, row 0; try --prompt_key response --response_key prompt"),
    "roles in two languages": (mix_roles, {}, "role names: 10 of 40 rows use the roles '用户', '助手' besides "
        "'system', 'user', 'assistant', e.g. t.parquet, row 20;"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound() -> tuple[Rows, Rows]:
    """Rows of several turns with a system turn, thinking in the answers and in their histories."""
    train, val = (
        pq.read_table(file, columns=["prompt", "response"]).to_pylist() for file in (SAMPLE_TRAIN, SAMPLE_VAL)
    )
    return train[:40], val


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_planted_fault_is_named_in_one_line(fault, sound, commands, tiny_model, tmp_path):
    plant, more, told = FAULTS.get(fault, (nothing, {}, ""))
    train, val = copy.deepcopy(sound)
    plant(train, val)
    words = {"model": tiny_model, "train_files": write_parquet(tmp_path / "t.parquet", train), "rows": 0} | more
    if fault == "none" or "in both sets" in fault:
        words["val_files"] = write_parquet(tmp_path / "v.parquet", val)
    if "template" in words:
        words["model"] = shutil.copytree(tiny_model, tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text(words.pop("template"), encoding="utf-8")
    done = commands.run("dsft.preview", flags(**words))
    found = re.findall(r"^(warning|refused) +(.*)$", done.out.replace(f"{tmp_path}/", ""), re.MULTILINE)
    if fault == "none":
        assert (found, done.status) == ([], 0)
        return
    [(kind, line)] = found
    assert re.match(told, line), line
    assert done.status == (kind == "refused") == len(done.errors)
