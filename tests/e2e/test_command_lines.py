"""The command lines of the README, as a user types them, with the embedded model and the sample data."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import BIN, COMMANDS, ROOT, SAMPLE_TRAIN, SAMPLE_VAL, flags, metrics, run, start_words

SMALL = flags(
    model="smollm2-135m", train_files="data/sample_train.parquet", val_files="data/sample_val.parquet",
    max_train_rows=16, max_val_rows=6, train_batch_size=8, max_tokens_per_micro_batch=1500, lora_rank=8, lr=1e-3,
)  # fmt: skip
METRIC_KEYS = {
    "step", "epoch", "train/loss", "train/grad_norm", "train/lr", "train/targets", "train/tokens",
    "train/tokens_per_second", "train/effective_tokens_per_second", "train/fold_ratio", "train/mfu",
    "train/rank_imbalance", "train/data_seconds", "train/save_seconds", "train/step_seconds", "memory",
}  # fmt: skip


def check_speed(line: dict) -> None:
    """What a step says of its speed fits together."""
    assert line["train/fold_ratio"] >= 1
    assert line["train/rank_imbalance"] >= 0
    effective = line["train/tokens_per_second"] * line["train/fold_ratio"]
    assert line["train/effective_tokens_per_second"] == pytest.approx(effective)
    assert effective == pytest.approx(line["train/tokens"] / line["train/step_seconds"])
    assert 0 < line["train/mfu"] < 1
    assert 0 < line["train/data_seconds"] < line["train/step_seconds"]


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed's default port")
@pytest.mark.parametrize(
    "start",
    [
        ["torchrun", "--standalone", "--nproc_per_node", "2", "dsft/train.py", "--backend", "fsdp"],
        ["deepspeed", "--num_accelerators", "2", "dsft/train.py", "--backend", "zero3"],
        ["deepspeed", "dsft/train.py", "--backend", "zero3"],
        ["dsft-train", "--backend", "zero3"],
    ],
    ids=["torchrun", "deepspeed-2", "deepspeed", "entry-point"],
)
def test_every_start_trains(start, tiny_model, tmp_path):
    """The embedded model under torchrun, the tiny one otherwise."""
    words = [BIN / start[0], *start[1:], *SMALL, "--validate_before_training", "--output_dir", tmp_path / "out"]
    if start[0] != "torchrun":
        words += ["--model", str(tiny_model), "--lr", "0.01"]
    done = run(words)
    assert done.status == 0, done.err
    assert "Traceback" not in done.err
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2]
    assert set(lines[0]) == METRIC_KEYS
    for line in lines:
        check_speed(line)
    assert max(line["train/fold_ratio"] for line in lines) > 1.5  # the sample's rows are turns of dialogues
    losses = [line["val/loss"] for line in metrics(tmp_path / "out", "val/loss")]
    assert losses[-1] < losses[0]
    resolved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert resolved["lora_rank"] == 8
    assert resolved["max_length"] == 2048


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"train", "pipeline"}))
def test_every_command_runs_as_typed(command, trained, tiny_model, tmp_path):
    """In a fresh interpreter, as other tests start dsft.train, and test_pipeline.py dsft.pipeline."""
    words = {
        "preview": flags(model=tiny_model, train_files=SAMPLE_TRAIN, max_train_rows=4),
        "merge": flags(checkpoint=trained, output=tmp_path / "merged"),
        "checkpoint": [trained],
        "report": [trained, "--output", tmp_path / "report.html"],
        "generate": flags(env="frozenlake", train_size=2, test_size=1, output_dir=tmp_path),
        "validate": flags(model="expert", env="frozenlake", episodes=2, output=tmp_path / "report.json"),
    }[command]
    done = run([sys.executable, "-m", f"dsft.{command}", *words])
    assert (done.status, done.err) == (0, "")
    assert done.out


@pytest.mark.slow
def test_merge_of_the_embedded_model(commands, tmp_path):
    out = tmp_path / "out"
    done = commands.run("dsft.train", [*SMALL, "--output_dir", out])
    assert done.status == 0, done.err
    done = run([BIN / "dsft-merge", "--checkpoint", out])
    assert done.status == 0, done.err
    assert "210 weights changed, no other" in done.out
    assert "largest difference of a logit" in done.out
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert merged.dtype == torch.bfloat16  # the base's
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    assert "<|im_start|>" in tokenizer.chat_template
    assert (out / "merged" / "generation_config.json").is_file()
    again = commands.run("dsft.merge", ["--checkpoint", out])
    assert again.status == 1
    assert again.errors == [f"error: {out}/merged exists and is not overwritten; choose another --output, or remove it"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_merge_of_a_numbered_checkpoint_in_shards(more, commands, tiny_model, tmp_path):
    out = tmp_path / "out"
    words = flags(model=tiny_model, train_files=SAMPLE_TRAIN, max_train_rows=4, lora_rank=4, lr=1e-2, output_dir=out)
    done = commands([*start_words("fsdp", 1), *words, *flags(**more)])
    assert done.status == 0, done.err
    target = tmp_path / "merged"
    words = flags(checkpoint=out / "checkpoint-000001", output=target, max_shard_size="2MB")
    done = commands.run("dsft.merge", words)
    assert done.status == 0, done.err
    assert (target / "model.safetensors.index.json").is_file()
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(7, 50)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, str(out / "checkpoint-000001")).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(target).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(commands, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    words = flags(model=tiny_model, train_files=SAMPLE_TRAIN, max_train_rows=4, lora_rank=4, lr=1e-2, output_dir=out)
    assert commands([*start_words("fsdp", 1), *words]).status == 0
    return out


@pytest.fixture
def merge_errors(commands):
    def merge_errors(*words):
        done = commands.run("dsft.merge", words)
        assert done.status == 1
        assert "Traceback" not in done.err
        assert done.seconds < 30
        return done.errors

    return merge_errors


def test_merge_refuses_a_folder_without_checkpoints(merge_errors, tmp_path):
    (error,) = merge_errors("--checkpoint", tmp_path)
    assert "no complete checkpoint in this folder" in error


@pytest.mark.slow
def test_merge_refuses_another_base(merge_errors, trained, embedded, tmp_path):
    (error,) = merge_errors("--checkpoint", trained, "--base", embedded, "--output", tmp_path / "merged")
    assert "does not fit" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_merge_refuses_a_full_model(merge_errors, commands, tmp_path, tiny_model):
    out = tmp_path / "full"
    words = flags(model=tiny_model, train_files=SAMPLE_TRAIN, max_train_rows=4, lora_rank=0, output_dir=out)
    assert commands([*start_words("fsdp", 1), *words]).status == 0
    (error,) = merge_errors("--checkpoint", out)
    assert "needs no merge" in error


@pytest.mark.slow
def test_merge_leaves_nothing_when_the_proof_fails(merge_errors, trained, tmp_path):
    (error,) = merge_errors("--checkpoint", trained, "--output", tmp_path / "merged", "--tolerance", 0)
    assert "logits differ from base + adapter by" in error
    assert not list(tmp_path.iterdir())


def test_merge_names_an_adapter_that_changes_nothing(merge_errors, trained, tmp_path):
    from safetensors.torch import load_file, save_file

    from dsft.checkpointing.integrity import checksum, mark_complete

    copied = tmp_path / "checkpoint-000001"
    shutil.copytree(trained / "checkpoint-000001", copied)
    weights = load_file(copied / "adapter_model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.up_proj.lora_B" in name)
    weights[name].zero_()
    save_file(weights, copied / "adapter_model.safetensors")
    mark_complete(copied, {p.name: checksum(p) for p in copied.iterdir() if p.name != "COMPLETE"})
    (error,) = merge_errors("--checkpoint", copied, "--output", tmp_path / "merged")
    assert "layers.1.mlp.up_proj.weight is a target of the adapter but did not change" in error


@pytest.mark.slow
def test_a_config_file_gives_defaults_and_flags_take_precedence(commands, tiny_model, tmp_path):
    config = tmp_path / "run.yaml"
    values = {
        "model": str(tiny_model),
        "train_files": [str(SAMPLE_TRAIN)],
        "max_train_rows": 6,
        "lora_rank": 4,
        "lr": 1,
    }
    config.write_text(yaml.safe_dump(values))
    words = flags(config=config, lr=1e-4, output_dir=tmp_path / "out", warmup_ratio=0)
    done = commands.run("dsft.train", words)
    assert done.status == 0, done.err
    assert metrics(tmp_path / "out")[0]["train/lr"] == 1e-4
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["max_train_rows"] == 6


@pytest.mark.slow
def test_a_start_says_that_weights_were_loaded_whole(commands, tiny_model, tmp_path):
    """transformers renames these while it loads them."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    [file] = model.glob("*.safetensors")
    weights = {name.replace("model.", "transformer.model."): values for name, values in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    words = flags(
        model=model, train_files=SAMPLE_TRAIN, dtype="float32", total_training_steps=1, output_dir=tmp_path / "out"
    )
    done = commands.run("dsft.train", words)
    assert done.status == 0, done.err
    assert f"warning: transformers converts the weights of {model} while loading: each rank has held all" in done.err


def test_wandb_offline_gets_the_config_and_its_absence_stops_nothing(tiny_model, tmp_path):
    words = flags(
        model=tiny_model, train_files=SAMPLE_TRAIN, max_train_rows=4, lora_rank=4, logger="console,wandb,tensorboard"
    )
    done = run([*start_words("fsdp", 1), *words, "--output_dir", tmp_path / "a"], env={"WANDB_MODE": "offline"})
    assert done.status == 0, done.err
    assert "warning" not in done.err
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*"))
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('no wandb here')")
    env = {"PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    done = run([*start_words("fsdp", 1), *words, "--output_dir", tmp_path / "b"], env=env)
    assert done.status == 0, done.err
    assert "warning: wandb is off: no wandb here" in done.err


def test_a_run_is_quiet_where_the_output_is_no_terminal(tiny_model, tmp_path):
    words = flags(model=tiny_model, train_files=SAMPLE_TRAIN, val_files=SAMPLE_VAL, max_train_rows=6, lora_rank=4)
    done = run([*start_words("fsdp", 1), *words, "--output_dir", tmp_path / "out"])
    assert done.status == 0, done.err
    assert done.err == ""
    assert len(done.out.splitlines()) < 15


@pytest.mark.slow
def test_medical_script_trains_merges_and_keeps_the_exit_status(tiny_model, tmp_path):
    env = {"MODEL": str(tiny_model), "TRAIN_FILES": str(SAMPLE_TRAIN), "VAL_FILES": str(SAMPLE_VAL)}
    script = ["bash", "scripts/finetune_lora_med.sh"]
    small = flags(max_train_rows=16, train_batch_size=16, total_epochs=1, lr=1e-2)
    done = run([*script, 2, tmp_path / "out", *small], env=env)
    assert done.status == 0, done.err
    assert (tmp_path / "out" / "merged" / "config.json").is_file()
    failed = run([*script, 1, tmp_path / "other", "--train_files", "nowhere.parquet"], env=env)
    assert failed.status == 1
    assert not (tmp_path / "other" / "merged").exists()
    assert run([*script, "--help"]).status == 0
    assert run([*script, "two", tmp_path / "x"]).status == 1


def test_the_quickstart_refuses_an_unknown_flag_before_it_sets_up_anything():
    assert run(["bash", "scripts/quickstart.sh", "--hlep"], timeout=10).status == 1


def test_sample_data_is_what_its_script_makes(tmp_path):
    shutil.copy(ROOT / "data" / "make_sample.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_sample.py"], check=True, capture_output=True)
    for name in ("sample_train.parquet", "sample_val.parquet", "sample_agents.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_checkpoints_hold_no_base_weights_and_no_pickle(trained):
    files = {path.name: path for path in (trained / "latest").iterdir()}
    assert set(files) >= {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "COMPLETE"}
    from safetensors import safe_open

    with safe_open(files["adapter_model.safetensors"], framework="pt") as handle:
        assert all("lora_" in name for name in handle.keys())  # noqa: SIM118
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert json.loads(files["trainer_state.json"].read_text())["step"] == 1
