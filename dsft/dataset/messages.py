"""Messages of a row: checked, with all their keys, and in the form that a chat template wants."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from dsft.dataset.readers import Cell
from dsft.errors import UserError
from dsft.text import one_line

Message = dict[str, Any]
Tools = list[dict[str, Any]]


@dataclass(frozen=True)
class MessageForm:
    """What a chat template wants.

    as_parts: contents as lists of parts; some templates of vision models print nothing of a string
    null_content: the content of a message with tool calls absent where it is null, not ""
    json_arguments: the arguments of tool calls as JSON text, not as objects
    """

    as_parts: bool = False
    null_content: bool = True
    json_arguments: bool = False


def read_messages(value: Any, what: Literal["prompt", "conversation", "response"], cell: Cell) -> list[Message]:
    """Messages with all their keys that are not null, contents as text, and the arguments of tool calls as objects.

    Raises:
        UserError: a value of another kind.
    """
    if isinstance(value, str) and what == "conversation" and value.lstrip().startswith("["):
        try:
            value = _parse_json(value, ": the messages")
        except _Fault as fault:
            raise UserError(f"{cell}{fault}") from fault
    if not isinstance(value, list) or not value:
        kinds = "a string or a list of messages" if what == "prompt" else "a list of messages"
        raise UserError(f"{cell}: the {what} must be {kinds}, got {kind_of(value)}")
    messages = []
    for index, message in enumerate(value):
        try:
            messages.append(_read_message(message))
        except _Fault as fault:
            raise UserError(f"{cell}: message {index} of the {what}{fault}") from fault
    return messages


class _Fault(Exception):
    """What is wrong with a message, to be written behind its place."""


def _read_message(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _Fault(f" must have a role and a content, got {kind_of(message)}")
    kept = {key: one for key, one in message.items() if one is not None}
    content = message.get("content")
    kept["content"] = content if isinstance(content, str) else _text_of(content)
    calls = kept.get("tool_calls")
    if calls:
        kept["tool_calls"] = _tool_calls(calls)
    else:
        kept.pop("tool_calls", None)
        if "content" not in message:
            raise _Fault(" has no content and no tool_calls; add one, if only an empty text")
    return kept


def _text_of(content: Any) -> str:
    parts = content if isinstance(content, list) else [content or ""]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise _Fault(f" must have text as its content, or a list of text parts, got {kind_of(content)}")
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    calls = _parse_json(value, ": tool_calls") if isinstance(value, str) else value
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _Fault(f" must have a list of objects as its tool_calls, got {kind_of(calls)}")
    parsed = []
    for call in calls:
        nested = isinstance(call.get("function"), dict)
        function = dict(call["function"] if nested else call)
        if isinstance(function.get("arguments"), str):
            name = f": the arguments of {function.get('name')}"
            function["arguments"] = _parse_json(function["arguments"] or "{}", name)
        parsed.append({**call, "function": function} if nested else function)
    return parsed


def read_tools(value: Any, cell: Cell) -> Tools | None:
    """The schemas of --tools_key.

    Raises:
        UserError: they are of another kind.
    """
    if not value:
        return None
    try:
        tools = _parse_json(value, ": tools") if isinstance(value, str) else value
    except _Fault as fault:
        raise UserError(f"{cell}{fault}") from fault
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{cell}: the tools must be a list of schemas, or JSON text of one, got {kind_of(tools)}")
    return tools or None


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _Fault(f"{what} are not valid JSON: {one_line(error)}; correct them, or drop the row") from error


def in_form(messages: Sequence[Message], form: MessageForm) -> list[Message]:
    """Messages as a template wants them."""
    if not form.as_parts and not any("tool_calls" in message for message in messages):
        return list(messages)
    changed = []
    for message in messages:
        message = dict(message)
        calls = message.get("tool_calls")
        if calls and not message["content"] and form.null_content:
            message["content"] = None
        elif form.as_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if calls and form.json_arguments:
            message["tool_calls"] = [_json_arguments(call) for call in calls]
        changed.append(message)
    return changed


def _json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    nested = isinstance(call.get("function"), dict)
    function = dict(call["function"] if nested else call)
    if "arguments" in function:
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function} if nested else function


def read_weight(value: Any, where: str) -> float:
    """The weight of a row or a message.

    Raises:
        UserError: it is not a number, or below 0.
    """
    with suppress(ValueError, TypeError):
        number = float(value)  # CSV has texts only
        if not isinstance(value, bool) and 0 <= number < math.inf:
            return number
    raise UserError(f"{where} has the weight {value!r}; weights must be numbers, 0 or more")


def pop_weight(turn: Message, index: int, cell: Cell) -> float:
    """The message's own weight. It means nothing to the template."""
    return read_weight(turn.pop("weight"), f"{cell}: turn {index}") if "weight" in turn else 1.0


def pop_flag(turn: Message, index: int, cell: Cell) -> bool:
    """Whether the message has train: true. That means nothing to the template either."""
    flag = turn.pop("train", False)
    if not isinstance(flag, bool):
        raise UserError(f"{cell}: turn {index} has train {flag!r}; write true or false")
    return flag


def kind_of(value: Any) -> str:
    """A value's type and size, for messages."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}"[:60]
