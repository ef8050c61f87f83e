"""Faults of rows, each reported once with its count and an example.

A check of the text sees the rows one by one as they are in the parquet files, so a set of any size is never held.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from dsft.config.flags import RowFlags
from dsft.dataset.chat_format import THINK
from dsft.dataset.readers import Cell
from dsft.dataset.row_format import read_values
from dsft.dataset.token_files import Counts
from dsft.dataset.tokens import TokenDataset, truncate_row
from dsft.errors import UserError

END_THINK = "</think>"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
HIDDEN = re.compile(r"\A((?!<think>).)*?</think>|<think>.*?(</think>|\Z)|</?answer>", re.DOTALL)
PROMPT_NAMES = {"prompt", "question", "instruction", "input", "query", "user"}
RESPONSE_NAMES = {"response", "answer", "output", "completion", "assistant", "reply", "chosen"}
MIN_PREFIX = 20  # characters that a text must have before another that starts with it means anything


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    kind: ok, warning (training would start), or refused (it would not)
    name: what was checked
    text: what was found, in one line
    """

    kind: Literal["ok", "warning", "refused"]
    name: str
    text: str


@dataclass(frozen=True)
class Row:
    """One row as it is in the file.

    prompt, response: its values, with nested keys followed; the prompt of a conversation is all of it
    is_conversation: every assistant turn is a target, instead of a response
    """

    cell: Cell
    prompt: Any
    response: Any = None
    is_conversation: bool = False

    @classmethod
    def read(cls, values: tuple, cell: Cell, flags: RowFlags) -> "Row":
        """From the values of the columns.

        Raises:
            UserError: a nested key does not exist.
        """
        prompt, response = read_values(values, cell, flags)
        return cls(cell, prompt, response, is_conversation=flags.messages_key is not None)

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        """The messages that have a role."""
        messages = self.prompt if isinstance(self.prompt, list) else []
        return [m for m in messages if isinstance(m, dict) and isinstance(m.get("role"), str)]

    @cached_property
    def turns(self) -> list[tuple[str, str]]:
        """(role, content) of the messages that have text; those that only call tools have none."""
        pairs = ((message["role"], _text(message)) for message in self.messages)
        return [(role, text) for role, text in pairs if text is not None]

    @cached_property
    def assistant_turns(self) -> list[str]:
        """The contents of the assistant's messages."""
        return [content for role, content in self.turns if role == "assistant"]

    @cached_property
    def message(self) -> Any:
        """The response; of a list of one, that one."""
        is_single = isinstance(self.response, list) and len(self.response) == 1
        return self.response[0] if is_single else self.response

    @cached_property
    def answers(self) -> list[str]:
        """The texts that are learned; none for a response that is not text."""
        if self.is_conversation:
            return self.assistant_turns
        text = _text(self.message) if isinstance(self.message, dict) else self.message
        return [text] if isinstance(text, str) else []


def _text(message: dict[str, Any]) -> str | None:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    if content is None or (not content and message.get("tool_calls")):
        return None
    return content if isinstance(content, str) else None


def answer_text(answer: str) -> str:
    """An answer without its thinking, its tags and surrounding whitespace."""
    return HIDDEN.sub("", answer).strip()


def thinks(text: str) -> bool:
    """Whether a text has thinking."""
    return THINK in text or END_THINK in text


def rows_of(count: int, total: int) -> str:
    """3 of 100 rows."""
    return f"all {total:,} rows" if count == total > 1 else f"{count:,} of {total:,} rows"


def excerpt(text: str, limit: int = 60) -> str:
    """A text in quotes, without its middle where it is longer than the limit."""
    half = limit // 2
    return repr(text if len(text) <= limit else f"{text[:half].rstrip()} … {text[-half:].lstrip()}")


class RowCheck:
    """Counts the rows that have one fault."""

    def __init__(self, name: str, has: Callable[[Row], bool], message: str = "", *, refused: bool = False) -> None:
        """`message` gets {rows}, {example} and `details`; `refused` is whether training refuses such rows."""
        self.name, self.has, self.message, self.explains_refusal = name, has, message, refused
        self.count = 0
        self.example: Cell | None = None
        self.is_refused = False

    def see(self, row: Row) -> bool:
        """Look at the next row; whether it has the fault."""
        found = self.has(row)
        if found:
            self.count += 1
            self.example = self.example or row.cell
        return found

    def details(self) -> dict[str, str]:
        """Further values for the message."""
        return {}

    def finding(self, total: int) -> Finding | None:
        """The result over all rows; None where none has the fault."""
        if not self.count:
            return None
        text = self.message
        values = {"rows": rows_of(self.count, total), "example": str(self.example), **self.details()}
        for name, value in values.items():  # str.format would trip over the braces of a column's name
            text = text.replace(f"{{{name}}}", value)
        return Finding("refused" if self.is_refused else "warning", self.name, text)


class SwappedColumns(RowCheck):
    """Prompts where responses are expected, and the reverse.

    The signs are the columns' names, the types and roles of their values, the template's user turns, thinking, and
    texts that grow from row to row as the prompts of a dialogue do. Two columns of single turns show none of them.
    """

    def __init__(self, flags: RowFlags, user_header: str) -> None:
        """`user_header` is what the template puts before a user turn."""
        message = "{rows} have what looks like a prompt in the response column, e.g. {example}; try "
        message += f"--prompt_key {flags.response_key} --response_key {flags.prompt_key}"
        super().__init__("swapped columns", self._is_swapped, message, refused=True)
        keys = ((flags.prompt_key, RESPONSE_NAMES, PROMPT_NAMES), (flags.response_key, PROMPT_NAMES, RESPONSE_NAMES))
        words = [({*re.split(r"[^a-z]+", key.lower())}, likely, unlikely) for key, likely, unlikely in keys]
        self._by_name = all(found & likely and not found & unlikely for found, likely, unlikely in words)
        self._header = user_header.strip()
        self._previous: tuple[Any, Any] = ("", "")

    def _is_swapped(self, row: Row) -> bool:
        if row.is_conversation:
            return False
        prompt, response = row.prompt, row.response
        previous, self._previous = self._previous, (prompt, response)
        if self._by_name:
            return True
        if isinstance(response, list | dict):
            last = response[-1] if isinstance(response, list) and response else response
            is_asked = isinstance(last, dict) and last.get("role") in ("user", "system")
            return is_asked or (isinstance(response, list) and len(response) > 1)
        if not isinstance(prompt, str) or not isinstance(response, str):
            return False
        return (
            (bool(self._header) and self._header in response and self._header not in prompt)
            or (END_THINK in prompt and END_THINK not in response)
            or (_continues(previous[1], response) and not _continues(previous[0], prompt))
        )


def _continues(before: Any, after: str) -> bool:
    return isinstance(before, str) and MIN_PREFIX <= len(before) < len(after) and after.startswith(before)


class RoleNames(RowCheck):
    """Messages with roles that neither the conventions nor the template know."""

    def __init__(self, template: str) -> None:
        message = "{rows} use the roles {unknown}{known}, e.g. {example}; use system, user and assistant throughout"
        super().__init__("role names", self._has_unknown, message, refused=True)
        self._template = template
        self._roles: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}  # by whether they are known

    def _has_unknown(self, row: Row) -> bool:
        message = row.message if isinstance(row.message, dict) else {}
        named = (*(role for role, _ in row.turns), message.get("role"))
        roles = dict.fromkeys(role for role in named if isinstance(role, str))
        for role in roles:
            self._roles[self._is_known(role)][role] += 1
        return not all(map(self._is_known, roles))

    def _is_known(self, role: str) -> bool:
        return role in ROLES or f"'{role}'" in self._template or f'"{role}"' in self._template

    def details(self) -> dict[str, str]:
        known, unknown = (
            ", ".join(f"'{name}'" for name, _ in roles.most_common(4)) + (", …" if len(roles) > 4 else "")
            for roles in self._roles.values()
        )
        return {"unknown": unknown, "known": f" besides {known}" if known else ""}


class ThinkingInAnswers(RowCheck):
    """Answers without thinking where the prompt, its history, or most other rows have it."""

    def __init__(self) -> None:
        message = "{rows} have an answer without <think>, although {reason}, e.g. {example}; was it stripped?"
        super().__init__("thinking in answers", self._lacks_thinking, message)
        self._thinking = self._without = 0
        self._first: Cell | None = None

    def _lacks_thinking(self, row: Row) -> bool:
        if row.is_conversation or not any(map(answer_text, row.answers)):
            return False
        if thinks(row.answers[0]):
            self._thinking += 1
            return False
        self._without += 1
        self._first = self._first or row.cell
        asked = (
            [row.prompt] if isinstance(row.prompt, str) else [text for role, text in row.turns if role != "assistant"]
        )
        return any(THINK in text for text in asked) or any(map(thinks, row.assistant_turns))

    def details(self) -> dict[str, str]:
        others = f"{self._thinking:,} others have it"
        return {"reason": others if self._thinking > self.count else "their prompts have it"}

    def finding(self, total: int) -> Finding | None:
        if self._thinking > self._without:
            self.count, self.example = self._without, self.example or self._first
        return super().finding(total)


def _is_empty(row: Row) -> bool:
    if not row.answers:
        return row.response is None and not row.is_conversation  # another value that is not text is another fault
    return not all(map(answer_text, row.answers))


def _calls(message: dict[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _has_result_without_call(row: Row) -> bool:
    open_calls: set[Any] = set()
    for message in row.messages:
        if message["role"] == "tool":
            if not open_calls or message.get("tool_call_id", None) not in {None, *open_calls}:
                return True
        elif message["role"] == "assistant":
            open_calls = {call.get("id", "") for call in _calls(message) if isinstance(call, dict)}
        else:
            open_calls = set()
    return False


def _has_invalid_arguments(row: Row) -> bool:
    answered = [row.message] if isinstance(row.message, dict) else []
    for call in (call for message in (*row.messages, *answered) for call in _calls(message)):
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str) and arguments:
            try:
                json.loads(arguments)
            except json.JSONDecodeError:
                return True
    return False


def _answers_no_question(row: Row) -> bool:
    roles = [message["role"] for message in row.messages if message["role"] not in ("system", "developer")]
    return roles[:1] == ["assistant"] or ("assistant", "assistant") in pairwise(roles)


def _lost_history(row: Row) -> bool:
    history = [thinks(content) for content in row.assistant_turns if content.strip()]
    return bool(history) and not all(history) and any(map(thinks, row.answers))


class Scan:
    """One pass over all rows of a set."""

    def __init__(self, flags: RowFlags, template: str, user_header: str, end_of_turn: str) -> None:
        """`template` is the chat template's source, `user_header` what it puts before a user turn."""
        unclosed = RowCheck(
            "unclosed thinking",
            lambda row: any(END_THINK not in answer for answer in row.answers),
            "{rows} never close the <think> of --with_thinking, e.g. {example}; drop the flag, or fix them",
        )
        self._checks = [
            RowCheck(
                "empty answers",
                _is_empty,
                "{rows} have an answer without text, e.g. {example}; drop or fix them",
                refused=True,
            ),
            SwappedColumns(flags, user_header),
            RoleNames(template),
            RowCheck(
                "last turn",
                lambda row: not row.is_conversation and bool(row.turns) and row.turns[-1][0] == "assistant",
                "{rows} have a prompt that ends with an assistant turn, e.g. {example}; end it with a user turn",
            ),
            RowCheck(
                "thinking in histories",
                _lost_history,
                "{rows} have thinking in the answer but not in every earlier assistant turn, e.g. {example}; "
                "keep it in all of them, or remove it everywhere",
            ),
            RowCheck(
                "tool results",
                _has_result_without_call,
                "{rows} have a tool result that no call before it asks for, e.g. {example}; keep both, or drop both",
            ),
            RowCheck(
                "tool arguments",
                _has_invalid_arguments,
                "{rows} have a tool call whose arguments are not valid JSON, e.g. {example}; correct them",
                refused=True,
            ),
            RowCheck(
                "questions",
                _answers_no_question,
                "{rows} have an answer to no question, e.g. {example}; give it weight 0, or join it to the one before",
                refused=True,
            ),
            unclosed if flags.with_thinking else ThinkingInAnswers(),
            RowCheck(
                "end-of-turn in answers",
                lambda row: any(end_of_turn in answer for answer in row.answers),
                "{rows} have "
                + end_of_turn
                + " in the answer, e.g. {example}; remove it, it is appended automatically",
            ),
        ]
        # No faults by themselves; what they mean depends on the template.
        self.history_thinks = RowCheck(
            "",
            lambda row: (
                any(map(thinks, row.assistant_turns[: -1 if row.is_conversation else None]))
                or any(message.get("reasoning_content") for message in row.messages[:-1])
            ),
        )
        self.no_system_turn = RowCheck("", lambda row: bool(row.turns) and row.turns[0][0] != "system")
        self.rows = self._refused = 0
        self._first_refusal = ""

    def see(self, values: tuple, cell: Cell, flags: RowFlags, make: Callable[[], object] | None = None) -> None:
        """Look at the next row, and at what `make` says if training is known to refuse some row."""
        self.rows += 1
        found: list[RowCheck] = []
        try:
            row = Row.read(values, cell, flags)
        except UserError:
            pass  # `make` raises the same
        else:
            self.history_thinks.see(row)
            self.no_system_turn.see(row)
            found = [check for check in self._checks if check.see(row)]
        try:
            if make is not None:
                make()
        except UserError as error:
            cause = next((check for check in found if check.explains_refusal), None)
            if cause is not None:
                cause.is_refused = True
            else:
                self._refused += 1
                self._first_refusal = self._first_refusal or str(error)

    def findings(self) -> Iterator[Finding]:
        """One for each fault."""
        if self._refused:
            more = f" ({rows_of(self._refused, self.rows)})" if self._refused > 1 else ""
            yield Finding("refused", "rows", self._first_refusal + more)
        yield from filter(None, (check.finding(self.rows) for check in self._checks))


# Of the tokenized rows


def duplicates_finding(whole: TokenDataset) -> Finding | None:
    """Rows with the tokens and targets of an earlier row."""
    _, first, index = np.unique(whole.row_hash, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[index] < np.arange(len(whole)))
    if not len(repeated):
        return None
    row = int(repeated[0])
    text = (
        f"{rows_of(len(repeated), len(whole))} repeat an earlier row exactly, e.g. {whole.place(row)} that of "
        f"{whole.place(int(first[index[row]]))}; drop them, unless they are meant to count more"
    )
    return Finding("warning", "duplicates", text)


def ignored_finding(whole: TokenDataset) -> Finding | None:
    """Keys of messages that change nothing of what is trained on."""
    text = whole.counts.ignored_text()
    return Finding("warning", "ignored keys", text) if text else None


def truncation_finding(whole: TokenDataset, flags: RowFlags) -> Finding | None:
    """What max_length costs, other than the start of prompts."""
    how, total = flags.truncation, len(whole)
    too_long = np.flatnonzero(whole.lengths > flags.max_length).tolist()
    limit = f"--max_length {flags.max_length} (the longest row has {int(whole.lengths.max()):,} tokens)"
    kept = (
        {} if how == "error" else {row: truncate_row(*whole[row], Cell("", row), flags, Counts()) for row in too_long}
    )
    dropped = [row for row, rest in kept.items() if rest is None]
    if how == "error":
        affected, problem = too_long, f"have more tokens than {limit}"
        remedy = "raise it, or choose --truncation left, right or drop"
    elif how == "right":
        affected = [row for row, rest in kept.items() if rest is None or rest[1].sum() < whole[row][1].sum()]
        problem = f"lose the end of the answer, {len(dropped):,} of them all of it (these are dropped)"
        remedy = f"raise {limit}, or choose --truncation left"
    else:
        affected, problem, remedy = dropped, f"are dropped by --truncation {how}", f"raise {limit}"
    if not affected:
        return None
    text = f"{rows_of(len(affected), total)} {problem}, e.g. {whole.place(affected[0])}; {remedy}"
    return Finding("refused" if how == "error" or len(dropped) == total else "warning", "truncation", text)
