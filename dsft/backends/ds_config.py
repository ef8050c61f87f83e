"""DeepSpeed's JSON: our defaults, the user's file over them, and no contradiction to a flag."""

import json
from pathlib import Path
from typing import Any

import dsft
from dsft.errors import UserError, did_you_mean_path

AUTO = "auto"  # transformers' word for "the trainer fills this in"
DECIDED = {
    "optimizer": "--lr, --betas and --weight_decay",
    "scheduler": "--schedule and --warmup_ratio",
    "train_micro_batch_size_per_gpu": "--max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "--train_batch_size and --max_tokens_per_micro_batch",
}


def default_file() -> Path:
    """ds_configs/zero3.json: inside the installed package, else at the root of a checkout."""
    package = Path(dsft.__file__).parent
    installed = package / "ds_configs" / "zero3.json"
    return installed if installed.is_file() else package.parent / "ds_configs" / "zero3.json"


def read_ds_config(path: str | None, owned: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """The user's settings over ds_configs/zero3.json.

    Args:
        path: the user's file, or None.
        owned: values that flags decide, by dotted key: (flag, value). The file may leave them out, say "auto",
            or say the same.

    Raises:
        UserError: no JSON object, or a setting that contradicts a flag; all contradictions at once.
    """
    config = _read(default_file())
    if path is None:
        return config
    user = _read(Path(path).expanduser())
    problems = [
        f"--ds_config {path}: '{key}' is dsft's own to decide, from {flags}; take it out"
        for key, flags in DECIDED.items()
        if user.pop(key, AUTO) != AUTO
    ]
    for key, value in user.items():
        if isinstance(config.get(key), dict) and not isinstance(value, dict) and value != AUTO:
            problems.append(f"--ds_config {path}: {key} must be an object, got {json.dumps(value)}")
    for key, (flag, value) in owned.items():
        said = _pop(user, key.split("."))
        if said not in (None, AUTO, value):
            problems.append(
                f"--ds_config {path}: {key} is {json.dumps(said)}, but --{flag} makes it {json.dumps(value)}; "
                "change one of them, or take the setting out of the file"
            )
    if problems:
        raise UserError("\n".join(problems))
    return _merge(config, user)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        meant = did_you_mean_path(path)
        raise UserError(f"--ds_config {path} cannot be read: {error.strerror}{meant}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--ds_config {path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--ds_config {path} must hold a JSON object, got a {type(config).__name__}")
    return config


def _pop(config: dict[str, Any], keys: list[str]) -> Any:
    for key in keys[:-1]:
        config = config.get(key, {})
        if not isinstance(config, dict):
            return config
    return config.pop(keys[-1], None)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, dict) else {}, value)
        elif value != AUTO:
            merged[key] = value
    return merged
