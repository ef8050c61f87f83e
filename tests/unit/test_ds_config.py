"""DeepSpeed's JSON: the user's file over ours, and no contradiction to a flag."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from dsft.backends.base import BackendOptions
from dsft.backends.ds_config import SET_BY_FLAGS, default_file, make_ds_config
from dsft.errors import UserError

OPTIONS = BackendOptions(torch.device("cpu"), torch.float32, trains_base=True, clip_grad=1.0, train_batch_size=128)


@pytest.fixture
def read(tmp_path):
    def read(content):
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return make_ds_config(replace(OPTIONS, config_file=str(file)))

    return read


def defaults():
    return json.loads(default_file().read_text())


def finished(config):
    """Settings and what flags decide of them."""
    of_flags = {"gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
    return config | of_flags | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


def problems(read, content) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(content)
    return str(caught.value).splitlines()


def test_without_a_file_the_defaults_stand():
    assert make_ds_config(OPTIONS) == finished(defaults())


def test_sharding_sets_the_partition_of_a_node_and_what_stays_whole():
    hybrid = make_ds_config(replace(OPTIONS, ranks=4, ranks_per_node=2, sharding="hybrid"))["zero_optimization"]
    assert hybrid == defaults()["zero_optimization"] | {"zero_hpz_partition_size": 2}
    trainable = make_ds_config(replace(OPTIONS, sharding="trainable"))["zero_optimization"]
    assert trainable["stage3_param_persistence_threshold"] == sys.maxsize


def test_all_contradictions_are_reported_at_once_with_setting_values_and_flag(read, tmp_path):
    content = {
        "optimizer": {"type": "Adam"},
        "scheduler": {},
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
    }
    where, remedy = f"--ds_config {tmp_path}/ds.json:", "change the flag or remove the setting"
    by, remove = "is set by", "remove it from the file"
    assert problems(read, content) == [
        f"{where} optimizer {by} --lr, --betas and --weight_decay; {remove}",
        f"{where} scheduler {by} --schedule and --warmup_ratio; {remove}",
        f"{where} train_micro_batch_size_per_gpu {by} --max_tokens_per_micro_batch; {remove}",
        f"{where} gradient_accumulation_steps {by} --train_batch_size and --max_tokens_per_micro_batch; {remove}",
        f"{where} gradient_clipping is 0.5, but --clip_grad sets it to 1.0; {remedy}",
        f"{where} bf16.enabled is true, but --dtype sets it to false; {remedy}",
        f"{where} zero_optimization.stage is 2, but --backend sets it to 3; {remedy}",
    ]


def test_auto_and_the_flags_own_values_are_accepted(read):
    same = {"gradient_clipping": 1.0, "train_batch_size": "auto", "bf16": {"enabled": "auto"}}
    decided = dict.fromkeys(SET_BY_FLAGS, "auto")
    content = same | decided | {"zero_optimization": {"stage": 3}, "communication_data_type": "auto"}
    assert read(content) == finished(defaults())


def test_objects_are_merged_key_by_key(read):
    content = {"zero_optimization": {"overlap_comm": False, "offload_param": {"device": "cpu"}}, "steps_per_print": 7}
    expected = defaults()
    expected["zero_optimization"] |= {"overlap_comm": False, "offload_param": {"device": "cpu"}}
    assert read(content) == finished(expected | {"steps_per_print": 7})


def test_auto_inside_a_new_object_never_reaches_deepspeed(read):
    content = {"activation_checkpointing": {"number_checkpoints": "auto", "profile": True, "deep": {"x": "auto"}}}
    assert read(content)["activation_checkpointing"] == {"profile": True, "deep": {}}


def test_the_offload_file_that_comes_with_the_project_is_accepted(read):
    config = read(default_file().with_name("zero3_offload.json").read_text())
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'a': 1}", "is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("", "is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[1]", "must contain a JSON object, got list"),
        ("3", "must contain a JSON object, got int"),
    ],
)
def test_a_file_that_holds_no_json_object_is_one_line(read, tmp_path, content, message):
    assert problems(read, content) == [f"--ds_config {tmp_path}/ds.json {message}"]


def test_a_missing_file_is_one_line():
    with pytest.raises(UserError, match=r"^--ds_config /no/ds.json cannot be read: No such file or directory$"):
        make_ds_config(replace(OPTIONS, config_file="/no/ds.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_clipping": {"value": 1.0}}, 'gradient_clipping is {"value": 1.0}, but --clip_grad sets it to 1.0;'),
        ({"zero_optimization": 3}, "zero_optimization must be an object, got 3"),
        ({"zero_optimization": [1]}, "zero_optimization must be an object, got [1]"),
        ({"zero_optimization": {"sub_group_size": "big"}}, "zero_optimization: sub_group_size: Input should be"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(read, tmp_path, content, message):
    assert problems(read, content)[0].startswith(f"--ds_config {tmp_path}/ds.json: {message}")
