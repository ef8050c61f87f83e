"""DeepSpeed's JSON: defaults, the user's file on top, and what flags decide."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import dsft
from dsft.backends.base import BackendOptions
from dsft.errors import UserError, did_you_mean_path

AUTO = "auto"  # transformers' value for "set by the trainer"
SET_BY_FLAGS = {
    "optimizer": "--lr, --betas and --weight_decay",
    "scheduler": "--schedule and --warmup_ratio",
    "train_micro_batch_size_per_gpu": "--max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "--train_batch_size and --max_tokens_per_micro_batch",
}


def default_file() -> Path:
    """ds_configs/zero3.json: inside the installed package, else at the root of a checkout."""
    package = Path(dsft.__file__).parent
    files = [folder / "ds_configs" / "zero3.json" for folder in (package, package.parent)]
    return files[0] if files[0].is_file() else files[1]


def make_ds_config(options: BackendOptions) -> dict[str, Any]:
    """What DeepSpeed is started with: `config_file` over ds_configs/zero3.json, then what flags decide.

    Raises:
        UserError: the file is not a JSON object, contradicts a flag (all contradictions at once), or has a value in
            zero_optimization that DeepSpeed rejects.
    """
    config = _read(default_file())
    if options.config_file is not None:
        user = _read(Path(options.config_file).expanduser())
        _take_out_flags(user, config, options)
        config = _merge(config, user)
        _check_zero_optimization(config["zero_optimization"], options.config_file)
    config |= {
        # Placeholders: the Trainer decides what a micro-batch is. DeepSpeed derives train_batch_size from them.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.clip_grad,
        "bf16": {"enabled": options.dtype == torch.bfloat16},
        "fp16": {"enabled": False},
    }
    zero = config["zero_optimization"]
    if options.sharding == "hybrid":
        zero.setdefault("zero_hpz_partition_size", options.ranks_per_node)
    if options.sharding == "trainable":  # gather the few trained parameters once per step
        zero["stage3_param_persistence_threshold"] = sys.maxsize
    if options.cpu_offload:
        for part in ("offload_param", "offload_optimizer"):
            zero.setdefault(part, {"device": "cpu"})
    return config


def _take_out_flags(user: dict[str, Any], defaults: dict[str, Any], options: BackendOptions) -> None:
    """Remove what flags decide from the user's settings, which may omit it, say "auto", or mostly the same value."""
    where = f"--ds_config {options.config_file}"
    owned = {
        "train_batch_size": ("train_batch_size", options.train_batch_size),
        "gradient_clipping": ("clip_grad", options.clip_grad),
        "bf16.enabled": ("dtype", options.dtype == torch.bfloat16),
        "fp16.enabled": ("dtype", False),
        "zero_optimization.stage": ("backend", 3),
    }
    problems = [
        f"{where}: {key} is set by {flags}; remove it from the file"
        for key, flags in SET_BY_FLAGS.items()
        if user.pop(key, AUTO) != AUTO
    ]
    for key, value in user.items():
        if isinstance(defaults.get(key), dict) and not isinstance(value, dict) and value != AUTO:
            problems.append(f"{where}: {key} must be an object, got {json.dumps(value)}")
    for key, (flag, value) in owned.items():
        found = _pop(user, key)
        if found not in (None, AUTO, value):
            problems.append(
                f"{where}: {key} is {json.dumps(found)}, but --{flag} sets it to {json.dumps(value)}; "
                "change the flag or remove the setting"
            )
    if problems:
        raise UserError("\n".join(problems))


def _check_zero_optimization(settings: dict[str, Any], file: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise UserError(f"--ds_config {file}: zero_optimization: {'; '.join(problems)}; correct the file") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        meant = did_you_mean_path(path)
        raise UserError(f"--ds_config {path} cannot be read: {error.strerror}{meant}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--ds_config {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--ds_config {path} must contain a JSON object, got {type(config).__name__}")
    return config


def _pop(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    settings = config.get(section, {}) if section else config
    return settings.pop(name, None) if isinstance(settings, dict) else settings


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, dict) else {}, value)
        elif value != AUTO:
            merged[key] = value
    return merged
