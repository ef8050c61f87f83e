"""How a flag is declared, and the flags that several commands have.

The string under a field is its meaning; --help, config.yaml and docs/flags.md are made from it.
A field without a default is a required flag. Nothing in this package imports torch.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def flag(
    default: Any = None,
    *,
    section: str | None = None,
    run_identity: bool = False,
    required: bool = False,
    positional: bool = False,
) -> Any:
    """One flag.

    Args:
        default: its value where it is not given.
        section: starts a group in --help.
        run_identity: may not change on resume.
        required: has no default.
        positional: may also be given without its name; a list takes several values.
    """
    metadata = {"section": section, "run_identity": run_identity, "required": required, "positional": positional}
    if required:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def too_small(config: Any, minimum: int, *names: str) -> list[str]:
    """What is wrong with flags that have a minimum; None is not checked."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{name} must be {minimum} or more, got {value}"
        for name, value in values.items()
        if value is not None and value < minimum
    ]


@dataclass(kw_only=True)
class CommonFlags:
    """What every command has."""

    config: str | None = flag(None, section="General")
    """YAML file with values for these flags; flags on the command line win."""
    debug: bool = flag(False)
    """Show tracebacks and the libraries' own messages."""


@dataclass(kw_only=True)
class ModelFlags:
    """Which model, and how it computes."""

    model: str = flag(required=True, section="Model", run_identity=True)
    """Hugging Face name, a folder with safetensors, or smollm2-135m (the embedded small model)."""
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto")
    """Compute dtype; auto is bfloat16 where the hardware computes it, else float32."""
    attn_implementation: str = flag("auto")
    """Attention of transformers: auto, sdpa, eager, flash_attention_2, …"""
    trust_remote_code: bool = flag(False)
    """Run Python code that comes with the model. Off unless you have read that code."""


@dataclass(kw_only=True)
class RowFlags:
    """Where a row's text stands in a parquet file, and how long it may be."""

    prompt_key: str = flag("prompt", section="Rows", run_identity=True)
    """Column of the prompt: a string, or a list of {role, content}."""
    response_key: str = flag("response", run_identity=True)
    """Column of the response: a string, or one {role, content} message."""
    messages_key: str | None = flag(None, run_identity=True)
    """Column of whole conversations, every assistant turn a target; replaces prompt_key and response_key."""
    prompt_dict_keys: list[str] | None = flag(None, run_identity=True)
    """Keys that lead from the prompt column's nested value to the prompt."""
    response_dict_keys: list[str] | None = flag(None, run_identity=True)
    """Keys that lead from the response column's nested value to the response."""
    with_thinking: bool = flag(False, run_identity=True)
    """End the prompt with <think>, which the response then closes."""
    max_length: int = flag(2048, run_identity=True)
    """Longest row in tokens, prompt and response together."""
    truncation: Literal["error", "left", "right", "drop"] = flag("error", run_identity=True)
    """A longer row: error stops, left cuts the prompt's front, right cuts the end, drop leaves the row out."""

    def columns(self) -> tuple[list[str], list[str]]:
        """The columns that are read, and the flag that names each."""
        names = ["prompt_key", "response_key"] if self.messages_key is None else ["messages_key"]
        return [getattr(self, name) for name in names], names
