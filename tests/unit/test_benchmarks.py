"""The benchmarks beside TRL: their helpers. Nothing here installs or runs TRL."""

import itertools
import json
import math
import sys
from argparse import Namespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers import ROOT, SAMPLE_TRAIN

sys.path.insert(0, str(ROOT / "scripts"))
import bench_gpu
import bench_throughput as bench
import compare_backends
from bench_throughput import Arm

CASE = {
    "model": "smollm2-135m", "train_files": str(SAMPLE_TRAIN), "rows": 8, "train_batch_size": 8, "epochs": 3,
    "max_length": 2048, "dtype": "float32", "ranks": 2, "lora_rank": 16, "lora_alpha": 32, "repeats": 2,
    "gradient_checkpointing": False, "dsft_tokens": None, "trl_sampling": "sequential",
    "row_flags": {},
}  # fmt: skip


def case(**changes):
    return Namespace(**CASE | changes)


def outcome(*seconds, loss=2.0, peak=1.0):
    """A run of an arm: one step an epoch, that many seconds each."""
    steps = [{"seconds": s, "loss": loss, "grad_norm": 0.5, "computed_tokens": 100} for s in seconds]
    for step, used in zip(steps, itertools.accumulate(seconds), strict=True):
        step["cpu_seconds"] = 10 + 2 * used
    return {"steps": steps, "peak_gib_by_rank": {0: peak, 1: peak / 2}, "gpu_peak_gib": None}


SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("bench_*.py"))


@pytest.mark.parametrize("script", [*SCRIPTS, "compare_backends", "fault_drills", "predict_clusters", "profile_step"])
def test_help_says_how_to_call_it(script, commands):
    done = commands.run(script, ["--help"])
    assert done.status == 0, done.err
    assert f"scripts/{script}.py" in done.out


def test_arms_stand_for_every_fold_and_micro_batch_size():
    arms = bench.parse_arms("dsft:fsdp,dsft:zero3:off:full,trl:fsdp,trl:zero3:2,trl:fsdp:1", "1,4")
    names = ["dsft:fsdp:batch", "dsft:fsdp:off", "dsft:zero3:off:full", "trl:fsdp:1", "trl:fsdp:4", "trl:zero3:2"]
    assert [str(arm) for arm in arms] == names


@pytest.mark.parametrize(
    "text",
    [
        "trl",
        "dsft:plain",
        "dsft:fsdp:all",
        "trl:fsdp:0",
        "",
        "axolotl:fsdp",
        "dsft:fsdp@tests",
        "dsft:fsdp:off:half",
        "trl:fsdp:1:full",
    ],
)
def test_unknown_arms_are_refused(text):
    with pytest.raises(SystemExit, match="error: --arms"):
        bench.parse_arms(text)


@pytest.mark.parametrize(
    ("changes", "arm"),
    [
        ({"rows": 9}, Arm("dsft", "fsdp", "off")),
        ({}, Arm("trl", "fsdp", "3")),
        ({}, Arm("trl", "plain", "1")),
        ({"train_batch_size": 4}, Arm("dsft", "fsdp", "batch")),
        ({"train_batch_size": 4, "trl_sampling": "batch_rebalance"}, Arm("trl", "fsdp", "1")),
    ],
)
def test_cases_in_which_the_batches_would_differ_are_refused(changes, arm):
    with pytest.raises(SystemExit, match="error: "):
        bench.check_case(case(**changes), [arm])
    bench.check_case(case(), [Arm("trl", "fsdp", "4"), Arm("dsft", "fsdp", "batch")])


def test_losses_are_compared_with_trl_and_a_wrong_one_ends_without_times(capsys):
    results = {"dsft:fsdp:off": [outcome(5, 4, loss=2.0003)], "trl:fsdp:1": [outcome(9, 8)]}
    record = bench.evaluate(results, case(), {"tokens": 100})
    assert record["losses_disagree"] == ["dsft:fsdp:off"]
    assert record["summary"] == {}
    with pytest.raises(SystemExit, match=r"no times of rows: .* dsft:fsdp:off"):
        bench.finish({"rows": record}, None)
    assert "s per epoch" not in capsys.readouterr().out
    assert bench.loss_table(results, case(dtype="bfloat16"))[1] == []


def test_a_loss_that_is_no_number_or_wrong_in_one_repeat_disagrees():
    results = {"trl:fsdp:1": [outcome(1)], "dsft:fsdp:off": [outcome(1), outcome(1, loss=2.1)]}
    assert bench.loss_table(results, case())[1] == ["dsft:fsdp:off"]
    results["dsft:fsdp:off"] = [outcome(1), outcome(1, loss=math.nan)]
    assert bench.loss_table(results, case())[1] == ["dsft:fsdp:off"]


def test_an_epoch_is_the_median_after_the_first_over_all_repeats_and_the_sum_of_its_steps():
    row = bench.summarize([outcome(9, 4, 6), outcome(8, 5, 100, peak=3.0)], case(), 1000)
    assert row["epoch_seconds"] == 5.5
    assert row["epoch_seconds_range"] == [4, 100]
    assert row["first_epoch_seconds"] == 8.5
    assert row["cpu_seconds"] == 11
    assert row["peak_gib"] == 3.0
    assert row["tokens_per_second"] == pytest.approx(1000 / 5.5)
    assert bench.summarize([outcome(9)], case(epochs=1), 1000)["epoch_seconds"] == 9
    row = bench.summarize([outcome(1, 2, 3, 4)], case(train_batch_size=4, epochs=2), 1000)
    assert row["epoch_seconds"] == 7
    assert row["computed_tokens"] == 200


def test_ratios_are_to_trls_fastest_and_to_the_same_backend(tmp_path):
    seconds = {
        "dsft:fsdp:batch": 2,
        "dsft:zero3:batch": 4,
        "trl:fsdp:1": 12,
        "trl:fsdp:4": 10,
        "trl:zero3:1": 20,
        "trl-targets:fsdp:1": 5,
    }
    record = bench.evaluate({name: [outcome(s)] for name, s in seconds.items()}, case(), {"tokens": 100})
    summary = record["summary"]
    assert [summary[name]["times_trl"] for name in seconds] == pytest.approx([5, 2.5, 10 / 12, 1, 0.5, 2])
    assert summary["dsft:zero3:batch"]["times_trl_same_backend"] == 5
    bench.finish({"rows": record}, str(tmp_path / "table.json"))
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["cases"]["rows"]["summary"] == summary
    table = bench.time_table(summary, {"MFU": {"trl:fsdp:1": "12 %"}}).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "x TRL fsdp" in table[0]
    assert table[4].endswith("| 0.83 | 0.83 | 12 % |")
    assert "x fastest TRL" in bench.time_table({"trl:plain:1": summary["trl:fsdp:1"]})


def test_steps_of_both_trainers_read_alike():
    ours = {"train/loss": 2.0, "train/grad_norm": 0.5, "train/step_seconds": 2.0, "train/fold_ratio": 4.0}
    ours["cpu_seconds"] = 7.0
    ours["train/effective_tokens_per_second"] = 600.0
    theirs = {"step": 1, "seconds": 2.0, "loss": 2.0, "grad_norm": 0.5, "computed_tokens": 300, "cpu_seconds": 7.0}
    assert bench.read_step(ours) == bench.read_step(theirs)


@pytest.mark.parametrize("batch", [8, 4])
def test_exported_rows_have_dsfts_tokens_and_targets(tmp_path, tokenizer, batch):
    from dsft.config.flags import RowFlags
    from dsft.dataset.batches import GlobalBatches
    from dsft.dataset.tokens import load_dataset

    facts = bench.export_rows(case(train_batch_size=batch), tmp_path / "rows.parquet")
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    data = load_dataset([str(SAMPLE_TRAIN)], "train_files", tokenizer, RowFlags(), max_rows=8)
    assert sum(label != -100 for row in rows for label in row["labels"]) == facts["targets"] == data.counts.targets
    assert all(label in (-100, token) for row in rows for token, label in zip(*row.values(), strict=True))
    batches = (
        [range(8)] if batch == 8 else GlobalBatches(np.arange(8), np.arange(8), batch, bench.SETTINGS["seed"]).epoch(0)
    )
    for start, members in zip(range(0, 8, batch), batches, strict=True):
        expected = sorted(data[row][0].tolist() for row in members)
        got = [row["input_ids"] for row in rows[start : start + batch]]
        assert sorted(got) == expected
        assert [len(ids) for ids in got] == sorted(map(len, got), reverse=True)


def test_made_up_conversations_are_a_row_for_each_answer(tmp_path):
    flags = bench.write_conversations(tmp_path, 2)
    facts = bench.export_rows(
        case(rows=16, train_batch_size=16, row_flags=flags, train_files=flags["train_files"]), tmp_path / "rows.parquet"
    )
    assert facts["tokens"] > 3 * facts["longest"] * 2  # each conversation several times


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="has 91 rows"):
        bench.export_rows(case(rows=1000, train_batch_size=1000), tmp_path / "rows.parquet")


def test_a_running_command_is_read_and_its_ranks_memory_seen(tmp_path):
    worker = "import os, sys, time; block = bytearray(int(sys.argv[1]) << 20); time.sleep(1)"
    code = (
        f"import os, subprocess, sys\nworker = {worker!r}\n"
        "parts = [subprocess.Popen([sys.executable, '-c', worker, size], env=os.environ | {'RANK': rank})\n"
        "         for rank, size in (('0', '50'), ('1', '150'))]\n"
        "open(sys.argv[1], 'w').write('{\"step\": 1}\\n{\"step\": 2}\\n')\n"
        "[part.wait() for part in parts]"
    )
    peaks = {}
    words = [sys.executable, "-c", code, str(tmp_path / "steps")]
    lines = list(bench.watch(words, tmp_path / "log", tmp_path / "steps", peaks, "an arm"))
    assert [line["step"] for line in lines] == [1, 2]
    assert 0 < lines[0]["cpu_seconds"] < 10
    assert 0.05 < peaks[0] < 0.15 < peaks[1] < 0.25


def test_a_command_that_fails_ends_with_its_error(tmp_path):
    words = [sys.executable, "-c", "raise RuntimeError('no room')"]
    with pytest.raises(SystemExit, match=r"(?s)trl:fsdp:1 ended with status 1.*RuntimeError: no room"):
        list(bench.watch(words, tmp_path / "log", tmp_path / "steps", {}, "trl:fsdp:1"))


def test_arms_are_repeated_in_turn_and_other_checkouts_compared(tmp_path, monkeypatch, capsys):
    calls = []

    def run_arm(arm, *_):
        calls.append(str(arm))
        return outcome(9, 3 if arm.tree == ROOT else 4)

    (tmp_path / "dsft").mkdir()
    (tmp_path / "dsft" / "train.py").touch()
    monkeypatch.setattr(bench, "run_arm", run_arm)
    monkeypatch.setattr(bench, "export_rows", lambda *_: {"tokens": 100, "targets": 10, "longest": 20})
    record = bench.measure(case(), bench.parse_arms(f"dsft:fsdp:off,dsft:fsdp:off@{tmp_path}"), tmp_path)
    assert calls == ["dsft:fsdp:off", f"dsft:fsdp:off@{tmp_path}"] * 2
    (line,) = bench.tree_lines(record["summary"])
    assert line.startswith("dsft:fsdp:off: 0.750 times the epoch seconds, ")
    assert line.endswith(f" of {tmp_path}")


@pytest.mark.parametrize(("norm", "status", "text"), [(0.5, 0, "bit for bit equal"), (0.6, 1, "DIFFERENT")])
def test_two_checkouts_are_compared_step_by_step(monkeypatch, capsys, norm, status, text):
    def run_arm(arm, flags, output, tree):
        return [{"step": 1, "train/loss": 2.0, "train/grad_norm": 0.5 if tree == ROOT else norm}]

    monkeypatch.setattr(compare_backends, "run_arm", run_arm)
    monkeypatch.setattr(sys, "argv", ["compare_backends.py", "--arms", "fsdp:1:auto", "--other_tree", "elsewhere"])
    with pytest.raises(SystemExit) as ended:
        compare_backends.main()
    assert ended.value.code == status
    assert text in capsys.readouterr().out


def test_random_rows_have_the_length_asked_for_and_fold(tokenizer):
    from dsft.dataset.chat_format import ChatFormat
    from dsft.dataset.readers import Cell

    form = ChatFormat(tokenizer)

    def tokens(kind):
        rows = bench_gpu.make_rows(kind, tokenizer, length=512, rows=2, dialogues=2, turns=8)
        parts = [form.prompt_and_response(row["prompt"], row["response"], Cell("", 0)) for row in rows]
        return [row.tokens.tolist() for [row] in form.tokenize(parts)]

    assert [len(ids) for ids in tokens("single")] == [512, 512]
    turns = tokens("turns")
    assert len(turns) == 16
    assert 480 < max(map(len, turns)) <= 512
    for first, second in itertools.pairwise(turns[:8]):
        assert second[: len(first)] == first
    assert sum(map(len, turns)) / sum(len(turns[i]) for i in (7, 15)) > 4


def test_work_of_the_7b_shape_is_near_the_published_one():
    # NeMo Automodel: 14,110 tokens/s at 42.8 % of 989.4 TFLOPS, all tokens targets.
    flops = bench_gpu.flops_per_token(bench_gpu.SHAPES["qwen2.5-7b-shape"], 16, 4096, 1.0)
    assert flops == pytest.approx(0.428 * 989.4e12 / 14110, rel=0.05)
    assert bench_gpu.peak_tflops("NVIDIA H100 80GB HBM3", None) == 989.4
    assert bench_gpu.peak_tflops("Another", None) is None
    assert bench_gpu.peak_tflops("Another", 100.0) == 100.0
