"""What a preview says of rows on both sides, and which rows it takes for those that train and validate."""

from pathlib import Path

import pytest

from dsft.config import PreviewConfig
from dsft.previewing.preview import Preview, make_preview
from tests.helpers import MEDICAL, write_parquet

REMEDY = "drop them with --on_leak drop_val or drop_train"


def turns(topic: str, count: int, level: str | None = None) -> list[dict]:
    """The rows of a dialogue."""
    info = level and {"level": level}
    messages, rows = [], []
    for turn in range(count):
        messages.append({"role": "user", "content": f"{topic} {turn}"})
        rows.append({"prompt": list(messages), "response": f"well, {topic}", "extra_info": info})
        messages.append({"role": "assistant", "content": f"well, {topic}"})
    return rows


TRAIN = [*turns("leaves", 3), *turns("roots", 2), *turns("stem", 1)]
VAL = [*turns("petal", 2), *turns("roots", 3)]  # two copies, and a later turn of the same dialogue


@pytest.fixture
def look(tiny_model, one_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))

    def look(train: list[dict], val: list[dict] | None, **flags: object) -> Preview:
        files = {"train_files": [str(write_parquet(tmp_path / "t.parquet", train))]}
        if val is not None:
            files["val_files"] = [str(write_parquet(tmp_path / "v.parquet", val))]
        config = PreviewConfig(model=str(tiny_model), **files, **{"rows": 0} | flags)
        config.check()
        return make_preview(config)

    return look


def told(preview: Preview, folder: Path) -> list[tuple[str, str, str]]:
    """What is said of the two sides."""
    return [
        (f.kind, f.name, f.text.replace(f"{folder}/", ""))
        for f in preview.findings
        if f.name.startswith("leak") or f.name == "split"
    ]


def test_nothing_leaks(look, tmp_path):
    said = "no validation row shares its text, prompt, dialogue or level with a training row"
    assert told(look(TRAIN, VAL[:2]), tmp_path) == [("ok", "leaks", said)]
    assert told(look(TRAIN, None), tmp_path) == []


@pytest.mark.parametrize(("on_leak", "kind"), [("warn", "warning"), ("error", "refused")])
def test_each_kind_has_a_line_with_rows_that_no_line_before_has(look, tmp_path, on_leak, kind):
    train = [*TRAIN, *turns("bark", 1, level="0123456789abcdef")]
    other_answer = [row | {"response": "otherwise"} for row in turns("stem", 1)]
    val = [*VAL, *other_answer, *turns("moss", 1, level="0123456789abcdef")]
    preview = look(train, val, on_leak=on_leak)
    assert told(preview, tmp_path) == [
        (kind, "leak by row",
         "2 of 7 validation rows are copies of training rows, "
         f"e.g. v.parquet, row 2 and t.parquet, row 3, 'user roots 0'; {REMEDY}"),
        (kind, "leak by prompt",
         "3 of 7 validation rows have the prompt of a training row, "
         f"e.g. v.parquet, row 5 and t.parquet, row 5, 'user stem 0'; {REMEDY}"),
        (kind, "leak by dialogue",
         "4 of 7 validation rows share 2 dialogues with training rows, "
         f"e.g. v.parquet, row 4 and t.parquet, row 3, 'user roots 2'; {REMEDY}"),
        (kind, "leak by level",
         "1 of 7 validation rows share 1 level with training rows, "
         f"e.g. v.parquet, row 6 and t.parquet, row 6, 'user moss 0'; {REMEDY}"),
    ]  # fmt: skip
    assert (preview.problem is not None) == (on_leak == "error")
    assert (preview.train.rows, preview.val.rows) == (7, 7)


def test_a_long_question_is_told_without_its_middle(look, tmp_path):
    row = turns("so long " * 20, 1)
    [(_, _, text)] = told(look([*TRAIN, *row], row), tmp_path)
    assert ", 'user so long so long so long s … long so long so long so long 0'; " in text


@pytest.mark.parametrize(
    ("on_leak", "text", "rows"),
    [
        ("drop_val", "--on_leak drop_val drops 3 of 5 validation rows: 3 of 5 validation rows leak ", (6, 2)),
        ("drop_train", "--on_leak drop_train drops 2 of 6 training rows: 3 of 5 validation rows leak ", (4, 5)),
        ("ignore", "not searched with --on_leak ignore", (6, 5)),
    ],
)
def test_rows_are_left_out_as_training_leaves_them_out(look, tmp_path, on_leak, text, rows):
    preview = look(TRAIN, VAL, on_leak=on_leak, rows=6)
    [(kind, name, said)] = told(preview, tmp_path)
    assert (kind, name) == ("ok", "leaks")
    assert said.startswith(text)
    assert (preview.train.rows, preview.val.rows) == rows
    assert tuple(sum(b.rows for b in of.lengths) for of in (preview.train, preview.val)) == rows
    assert preview.batches.rows == rows[0]
    marked = {view.number for view in preview.rows if view.cut == "dropped by --on_leak drop_train"}
    assert marked == ({3, 4} if on_leak == "drop_train" else set())


def test_what_would_leave_nothing_is_refused(look, tmp_path):
    [(kind, name, text)] = told(look(TRAIN, VAL[2:], on_leak="drop_val"), tmp_path)
    assert (kind, name) == ("refused", "leaks")
    assert text.startswith("--on_leak drop_val would leave no validation row: 3 of 3 ")


def test_a_split_is_that_of_training(look, tmp_path):
    preview = look(TRAIN, None, val_fraction=0.3, rows=6)
    assert told(preview, tmp_path) == [("ok", "split", "--val_fraction 0.3 splits off 2 of 6 rows")]
    assert (preview.train.rows, preview.val.rows) == (4, 2)
    assert tuple(sum(b.rows for b in of.lengths) for of in (preview.train, preview.val)) == (4, 2)
    assert {view.number for view in preview.rows if view.cut == "validates, by --val_fraction"} == {3, 4}
    [(kind, name, text)] = told(look(turns("leaves", 3), None, val_fraction=0.3), tmp_path)
    assert (kind, name) == ("refused", "split")
    assert text.startswith("--val_fraction 0.3 splits off whole dialogues, but all 3 rows of ")


def test_rows_that_truncation_drops_are_on_no_side(look, tmp_path):
    long = [*turns("word " * 300, 1), *turns("words " * 300, 1)]
    preview = look([*TRAIN, *long], [*VAL, long[0]], max_length=200, truncation="drop", on_leak="drop_train")
    [(_, _, text)] = told(preview, tmp_path)
    assert text.startswith("--on_leak drop_train drops 2 of 6 training rows")
    assert [(of.rows, of.rows_dropped, sum(b.rows for b in of.lengths)) for of in (preview.train, preview.val)] == [
        (4, 2, 6), (5, 1, 6),
    ]  # fmt: skip


def test_leaks_are_found_though_training_refuses_the_rows_for_their_length(look, tmp_path):
    long = turns("word " * 300, 1)
    preview = look([*TRAIN, *long], VAL, max_length=200)
    assert [name for _, name, _ in told(preview, tmp_path)] == ["leak by row", "leak by dialogue"]
    assert [f.name for f in preview.findings if f.kind == "refused"] == ["truncation"]
    [(kind, _, _)] = told(look([*TRAIN, *long], VAL, max_length=200, on_leak="drop_val"), tmp_path)
    assert kind == "ok"


@pytest.mark.skipif(not MEDICAL.exists(), reason="the medical set is absent")
def test_the_medical_set_on_both_sides(tiny_model, tokenizer):
    config = PreviewConfig(model=str(tiny_model), train_files=[str(MEDICAL)], val_files=[str(MEDICAL)], rows=0)
    [text] = [f.text for f in make_preview(config).findings if f.name.startswith("leak")]
    assert text.startswith("549 of 549 validation rows are copies of training rows, e.g. ")
