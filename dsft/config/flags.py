"""How a flag is declared, and the flags shared by several commands.

The docstring under a field is its help text; --help and docs/flags.md are generated from it.
A field without a default is a required flag. Nothing in this package imports torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dsft.errors import UserError

RANGES: dict[str, Callable[[Any], bool]] = {
    "0 or more": lambda value: value >= 0,
    "1 or more": lambda value: value >= 1,
    "above 0": lambda value: value > 0,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "0 or more and below 1": lambda value: 0 <= value < 1,
    'a number of steps, "epoch", or 0 for never': lambda value: value == "epoch" or value >= 0,
    "above 0 and below 1": lambda value: 0 < value < 1,
}


def flag(
    default: Any = None,
    *,
    section: str | None = None,
    run_identity: bool = False,
    required: bool = False,
    positional: bool = False,
    must_be: str | None = None,
) -> Any:
    """Declare a flag.

    `section` starts a group in --help. A `run_identity` must not change on resume. A `positional` flag may also be
    given without its name, a list as several words. `must_be` is one of RANGES; None is always allowed.
    """
    metadata = {"section": section, "run_identity": run_identity, "required": required, "positional": positional}
    metadata["must_be"] = must_be
    if required:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class CommonFlags:
    """Flags of every command."""

    config: str | None = flag(None, section="General")
    """YAML file with flag values; flags on the command line take precedence."""
    debug: bool = flag(False)
    """Show tracebacks and the libraries' log messages."""

    def check(self) -> None:
        """Raise UserError with every problem that can be found before anything is read."""
        ranged = [(f.name, f.metadata["must_be"], getattr(self, f.name)) for f in fields(self)]
        problems = [
            f"{name} must be {must_be}, got {value}"
            for name, must_be, value in ranged
            if must_be and value is not None and not RANGES[must_be](value)
        ]
        problems += self.problems()
        if problems:
            raise UserError("\n".join(problems))

    def problems(self) -> Iterator[str]:
        """What is wrong with the flags, other than a value out of its range."""
        yield from ()


@dataclass(kw_only=True)
class ModelFlags:
    """The model, and how it computes."""

    model: str = flag(required=True, section="Model", run_identity=True)
    """Model name on the Hugging Face Hub, folder with safetensors, or smollm2-135m (the embedded small model)."""
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto")
    """Compute dtype; auto is bfloat16 if the hardware supports it, else float32."""
    attn_implementation: str = flag("auto")
    """Attention implementation of transformers: auto, sdpa, eager, flash_attention_2, …"""
    chat_template: str | None = flag(None)
    """File with a Jinja chat template, instead of the tokenizer's own; checkpoints and merged models get it."""
    trust_remote_code: bool = flag(False)
    """Allow Python code that comes with the model. Read that code before you turn this on."""


@dataclass(kw_only=True)
class RowFlags:
    """The columns of a row's text, and how long a row may be."""

    format: Literal["auto", "prompt_response", "messages", "sharegpt", "alpaca"] = flag(
        "auto", section="Rows", run_identity=True
    )
    """Format of a row; auto recognizes ShareGPT (conversations) and Alpaca (instruction, input, output)."""
    prompt_key: str = flag("prompt", run_identity=True)
    """Column of the prompt: a string, or a list of messages."""
    response_key: str = flag("response", run_identity=True)
    """Column of the response: a string, or one message."""
    messages_key: str | None = flag(None, run_identity=True)
    """Column of whole conversations, whose assistant turns are learned. Replaces prompt_key and response_key."""
    learn: Literal["all", "last", "flagged"] = flag("all", run_identity=True)
    """Assistant turns of a conversation that are learned: all, the last, or those whose message has train: true."""
    tools_key: str | None = flag(None, run_identity=True)
    """Column of the tools' schemas: a list, or JSON text of one."""
    weight_key: str | None = flag(None, run_identity=True)
    """Column of the rows' weights in the loss, 0 or more; a message may also have a weight of its own."""
    system_prompt: str | None = flag(None, run_identity=True)
    """System prompt for rows that have none: a text, or the name of a text file."""
    template_arguments: dict[str, object] | None = flag(None, run_identity=True)
    """Arguments of the chat template, as JSON: '{"enable_thinking": false}'."""
    prompt_dict_keys: list[str] | None = flag(None, run_identity=True)
    """Keys that lead to the prompt in a nested prompt column, outermost first."""
    response_dict_keys: list[str] | None = flag(None, run_identity=True)
    """Keys that lead to the response in a nested response column, outermost first."""
    with_thinking: bool = flag(False, run_identity=True)
    """End the prompt with <think>, so that the response starts inside the thinking block and closes it."""
    max_length: int = flag(2048, run_identity=True, must_be="1 or more")
    """Maximum tokens per row, prompt and response together."""
    truncation: Literal["error", "left", "right", "drop"] = flag("error", run_identity=True)
    """Rows over max_length: error stops, left cuts the prompt's start, right cuts the end, drop skips the row."""

    def columns(self) -> tuple[list[str], list[str]]:
        """The columns that are read, and the flag that names each."""
        names = ["prompt_key", "response_key"] if self.messages_key is None else ["messages_key"]
        columns = [getattr(self, name) for name in names]
        if self.format == "alpaca":
            columns = ["instruction", "input", "output"]
            names = [f"format alpaca: {column}" for column in columns]
        extra = [name for name in ("tools_key", "weight_key") if getattr(self, name) is not None]
        return columns + [getattr(self, name) for name in extra], names + extra

    def row_problems(self) -> Iterator[str]:
        """What is wrong with these flags."""
        if self.messages_key is not None and self.with_thinking:
            yield "with_thinking needs prompt and response columns; it cannot be combined with messages_key"
        if self.format in ("prompt_response", "alpaca") and (self.messages_key is not None or self.learn != "all"):
            yield f"messages_key and learn are for conversations, got format {self.format}; drop one of them"
