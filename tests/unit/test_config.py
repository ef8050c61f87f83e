"""What a config refuses before anything is read."""

import pytest

from dsft.cli import parse
from dsft.config import MergeConfig, TrainConfig, ValidateConfig
from dsft.errors import UserError, did_you_mean


def config(**values):
    return TrainConfig(**{"model": "m", "train_files": ["t"], "output_dir": "no-such-folder"} | values)


def problems(**values) -> list[str]:
    with pytest.raises(UserError) as caught:
        config(**values).check()
    return str(caught.value).splitlines()


def test_the_defaults_are_accepted():
    config().check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_length": 0}, "max_length must be 1 or more, got 0"),
        ({"train_batch_size": 0}, "train_batch_size must be 1 or more, got 0"),
        ({"max_tokens_per_micro_batch": -1}, "max_tokens_per_micro_batch must be 1 or more, got -1"),
        ({"total_epochs": 0}, "total_epochs must be 1 or more, got 0"),
        ({"max_train_rows": 0}, "max_train_rows must be 1 or more, got 0"),
        ({"max_val_rows": 0}, "max_val_rows must be 1 or more, got 0"),
        ({"total_training_steps": 0}, "total_training_steps must be 1 or more, got 0"),
        ({"max_checkpoints": 0}, "max_checkpoints must be 1 or more, got 0"),
        ({"lora_rank": -4}, "lora_rank must be 0 or more, got -4"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lora_alpha": -1.0}, "lora_alpha must be above 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"clip_grad": -1.0}, "clip_grad must be 0 or more, got -1.0"),
        ({"warmup_ratio": 1.1}, "warmup_ratio must be between 0 and 1, got 1.1"),
        ({"min_lr_ratio": -0.1}, "min_lr_ratio must be between 0 and 1, got -0.1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be 0 or more and below 1, got 1.0"),
        ({"betas": (0.9, 1.0)}, "betas must each be 0 or more and below 1, got (0.9, 1.0)"),
        ({"eval_steps": -1}, 'eval_steps must be a number of steps, "epoch", or 0 for never, got -1'),
        ({"save_steps": -1}, 'save_steps must be a number of steps, "epoch", or 0 for never, got -1'),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        (
            {"lora_rank": 0, "use_dora": True},
            "use_dora, use_rslora and lora_dropout need lora_rank above 0, got lora_rank=0",
        ),
        ({"target_modules": []}, "target_modules is empty; name modules, or all-linear"),
        ({"logger": ["wand"]}, "logger must be any of console, wandb, tensorboard, got wand"),
        ({"val_fraction": 0.0}, "val_fraction must be above 0 and below 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must be above 0 and below 1, got 1.0"),
        (
            {"val_fraction": 0.1, "val_files": ["v"]},
            "val_fraction splits --train_files; drop it, or --val_files",
        ),
        (
            {"val_fraction": 0.1, "val_files": ["v"], "max_val_rows": 3},
            "val_fraction splits --train_files; drop it, or --val_files and --max_val_rows",
        ),
        ({"ds_config": "x.json"}, "ds_config is for --backend zero3, got --backend fsdp; drop one of them"),
        (
            {"messages_key": "m", "with_thinking": True},
            "with_thinking needs prompt and response columns; it cannot be combined with messages_key",
        ),
    ],
)
def test_invalid_value(values, message):
    assert problems(**values) == [message]


@pytest.mark.parametrize(
    "values",
    [
        {"lora_rank": 0},
        {"eval_steps": 0, "save_steps": 0},
        {"clip_grad": 0.0, "weight_decay": 0.0, "warmup_ratio": 0.0},
        {"warmup_ratio": 1.0, "min_lr_ratio": 1.0},
        {"betas": (0.0, 0.0)},
        {"logger": []},
        {"max_tokens_per_micro_batch": 1, "gradient_checkpointing": True, "fold": "off"},
        {"backend": "zero3", "ds_config": "x.json"},
    ],
)
def test_limits_are_accepted(values):
    config(**values).check()


def test_all_invalid_values_are_reported_together():
    assert problems(lr=-1.0, seed=-2, max_length=0) == [
        "max_length must be 1 or more, got 0",
        "lr must be above 0, got -1.0",
        "seed must be 0 or more, got -2",
    ]


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "f").touch()
    assert problems(output_dir=str(tmp_path / "f")) == [f"output_dir {tmp_path}/f is a file; name a folder"]


def test_lists_are_not_shared_between_configs():
    config().target_modules.append("q_proj")
    assert config().target_modules == ["all-linear"]


def test_run_identity_is_everything_that_changes_the_numbers():
    identity = config(seed=7).run_identity()
    assert identity["seed"] == 7
    free = {"backend", "dtype", "max_tokens_per_micro_batch", "output_dir", "resume", "eval_steps"}
    assert (free | {"gradient_checkpointing", "cpu_offload"}).isdisjoint(identity)
    assert {"model", "lr", "train_batch_size", "fold", "max_length", "schedule", "lora_rank"} <= set(identity)


def test_on_leak_changes_the_run_only_by_what_it_drops_from_training():
    same = [("warn", "error"), (None, "warn"), ("drop_val", "ignore"), ("drop_train", "drop_train")]
    assert all(TrainConfig.is_same_run("on_leak", *pair) for pair in same)
    other = [("warn", "drop_train"), (None, "drop_train"), ("drop_train", "drop_val")]
    assert not any(TrainConfig.is_same_run("on_leak", *pair) for pair in other)
    assert not TrainConfig.is_same_run("val_fraction", None, 0.1)
    assert {"on_leak", "val_fraction"} <= set(config().run_identity())


def test_negative_tolerance():
    with pytest.raises(UserError, match=r"^tolerance must be 0 or more, got -1.0$"):
        MergeConfig(checkpoint="c", tolerance=-1.0).check()


@pytest.mark.parametrize(
    ("mode", "values", "message"),
    [
        ("env", {"max_length": 100}, "--max_length belongs to --data; drop one of them"),
        ("env", {"prompt_key": "question"}, "--prompt_key belongs to --data; drop one of them"),
        ("env", {"response_dict_keys": ["text"]}, "--response_dict_keys belongs to --data; drop one of them"),
        (
            "env",
            {"messages_key": "m", "truncation": "left"},
            "--messages_key, --truncation belongs to --data; drop one of them",
        ),
        ("data", {"style": "plain"}, "--style belongs to --env; drop one of them"),
        ("data", {"history_turns": 0}, "--history_turns belongs to --env; drop one of them"),
        ("data", {"levels": "l.parquet"}, "--levels belongs to --env; drop one of them"),
        ("data", {"exclude_levels": ["l.parquet"]}, "--exclude_levels belongs to --env; drop one of them"),
        ("data", {"max_turns": 5}, "--max_turns belongs to --env; drop one of them"),
        ("data", {"max_steps": 50, "max_depth": 50}, "--max_steps, --max_depth belongs to --env; drop one of them"),
        ("data", {"transcripts": 0}, "--transcripts belongs to --env; drop one of them"),
    ],
)
def test_validate_rejects_flags_of_its_other_mode(mode, values, message):
    modes = {"env": {"env": "frozenlake"}, "data": {"data": "d.parquet"}}
    with pytest.raises(UserError) as caught:
        ValidateConfig(model="m", **modes[mode], **values).check()
    assert str(caught.value) == message
    other = modes["data" if mode == "env" else "env"]
    if "messages_key" not in values:  # which neither reads
        ValidateConfig(model="m", **other, **values).check()


@pytest.mark.parametrize("values", [{"env": "sokoban"}, {"data": "d.parquet"}])
def test_validate_accepts_flags_of_both_modes(values):
    shared = {"with_thinking": True, "episodes": 3, "seed": 1, "temperature": 0.5, "max_new_tokens": 9}
    ValidateConfig(model="m", **values, **shared).check()


def test_suggestion_needs_a_similar_name():
    assert did_you_mean("promt", ["response", "prompt"]) == " (did you mean 'prompt'?)"
    assert did_you_mean("zzz", ["response", "prompt"]) == ""


def test_template_arguments_are_json_or_a_mapping(tmp_path):
    words = ["--model", "m", "--train_files", "t", "--output_dir", "o"]
    given = parse(TrainConfig, [*words, "--template_arguments", '{"enable_thinking": false}']).template_arguments
    assert given == {"enable_thinking": False}
    file = tmp_path / "run.yaml"
    file.write_text("template_arguments: {enable_thinking: false}\n", encoding="utf-8")
    assert parse(TrainConfig, [*words, "--config", str(file)]).template_arguments == given
    with pytest.raises(UserError, match=r"template_arguments: expected JSON object, got '\{enable'"):
        parse(TrainConfig, [*words, "--template_arguments", "{enable"])
