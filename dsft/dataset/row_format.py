"""What the columns of a row mean: prompt and response, messages, ShareGPT, or Alpaca."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from dsft.config.flags import RowFlags
from dsft.config.sources import Source, read_sources
from dsft.dataset.readers import Cell, find_files, first_row, walk
from dsft.errors import UserError

Flags = TypeVar("Flags", bound=RowFlags)
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "function_call": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""Of ShareGPT's `from`."""


@dataclass(frozen=True)
class SourceFiles(Generic[Flags]):
    """The files of a source, and the flags with the format of their rows."""

    source: Source
    files: list[Path]
    flags: Flags


def find_sources(names: Sequence[str], flag: str, flags: Flags) -> list[SourceFiles[Flags]]:
    """The sources that a flag names, each with the format that its own first row shows.

    Raises:
        UserError: a name that matches no file, or flags that do not go with a format.
    """
    found = []
    for source in read_sources(names, flag):
        files = find_files(source.paths, flag)
        found.append(SourceFiles(source, files, resolve_format(files, flags)))
    return found


def resolve_format(files: Sequence[Path], flags: Flags) -> Flags:
    """The flags with --format auto, and the column of conversations, replaced by what the first row shows.

    Raises:
        UserError: the other flags do not go with that format.
    """
    resolved = _recognize(first_row(files), flags) if flags.format == "auto" else flags
    if resolved.format in ("messages", "sharegpt") and resolved.messages_key is None:
        resolved = replace(resolved, messages_key="messages" if resolved.format == "messages" else "conversations")
    if problems := list(resolved.row_problems()):
        raise UserError("\n".join(problems))
    return resolved


def _recognize(row: dict[str, Any], flags: Flags) -> Flags:
    """The format of a row, given its values by column."""
    key = flags.messages_key
    if key is None and not {flags.prompt_key, flags.response_key} & set(row):
        if {"instruction", "output"} <= set(row):
            return replace(flags, format="alpaca")
        key = next((name for name in ("messages", "conversations") if name in row), None)
    if key is None:
        return replace(flags, format="prompt_response")
    turns = row.get(key)
    is_sharegpt = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
    return replace(flags, format="sharegpt" if is_sharegpt else "messages", messages_key=key)


def formats_text(sources: Sequence[SourceFiles[Any]]) -> str:
    """The formats of all sources, in words; empty where each is prompt and response."""
    texts = [(part.source.name, _format_text(part.flags)) for part in sources]
    return "; ".join(f"{name}: {text}" if name else text for name, text in texts if text)


def _format_text(flags: RowFlags) -> str:
    if flags.format == "alpaca":
        return "Alpaca rows: instruction and input are the prompt, output is the response"
    if flags.messages_key is None:
        return ""
    kind = "ShareGPT conversations" if flags.format == "sharegpt" else "conversations"
    return f"{kind} in column {flags.messages_key}"


def read_values(cells: Sequence[Any], cell: Cell, flags: RowFlags) -> tuple[Any, Any]:
    """Prompt and response of a row, or messages and None, given the values of its columns and a resolved format.

    Raises:
        UserError: a nested key does not exist.
    """
    if flags.format == "alpaca":
        instruction, given, output = cells[:3]
        return (f"{instruction}\n{given}" if given else instruction), output
    if flags.messages_key is not None:
        messages = walk(cells[0], flags.prompt_dict_keys, cell, flags.messages_key)
        return (_from_sharegpt(messages) if flags.format == "sharegpt" else messages), None
    prompt = walk(cells[0], flags.prompt_dict_keys, cell, flags.prompt_key)
    return prompt, walk(cells[1], flags.response_dict_keys, cell, flags.response_key)


def _from_sharegpt(turns: Any) -> Any:
    """Turns of {from, value} as messages; the text of a function_call is that of its call."""
    if not isinstance(turns, list):
        return turns
    messages: list[Any] = []
    for turn in turns:
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)
            continue
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        message = {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}
        if turn["from"] == "function_call":
            text = str(turn.get("value"))
            message |= {"content": None, "tool_calls": text if text.lstrip().startswith("[") else f"[{text}]"}
        messages.append(message)
    return messages
