"""Faults that the rows' text shows before anything is tokenised: each is named once, with its count and an example.

Every fault has a detector that sees the rows one by one as they stand in the parquet files, so that a set of any size
is read once and never held.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from dsft.dataset.chat_format import THINK
from dsft.dataset.readers import Cell, walk
from dsft.dataset.tokens import DataFormat
from dsft.errors import UserError

Kind = Literal["ok", "warning", "refused"]
END_THINK = "</think>"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
HIDDEN = re.compile(r"\A((?!<think>).)*?</think>|<think>.*?(</think>|\Z)|</?answer>", re.DOTALL)
PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query", "user")
RESPONSE_NAMES = ("response", "answer", "output", "completion", "assistant", "reply", "chosen")
GROWS = 20  # characters that the shorter of two texts must have before their common beginning says anything
FEWEST_LETTERS = 8  # of a text before its script says anything
SCRIPTS = {
    "Latin": r"[A-Za-zÀ-ɏ]",
    "Cyrillic": r"[Ѐ-ӿ]",
    "Arabic": r"[؀-ۿ]",
    "Devanagari": r"[ऀ-ॿ]",
    "Thai": r"[฀-๿]",
    "Hangul": r"[가-힯]",
    "Japanese": r"[぀-ヿ]",
    "Chinese": r"[一-鿿]",
}
LETTERS = {name: re.compile(pattern) for name, pattern in SCRIPTS.items()}
WEIGHT = {"Chinese": 3, "Japanese": 3, "Hangul": 2}  # one of their letters says as much as so many Latin ones


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    kind: ok, warning (training would go on), or refused (training would not start)
    name: what was looked at
    text: what was found, in one line
    """

    kind: Kind
    name: str
    text: str


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file.

    prompt, response: its values, nested keys followed; of a conversation, prompt is all of it
    is_conversation: every assistant turn is learned, not a response
    """

    cell: Cell
    prompt: Any
    response: Any = None
    is_conversation: bool = False

    @cached_property
    def turns(self) -> list[tuple[str, str]]:
        """(role, content) of the prompt's or conversation's messages that have both."""
        messages = self.prompt if isinstance(self.prompt, list) else []
        return [
            (m["role"], m["content"])
            for m in messages
            if isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        ]

    @cached_property
    def answers(self) -> list[str | None]:
        """What is learned; None for a response that is no text."""
        if self.is_conversation:
            return [content for role, content in self.turns if role == "assistant"]
        value = self.response
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("content")
        return [value if isinstance(value, str) else None]

    @cached_property
    def asked(self) -> str:
        """What stands before the first answer and is no earlier answer."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(content for role, content in self.turns if role != "assistant")


def read_row(cells: tuple, cell: Cell, data_format: DataFormat) -> Row:
    """A row of the columns read.

    Raises:
        UserError: a nested key that is not there.
    """
    prompt_keys, response_keys = data_format.prompt_dict_keys, data_format.response_dict_keys
    if data_format.messages_key is not None:
        return Row(cell, walk(cells[0], prompt_keys, cell, data_format.messages_key), is_conversation=True)
    return Row(
        cell,
        walk(cells[0], prompt_keys, cell, data_format.prompt_key),
        walk(cells[1], response_keys, cell, data_format.response_key),
    )


def visible(answer: str) -> str:
    """What an answer says without its thinking, tags and outer blanks."""
    return HIDDEN.sub("", answer).strip()


class Detector:
    """Counts the rows that have one fault."""

    name: str
    explains = False
    """Whether a row that has it and is refused by the Trainer is refused for it."""

    def __init__(self) -> None:
        self.count = self.seen = 0
        self.example: Cell | None = None
        self.refuses = False

    def see(self, row: Row) -> bool:
        """Look at the next row; whether it has the fault."""
        self.seen += 1
        found = self.has(row)
        if found:
            self.count += 1
            self.example = self.example or row.cell
        return found

    def has(self, row: Row) -> bool:
        """Whether a row has it."""
        raise NotImplementedError

    def finding(self) -> Finding | None:
        """What is told at the end; nothing where no row has the fault."""
        if not self.count:
            return None
        return Finding("refused" if self.refuses else "warning", self.name, self.text())

    def text(self) -> str:
        """What is wrong, and how to mend it."""
        raise NotImplementedError

    @property
    def rows(self) -> str:
        """How many rows have it."""
        return rows_of(self.count, self.seen)


def rows_of(count: int, total: int) -> str:
    """3 of 100 rows."""
    return f"all {total:,} rows" if count == total > 1 else f"{count:,} of {total:,} rows"


class EmptyAnswers(Detector):
    """Responses of which nothing is left without blanks, thinking and tags."""

    name, explains = "empty answers", True

    def has(self, row: Row) -> bool:
        if row.answers == [None]:
            return row.response is None  # what is no text at all is another fault
        return any(answer is not None and not visible(answer) for answer in row.answers)

    def text(self) -> str:
        return f"{self.rows} have an answer without text, e.g. {self.example}; leave them out, or mend them"


class Duplicates(Detector):
    """Rows whose prompt and response have been there before."""

    name = "duplicates"

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[bytes, Cell] = {}
        self._like: Cell | None = None

    def has(self, row: Row) -> bool:
        text = json.dumps([row.prompt, row.response], sort_keys=True, default=str)
        first = self._first.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), row.cell)
        if first is row.cell:
            return False
        self._like = self._like or first
        return True

    def text(self) -> str:
        return (
            f"{self.rows} repeat an earlier one exactly, e.g. {self.example} that of {self._like}; "
            "leave them out, unless they are meant to count more"
        )


class SwappedColumns(Detector):
    """Prompts where responses are expected, and the other way round.

    Told by the columns' names, the kinds and roles of the values, the template's user turns, thinking, and by texts
    that grow from row to row as the prompts of a dialogue do. Two columns of plain questions and answers show no sign.
    """

    name, explains = "swapped columns", True

    def __init__(self, data_format: DataFormat, user_header: str) -> None:
        """`user_header` is what the template puts before a user's words."""
        super().__init__()
        self._flags = data_format
        self._by_name = _is_named(data_format.prompt_key, RESPONSE_NAMES, PROMPT_NAMES) and _is_named(
            data_format.response_key, PROMPT_NAMES, RESPONSE_NAMES
        )
        self._header = user_header.strip()
        self._before: tuple[Any, Any] = ("", "")

    def has(self, row: Row) -> bool:
        if row.is_conversation:
            return False
        prompt, response = row.prompt, row.response
        before, self._before = self._before, (prompt, response)
        if self._by_name:
            return True
        if isinstance(response, list):
            last = response[-1] if response else None
            return len(response) > 1 or (isinstance(last, dict) and last.get("role") in ("user", "system"))
        if isinstance(response, dict):
            return response.get("role") in ("user", "system")
        if not isinstance(prompt, str) or not isinstance(response, str):
            return False
        return (
            (bool(self._header) and self._header in response and self._header not in prompt)
            or (END_THINK in prompt and END_THINK not in response)
            or (_grows(before[1], response) and not _grows(before[0], prompt))
        )

    def text(self) -> str:
        keys = f"--prompt_key {self._flags.response_key} --response_key {self._flags.prompt_key}"
        return f"{self.rows} have what looks like a prompt as their response, e.g. {self.example}; try {keys}"


def _is_named(column: str, likely: Sequence[str], unlikely: Sequence[str]) -> bool:
    words = re.split(r"[^a-z]+", column.lower())
    return any(word in likely for word in words) and not any(word in unlikely for word in words)


def _grows(before: Any, after: Any) -> bool:
    return (
        isinstance(before, str)
        and isinstance(after, str)
        and GROWS <= len(before) < len(after)
        and after.startswith(before)
    )


class Roles(Detector):
    """Messages with role names that neither the field nor the template knows."""

    name, explains = "role names", True

    def __init__(self, template: str) -> None:
        super().__init__()
        self._template = template
        self._known: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()

    def has(self, row: Row) -> bool:
        roles = [role for role, _ in row.turns]
        response = row.response[0] if isinstance(row.response, list) and len(row.response) == 1 else row.response
        if isinstance(response, dict) and isinstance(response.get("role"), str):
            roles.append(response["role"])
        for role in dict.fromkeys(roles):
            (self._known if self._knows(role) else self._unknown)[role] += 1
        return not all(map(self._knows, roles))

    def _knows(self, role: str) -> bool:
        return role in ROLES or f"'{role}'" in self._template or f'"{role}"' in self._template

    def text(self) -> str:
        def names(counter: Counter[str]) -> str:
            return ", ".join(f"'{name}'" for name, _ in counter.most_common(4)) + (", …" if len(counter) > 4 else "")

        beside = f" beside {names(self._known)}" if self._known else ""
        return (
            f"{self.rows} name roles {names(self._unknown)}{beside}, e.g. {self.example}; "
            "write system, user and assistant throughout"
        )


class LastTurn(Detector):
    """Prompts that end with the assistant's own turn, so that its answer follows itself."""

    name = "last turn"

    def has(self, row: Row) -> bool:
        return not row.is_conversation and bool(row.turns) and row.turns[-1][0] == "assistant"

    def text(self) -> str:
        return f"{self.rows} have a prompt that ends with the assistant's turn, e.g. {self.example}; end it with user"


class StrippedHistory(Detector):
    """Answers that think after a history in which thinking was taken out, so that training is unlike generation."""

    name = "thinking in histories"

    def has(self, row: Row) -> bool:
        history = [content for role, content in row.turns if role == "assistant" and content.strip()]
        if row.is_conversation:
            return any(map(_thinks, history)) and not all(map(_thinks, history))
        return bool(history) and any(map(_thinks, row.answers)) and not all(map(_thinks, history))

    def text(self) -> str:
        return (
            f"{self.rows} have thinking in the answer that is learned, but not in all of the assistant's turns before "
            f"it, e.g. {self.example}; keep it there too, or leave it out everywhere"
        )


class StrippedAnswers(Detector):
    """Answers without thinking where the prompt, its history, or most other rows have it."""

    name = "thinking in answers"

    def __init__(self) -> None:
        super().__init__()
        self._without: Counter[bool] = Counter()  # by whether the row itself tells that it should think
        self._thinking = 0
        self._examples: dict[bool, Cell] = {}

    def has(self, row: Row) -> bool:
        [answer, *_] = row.answers or [None]
        if row.is_conversation or answer is None or not visible(answer):
            return False
        if _thinks(answer):
            self._thinking += 1
            return False
        told = THINK in row.asked or any(role == "assistant" and _thinks(content) for role, content in row.turns)
        self._without[told] += 1
        self._examples.setdefault(told, row.cell)
        return told

    def finding(self) -> Finding | None:
        if self._thinking > self._without.total():
            self.count = self._without.total()
            self.example = self._examples.get(True) or self._examples.get(False)
        return super().finding()

    def text(self) -> str:
        why = f"{self._thinking:,} others have it" if self._thinking > self.count else "it stands in their prompts"
        return f"{self.rows} have an answer without <think>, though {why}, e.g. {self.example}; was it stripped?"


class UnclosedThinking(Detector):
    """Under --with_thinking the prompt ends with <think>, which these answers never close."""

    name = "unclosed thinking"

    def has(self, row: Row) -> bool:
        return any(answer is not None and END_THINK not in answer for answer in row.answers)

    def text(self) -> str:
        return (
            f"{self.rows} never close the <think> of --with_thinking, e.g. {self.example}; drop the flag, or mend them"
        )


def _thinks(text: str | None) -> bool:
    return text is not None and (THINK in text or END_THINK in text)


class Marks(Detector):
    """Answers that bring an end-of-turn of their own, which would stand twice."""

    name = "end-of-turn in answers"

    def __init__(self, end_of_turn: str) -> None:
        super().__init__()
        self._end = end_of_turn

    def has(self, row: Row) -> bool:
        return any(self._end in answer for answer in row.answers if answer is not None)

    def text(self) -> str:
        return (
            f"{self.rows} have {self._end} in their answer, e.g. {self.example}; it is added by itself, so take it out"
        )


class Languages(Detector):
    """Answers in another script than the last question, in a set whose rows mostly have one script for both."""

    name = "languages"

    def __init__(self) -> None:
        super().__init__()
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], Cell] = {}

    def has(self, row: Row) -> bool:
        asked = [content for role, content in row.turns if role == "user"] or [row.asked]
        pair = script(asked[-1]), script(visible(row.answers[-1] or "") if row.answers else "")
        if pair[0] is None or pair[1] is None:
            return False
        self._pairs[pair[0], pair[1]] += 1
        self._examples.setdefault((pair[0], pair[1]), row.cell)
        return pair[0] != pair[1]

    def finding(self) -> Finding | None:
        usual = [pair for pair, _ in self._pairs.most_common(1)]
        if not usual or usual[0][0] != usual[0][1]:
            return None  # a set of translations
        return super().finding()

    def text(self) -> str:
        different = Counter({pair: n for pair, n in self._pairs.items() if pair[0] != pair[1]})
        [(asked, answered), _], *_ = different.most_common()
        return (
            f"{self.rows} are answered in another script than they ask in, most often {asked} by {answered}, "
            f"e.g. {self._examples[asked, answered]}; most rows keep to one"
        )


def script(text: str) -> str | None:
    """The script that most of a text is written in; None where it has too few letters to tell."""
    counts = {name: len(letters.findall(text)) * WEIGHT.get(name, 1) for name, letters in LETTERS.items()}
    if counts["Japanese"]:  # which is written in Chinese letters too
        counts["Japanese"] += counts.pop("Chinese")
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] >= FEWEST_LETTERS else None


@dataclass(frozen=True)
class TemplateMarks:
    """What the detectors need to know of a chat template."""

    source: str = ""
    user_header: str = ""
    end_of_turn: str | None = None


class Scan:
    """One pass over all rows of a set."""

    def __init__(self, data_format: DataFormat, marks: TemplateMarks, *, label: str = "") -> None:
        """`label` goes before the names of what is found."""
        self.detectors: list[Detector] = [EmptyAnswers(), Duplicates(), SwappedColumns(data_format, marks.user_header)]
        self.detectors += [Roles(marks.source), LastTurn(), StrippedHistory(), Languages()]
        self.detectors += [UnclosedThinking()] if data_format.with_thinking else [StrippedAnswers()]
        self.detectors += [Marks(marks.end_of_turn)] if marks.end_of_turn else []
        self.rows = 0
        self.thinking_histories = self.without_system = 0
        self.thinking_example: Cell | None = None
        self._format, self._label = data_format, label
        self._refused = 0
        self._first_refusal = ""

    def see(self, cells: tuple, cell: Cell, make: Callable[[], object] | None = None) -> None:
        """Look at the next row.

        Args:
            cells: values of the columns read.
            cell: where it stands.
            make: what the Trainer would do with the row, where it is known that it refuses one.
        """
        self.rows += 1
        found: list[Detector] = []
        try:
            row = read_row(cells, cell, self._format)
        except UserError:
            pass  # `make` says so too
        else:
            found = [detector for detector in self.detectors if detector.see(row)]
            assistants = [content for role, content in row.turns if role == "assistant"]
            earlier = assistants[:-1] if row.is_conversation else assistants
            if any(map(_thinks, earlier)):
                self.thinking_histories += 1
                self.thinking_example = self.thinking_example or cell
            self.without_system += bool(row.turns) and row.turns[0][0] != "system"
        if make is None:
            return
        try:
            make()
        except UserError as error:
            explaining = next((detector for detector in found if detector.explains), None)
            if explaining is not None:
                explaining.refuses = True
            else:
                self._refused += 1
                self._first_refusal = self._first_refusal or str(error)

    def findings(self) -> Iterator[Finding]:
        """What was found, a line for each fault."""
        if self._refused:
            more = f" ({rows_of(self._refused, self.rows)})" if self._refused > 1 else ""
            yield Finding("refused", f"{self._label}rows", self._first_refusal + more)
        for detector in self.detectors:
            found = detector.finding()
            if found is not None:
                yield replace(found, name=self._label + found.name)
