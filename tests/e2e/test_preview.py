"""python -m dsft.preview, as a user types it."""

import html
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, SAMPLE_TRAIN, SAMPLE_VAL, flags, write_parquet

END = "<|im_end|>"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, tokenizer, monkeypatch):
    """Of tokens; the fork server has the environment that it was started with, so only real processes are told."""
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def preview(commands, tiny_model):
    def preview(*words, **more):
        given = flags(**{"model": tiny_model, "train_files": SAMPLE_TRAIN} | more)
        return commands.run("dsft.preview", [*given, *words])

    return preview


def test_it_shows_rows_figures_and_findings_and_writes_what_is_asked_for(preview, tmp_path):
    page, figures = tmp_path / "p.html", tmp_path / "p.json"
    done = preview(val_files=SAMPLE_VAL, train_batch_size=16, total_epochs=3, html=page, json=figures, ranks=2)
    assert (done.status, done.err) == (0, "")
    heads = re.findall(r"^row (\d+) \(.*sample_train\.parquet, row \d+\): \d+ tokens, \d+ targets", done.out, re.M)
    assert len(heads) == 3
    assert "\x1b" not in done.out
    assert re.search(r"^train +91 rows, 18,441 tokens, 3,451 targets \(18\.7%\)$", done.out, re.M)
    assert re.search(r"^val +29 rows, 6,589 tokens, 1,108 targets \(16\.8%\)$", done.out, re.M)
    assert re.search(
        r"^fold +\d\.\d\dx fewer tokens with prefix trees, \d\.\d\dx with chains; training uses trees$", done.out, re.M
    )
    assert re.search(r"^batch .* per step; 1 micro-batch of at most 4,096 tokens on each of 2 ranks$", done.out, re.M)
    assert re.search(r"^ +each rank computes \S+ tokens per step; the slowest takes \S+% longer", done.out, re.M)
    assert re.search(r"^ +220 to 239 +24  █{40}$", done.out, re.M)
    for name in ("histories", "end of turn", "start of answers", "rows", "val: rows"):
        assert re.search(rf"^ok +{name}: ", done.out, re.M)
    assert not re.search("^(warning|refused)", done.out, re.M)
    values = json.loads(figures.read_text(encoding="utf-8"))
    assert (values["refused"], values["train"]["rows"], values["val"]["tokens"]) == (False, 91, 6589)
    assert values["batches"]["steps"] == int(re.search(r"per epoch, (\d+) in all", done.out)[1])
    assert sum(b["rows"] for b in values["train"]["lengths"]) == 91
    parts = re.findall("<mark>(.*?)</mark>", page.read_text(encoding="utf-8"), re.DOTALL)
    learned = [part for part in re.findall(r"⟦([^⟦⟧]*)⟧", done.out) if part.endswith(END)]
    assert [html.unescape(re.sub("</?b>", "", part)) for part in parts] == learned
    assert len(learned) == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["p.html", "p.json"]


def test_the_memory_of_gpus_is_predicted_without_one_for_every_sharding(preview, tmp_path):
    figures = tmp_path / "p.json"
    done = preview(device_memory=80, ranks=8, nodes=2, rows=0, json=figures)
    assert (done.status, done.err) == (0, "")
    assert re.search(r"^memory .* 80\.00 GiB available; fsdp in bfloat16 on cuda$", done.out, re.M)
    found = re.findall(
        r"^(?:sharding)? +(\w+)( \(chosen\))?: (\S+) GiB per rank, (.*) to each node per step$", done.out, re.M
    )
    assert [(name, bool(mark)) for name, mark, *_ in found] == [("full", False), ("hybrid", False), ("trainable", True)]
    assert not re.search("^time", done.out, re.M)
    assert re.search(r"^warning +batch: each GPU computes \d+ tokens per step", done.out, re.M)
    assert json.loads(figures.read_text(encoding="utf-8"))["needs"]["seconds"] is None


def test_the_words_of_a_training_run_are_taken_as_they_are(commands, trained_runs, tmp_path):
    done = commands.run("dsft.preview", trained_runs.words("lora", tmp_path / "out"))
    assert (done.status, done.err) == (0, "")
    assert re.search(r"^steps .* 2 in all$", done.out, re.M)
    assert not (tmp_path / "out").exists()


def test_its_figures_are_those_that_training_reports(commands, trained_runs, tmp_path):
    words = trained_runs.words("lora", tmp_path / "out", total_training_steps=1)
    told = commands.run("dsft.train", words).out
    shown = commands.run("dsft.preview", words).out
    [counts] = re.findall(r"data +(\S+ rows, \S+ tokens, \S+ targets)", told)
    assert re.search(rf"^train +{counts} ", shown, re.M)
    [steps] = re.findall(r"(\d+) steps? per epoch, 1 in all", told)
    assert re.search(rf"^steps +{steps} per epoch, 1 in all$", shown, re.M)
    memory = r"^memory +(\d+\.\d\d) GiB per rank predicted"
    [by_training], [by_preview] = (re.findall(memory, text, re.M) for text in (told, shown))
    assert float(by_preview) == pytest.approx(float(by_training), rel=0.1)  # its process has made other things too
    assert re.search(r"^time +\S+ \w+ per step predicted, .*, .* for 1 step$", shown, re.M)


def test_memory_time_and_what_they_consist_of(preview, tmp_path):
    values = {}
    for backend, rank in (("fsdp", 0), ("zero3", 4)):
        figures = tmp_path / f"{backend}.json"
        done = preview(backend=backend, lora_rank=rank, dtype="float32", ranks=2, rows=0, json=figures)
        assert (done.status, done.err) == (0, "")
        values[backend] = json.loads(figures.read_text(encoding="utf-8"))["needs"]
    full, lora = values["fsdp"], values["zero3"]
    assert (full["computes"], lora["computes"]) == ("fsdp in float32 on cpu", "zero3 in float32 on cpu")
    assert (full["remedies"], lora["remedies"]) == ([], [])
    assert full["parts_bytes"]["moments"] > 10 * lora["parts_bytes"]["moments"] > 0
    assert full["memory_bytes"] >= sum(full["parts_bytes"].values()) * 0.999
    assert 0 < full["seconds_per_step"] <= full["seconds_per_epoch"] <= full["seconds"]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"lora_rank": 4, "target_modules": "q_porj"}, "target_modules: 'q_porj' matches no module"),
        ({"backend": "zero3", "ds_config": "ds.json"}, "train_batch_size"),
        ({"max_tokens_per_micro_batch": 100}, "max_tokens_per_micro_batch is 100, but the longest row has"),
    ],
)
def test_flags_that_training_would_refuse(preview, tmp_path, more, fault):
    if "ds_config" in more:
        (tmp_path / "ds.json").write_text('{"train_batch_size": 7}', encoding="utf-8")
        more = more | {"ds_config": tmp_path / "ds.json"}
    done = preview(rows=0, **more)
    [line] = [line for line in done.out.splitlines() if line.startswith("refused")]
    assert line.startswith("refused   run: ")
    assert fault in line
    assert (done.status, len(done.errors)) == (1, 1)


def test_no_weights_are_read(preview, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").write_bytes(b"")
    done = preview(model=model, rows=0)
    assert (done.status, done.err) == (0, "")


def test_rows_by_their_numbers_over_several_files(preview):
    done = preview(train_files=f"{SAMPLE_VAL},{SAMPLE_TRAIN}", row_numbers="30,2")
    assert re.findall(r"^row (\d+) \(.*/(\w+)\.parquet, row (\d+)\)", done.out, re.M) == [
        ("30", "sample_train", "1"),
        ("2", "sample_val", "2"),
    ]
    done = preview(row_numbers="91")
    assert (done.status, done.out) == (1, "")
    assert done.errors == ["error: --row_numbers 91: there are 91 training rows; use numbers from 0 to 90"]


def test_what_training_would_refuse_is_shown_and_ends_with_status_1(preview, tmp_path):
    page = tmp_path / "p.html"
    done = preview(max_length=200, html=page)
    [line] = [line for line in done.out.splitlines() if line.startswith("refused")]
    fault = line.split(": ", 1)[1]
    assert re.match(
        r"\d\d of 91 rows have more tokens than --max_length 200 \(the longest row has \d\d\d tokens\)", fault
    )
    assert done.errors == [f"error: training would refuse this: {fault}"]
    assert (done.status, len(done.err.splitlines())) == (1, 1)
    assert "refused: 3" in done.out  # the longest row says so too
    assert html.escape(fault) in page.read_text(encoding="utf-8")


def test_warnings_alone_end_with_status_0(preview, tmp_path):
    rows = [{"prompt": f"{i % 8} + 1?", "response": f"{i % 8 + 1}"} for i in range(10)]
    done = preview(train_files=write_parquet(tmp_path / "f.parquet", rows))
    assert (done.status, done.err) == (0, "")
    [line] = [line for line in done.out.splitlines() if line.startswith("warning")]
    assert line.startswith("warning   duplicates: 2 of 10 rows repeat an earlier row exactly, e.g. ")


def test_a_micro_batch_smaller_than_a_row_is_refused(preview):
    done = preview(max_tokens_per_micro_batch=50, rows=0)
    assert done.status == 1
    assert done.errors[0].startswith(
        "error: training would refuse this: max_tokens_per_micro_batch is 50, but the longest row has "
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rows": -1}, "rows must be 0 or more, got -1"),
        ({"row_numbers": "3,-2"}, "row_numbers must be 0 or more, got 3,-2"),
        ({"ranks": 0}, "ranks must be 1 or more, got 0"),
        ({"device_memory": 0}, "device_memory must be above 0, got 0.0"),
        ({"device_memory": "80GiB"}, "device_memory: expected float, got '80GiB'"),
        ({"ranks": 7, "nodes": 2}, "ranks must be a multiple of nodes, got 7 ranks on 2 nodes"),
        ({"lr": 0}, "lr must be above 0, got 0.0"),
        ({"html": ROOT / "docs"}, f"html must be a file name, got '{ROOT / 'docs'}'"),
        ({"html": "x", "json": "x"}, "html and json are the same file, x; choose two"),
        ({"train_files": "/no/such.parquet"}, "--train_files /no/such.parquet: no such file"),
        ({"model": "/no/such"}, "--model /no/such: no such folder"),
        ({"val_files": "/no/such.parquet"}, "--val_files /no/such.parquet: no such file"),
        ({"rowz": 1}, "unknown flag --rowz (did you mean 'rows'?); --help lists all flags"),
        ({"html": "/no/such/folder/p.html"}, "cannot write /no/such/folder/p.html: No such file or directory;"),
    ],
)
def test_wrong_use_is_one_line(preview, more, told):
    done = preview(**more)
    assert done.status == 1
    assert len(done.errors) == len(done.err.splitlines()) == 1
    assert done.errors[0].startswith(f"error: {told}")


def test_help_lists_its_flags_beside_those_of_training(preview):
    done = preview("--help")
    assert done.status == 0
    for flag in ("--rows", "--row_numbers", "--html", "--train_files", "--max_length"):
        assert f"\n  {flag}  (" in done.out
    assert done.out.count("\n  --output_dir  (") == 1


@pytest.mark.slow
def test_a_terminal_gets_the_targets_in_colour(tiny_model):
    parent, child = pty.openpty()
    words = flags(model=tiny_model, train_files=SAMPLE_VAL, row_numbers=4)
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "dsft.preview", *words], cwd=ROOT, stdout=child, env=environment)
    os.close(child)
    shown = b""
    try:
        while part := os.read(parent, 65536):
            shown += part
    except OSError:  # what Linux says once the other end is closed
        pass
    os.close(parent)
    assert process.wait(60) == 0
    text = shown.decode().replace("\r\n", "\n")
    learned = "".join(re.findall(r"\x1b\[(?:1;)?32m([^\x1b]*)", text.split("train ")[0]))
    assert learned.startswith("⟦<think>")
    assert learned.endswith(f"</answer>{END}⟧")


@pytest.mark.slow
def test_it_reads_what_a_pipe_takes(tiny_model):
    words = " ".join(flags(model=tiny_model, train_files=SAMPLE_TRAIN, rows=80))
    line = f"{sys.executable} -m dsft.preview {words} | head -2"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
