"""One row of a file as token rows: each answer as it will be asked for at inference.

An answer's prompt is what the chat template renders of the turns before it, with the generation prompt. The answer
itself is what the template adds when the turn follows, up to its end of turn; a response given as a string is taken as
it is. Prompt and answer are tokenized apart, so the boundary is exact. The mask comes from lengths, never from token
ids: pad and end-of-turn are often the same id.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from operator import eq
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from dsft.config.flags import RowFlags
from dsft.dataset.messages import (
    Message,
    MessageForm,
    Tools,
    in_form,
    kind_of,
    pop_flag,
    pop_weight,
    read_messages,
    read_tools,
)
from dsft.dataset.piece_tokenizer import PieceTokenizer
from dsft.dataset.readers import Cell
from dsft.errors import UserError, did_you_mean
from dsft.text import one_line

THINK = "<think>"
PROBE_USER, PROBE_ANSWER, PROBE_ARGUMENT = "probequestion", "probeanswer", "probeargument"
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class Answer:
    """One answer and what stands before it.

    prompt: with the generation prompt
    text: what is learned
    has_end: whether `text` ends with its end of turn; otherwise that token is appended
    weight: of its targets in the loss
    """

    prompt: str
    text: str
    has_end: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class RenderedRow:
    """The answers of a row of a file that are learned, and the keys in it that the chat template ignores."""

    answers: list[Answer]
    ignored: list[str] = field(default_factory=list)


class TokenRow(NamedTuple):
    """One sequence to train on.

    tokens: int32 [length]
    is_target: bool [length]
    weight: of its targets in the loss
    history: tokens before the generation prompt of its first answer
    """

    tokens: np.ndarray
    is_target: np.ndarray
    weight: float
    history: int


class ChatFormat:
    """How one tokenizer turns prompts, responses and conversations into tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        with_thinking: bool = False,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        learn: Literal["all", "last", "flagged"] = "all",
    ) -> None:
        """Raises:
        UserError: the tokenizer has no token that could end a turn, or the template does not have an argument.
        """
        self.tokenizer = tokenizer
        self.with_thinking = with_thinking
        self._system, self._arguments, self._learn = system_prompt, template_arguments or {}, learn
        self._ids = PieceTokenizer(tokenizer)
        self.has_template = bool(tokenizer.chat_template)
        words = set(re.findall(r"\w+", str(tokenizer.chat_template or "")))
        for name in self._arguments:
            if name not in words:
                raise UserError(
                    f"--template_arguments: the chat template has no argument '{name}'{did_you_mean(name, words)}; "
                    "correct it, or drop it"
                )
        self.marks: list[str] = []
        self._generation_prompt, after_answer = "", ""
        self._form = MessageForm()
        if self.has_template:
            probe: list[Message] = [{"role": "user", "content": PROBE_USER}]
            probe += [{"role": "assistant", "content": PROBE_ANSWER}]
            self._form = self._find_form(
                probe,
                [MessageForm(), MessageForm(as_parts=True)],
                lambda text: PROBE_USER in text and PROBE_ANSWER in text,
            )
            asked, generation = (self.render(probe[:1], generation=generation) for generation in (False, True))
            self._generation_prompt = generation.removeprefix(asked) if generation.startswith(asked) else ""
            before, _, rest = self.render(probe, generation=False).partition(PROBE_USER)
            between, _, after_answer = rest.partition(PROBE_ANSWER)
            self.marks = self._own_marks([before, between, after_answer])
        self.end_of_turn = self._find_end_of_turn(after_answer)
        added = tokenizer.added_tokens_decoder.values()
        self._special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, flags: RowFlags) -> "ChatFormat":
        """As the flags of a command say.

        Raises:
            UserError: as above, or the file of --system_prompt cannot be read.
        """
        return cls(
            tokenizer,
            with_thinking=flags.with_thinking,
            system_prompt=read_system_prompt(flags),
            template_arguments=flags.template_arguments,
            learn=flags.learn,
        )

    def _find_form(
        self, probe: Sequence[Message], forms: Sequence[MessageForm], is_right: Callable[[str], bool]
    ) -> MessageForm:
        """The first form in which the template renders the probe rightly, else the first in which it renders it."""
        rendered = {}
        for form in forms:
            with suppress(*RENDER_ERRORS):
                rendered[form] = self._apply(in_form(probe, form), None, generation=False)
        right = [form for form, text in rendered.items() if is_right(text)]
        return [*right, *rendered, *forms][0]

    @cached_property
    def _tool_form(self) -> MessageForm:
        """The form for conversations with tool calls."""
        call: Message = {
            "type": "function",
            "id": "abcdefghi",  # Mistral's template wants nine characters
            "function": {"name": "probe", "arguments": {"key": PROBE_ARGUMENT}},
        }
        probe: list[Message] = [{"role": "user", "content": PROBE_USER}]
        probe += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        forms = [
            MessageForm(self._form.as_parts, null_content, json_arguments)
            for json_arguments in (False, True)
            for null_content in (True, False)
        ]
        wrong = ("None", "{'key'", '\\"key')  # a null, an object or JSON text printed by a template that wants another
        return self._find_form(
            probe, forms, lambda text: PROBE_ARGUMENT in text and not any(sign in text for sign in wrong)
        )

    def _find_end_of_turn(self, after_answer: str) -> int:
        """The special token that the template puts after an answer; else the end-of-sequence token."""
        ids = self.tokenizer(after_answer, add_special_tokens=False)["input_ids"] if after_answer else []
        if ids and ids[0] in {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}:
            return ids[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no end-of-sequence token, so answers would have "
                "no end; name a --model whose tokenizer has one"
            )
        return self.tokenizer.eos_token_id

    def _own_marks(self, texts: list[str]) -> list[str]:
        """What identifies a string formatted with this template: its special tokens, else its literal text."""
        added = [*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens]
        marks = [token for token in dict.fromkeys(added) if token.strip() and any(token in text for text in texts)]
        return marks or [text.strip() for text in texts if text.strip()]

    # Rendering

    def _apply(self, messages: list[Message], tools: Tools | None, *, generation: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=generation,
            **self._arguments,
        )
        assert isinstance(text, str)
        return text

    def render(
        self, messages: list[Message], tools: Tools | None = None, cell: Cell | None = None, *, generation: bool
    ) -> str:
        """What the chat template makes of messages, with or without the generation prompt.

        Raises:
            UserError: it refuses them.
        """
        form = self._tool_form if any("tool_calls" in message for message in messages) else self._form
        if self._system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self._system}, *messages]
        try:
            return self._apply(in_form(messages, form), tools, generation=generation)
        except RENDER_ERRORS as error:
            raise UserError(
                f"{f'{cell}: ' if cell else ''}the chat template refuses the messages: {one_line(error)}; change the "
                "row's roles, or name a --model whose template takes them"
            ) from error

    def _answer(self, turns: list[Message], tools: Tools | None, index: int, weight: float, cell: Cell) -> Answer:
        """The turn of that index, given those before it."""
        if not index:
            raise UserError(
                f"{cell}: turn 0 is an answer to no question; give it weight 0, or put a user turn before it"
            )
        prompt = self.render(turns[:index], tools, cell, generation=True)
        whole = self.render(turns[: index + 1], tools, cell, generation=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"{cell}: the chat template does not render turn {index} as a continuation of its generation prompt, "
                f"which ends with {prompt[-40:]!r}; use another --chat_template or --template_arguments, or write the "
                "turn as prompt and response"
            )
        return Answer(prompt, *self._cut_end(whole[len(prompt) :]), weight)

    def _cut_end(self, text: str) -> tuple[str, bool]:
        """A rendered answer up to its end of turn, and whether it has one."""
        end = str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn))
        before, found, after = text.rpartition(end)
        for token in self._special:
            after = after.replace(token, "")
        if found and not after.strip():
            return before + end, True
        stripped = text.rstrip()  # a tool call may end otherwise than an answer
        return (stripped, True) if stripped.endswith(tuple(self._special)) else (text, False)

    def _ignored(
        self,
        turns: list[Message],
        tools: Tools | None,
        render: Callable[[list[Message], Tools | None], Iterator[object]],
        expected: Sequence[object],
    ) -> list[str]:
        """The keys of messages, and tools, without which all is rendered as expected."""
        if not tools and all(len(turn) == 2 for turn in turns):  # role and content
            return []
        names = list(dict.fromkeys(key for turn in turns for key in turn if key not in ("role", "content")))

        def is_ignored(turns: list[Message], tools: Tools | None) -> bool:
            try:
                return all(map(eq, render(turns, tools), expected))  # which ends at the first difference
            except UserError:
                return False

        without = {name: [{k: v for k, v in turn.items() if k != name} for turn in turns] for name in names}
        ignored = [name for name, others in without.items() if is_ignored(others, tools)]
        return ignored + (["tools"] if tools and is_ignored(turns, None) else [])

    # Rows

    def prompt_and_response(
        self, prompt: Any, response: Any, cell: Cell, tools: Any = None, weight: float = 1.0
    ) -> RenderedRow:
        """A prompt (a string, or a list of messages) and a response (a string, or one message).

        Raises:
            UserError: values of another kind, with file and row.
        """
        if isinstance(response, list) and len(response) == 1:
            response = response[0]
        given = read_tools(tools, cell)
        is_formatted = isinstance(prompt, str) and (not self.has_template or any(mark in prompt for mark in self.marks))
        turns: list[Message] = []
        if isinstance(prompt, str) and not is_formatted:
            turns = [{"role": "user", "content": prompt}]
        elif not isinstance(prompt, str):
            turns = read_messages(prompt, "prompt", cell)
            if not self.has_template:
                raise UserError(
                    f"{cell}: the prompt is a list of messages, but the tokenizer has no chat template; write prompts "
                    "as strings, or name a --model with a template"
                )
        if turns and isinstance(response, dict) and not self.with_thinking:
            turns += read_messages([{**response, "role": "assistant"}], "response", cell)
            weight *= pop_weight(turns[-1], len(turns) - 1, cell)

            def answer(turns: list[Message], tools: Tools | None) -> Iterator[Answer]:
                yield self._answer(turns, tools, len(turns) - 1, weight, cell)

            answers = list(answer(turns, given)) if weight else []
            return RenderedRow(answers, self._ignored(turns, given, answer, answers) if answers else [])

        def ask(turns: list[Message], tools: Tools | None) -> Iterator[str]:
            yield self.render(turns, tools, cell, generation=True)

        asked = next(ask(turns, given)) if turns else str(prompt)
        unused = {"tools": given, "system_prompt": self._system}  # by a prompt that is not rendered
        ignored = self._ignored(turns, given, ask, [asked]) if turns else [key for key, one in unused.items() if one]
        text, answer_text = asked, _response_text(response, cell)
        if self.with_thinking:
            if not text.rstrip().endswith(THINK):
                text += THINK
            answer_text = answer_text.lstrip().removeprefix(THINK)
        if not text:
            raise UserError(f"{cell}: the prompt is empty, so nothing predicts the first response token; drop the row")
        answers = [Answer(text, answer_text, weight=weight)] if weight else []
        return RenderedRow(answers, ignored)

    def prompt(self, messages: Any, cell: Cell, tools: Any = None) -> np.ndarray:
        """The tokens (int32 [length]) of a prompt that is to be answered."""
        [answer] = self.prompt_and_response(messages, "", cell, tools).answers
        return self._prompts([answer.prompt])[0]

    def conversation(self, messages: Any, cell: Cell, tools: Any = None, weight: float = 1.0) -> RenderedRow:
        """The assistant turns of a conversation that are learned, each given the turns before it.

        Raises:
            UserError: not a list of messages, no assistant turn, or a template that cannot render one of them.
        """
        turns = read_messages(messages, "conversation", cell)
        if not self.has_template:
            raise UserError(
                f"{cell}: --messages_key needs a tokenizer with a chat template; name a --model with one, or use "
                "prompt and response columns"
            )
        given = read_tools(tools, cell)
        assistant = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not assistant:
            raise UserError(f"{cell}: the conversation has no assistant turn, so there is no target; drop the row")
        weights = {index: weight * pop_weight(turns[index], index, cell) for index in assistant}
        if self._learn == "last":
            weights = {index: one for index, one in weights.items() if index == assistant[-1]}
        elif self._learn == "flagged":
            weights = {index: one for index, one in weights.items() if pop_flag(turns[index], index, cell)}
        learned = [(index, one) for index, one in weights.items() if one]

        def answers(turns: list[Message], tools: Tools | None) -> Iterator[Answer]:
            return (self._answer(turns, tools, index, one, cell) for index, one in learned)

        found = list(answers(turns, given))
        return RenderedRow(found, self._ignored(turns, given, answers, found) if found else [])

    # Tokens

    def tokenize(self, rows: Sequence[RenderedRow]) -> list[list[TokenRow]]:
        """The sequences of each row: answers whose prompts continue each other, with the same weight, are one."""
        answers = [answer for row in rows for answer in row.answers]
        prompts = self._prompts([answer.prompt for answer in answers])
        texts = self._ids([answer.text for answer in answers])
        ids: Iterator[tuple[np.ndarray, np.ndarray]] = iter(zip(prompts, texts, strict=True))
        return [self._sequences(row.answers, ids) for row in rows]

    def _sequences(self, answers: Sequence[Answer], ids: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[TokenRow]:
        found: list[TokenRow] = []
        suffix, end = self._suffix, np.array([self.end_of_turn], np.int32)
        for answer in answers:
            prompt, text = next(ids)
            tokens = np.concatenate([prompt, text] if answer.has_end else [prompt, text, end])
            is_target = np.zeros(len(tokens), bool)
            is_target[len(prompt) :] = True
            history = len(prompt)
            if len(suffix) < history and tokens[history - len(suffix) : history].tobytes() == suffix.tobytes():
                history -= len(suffix)
            before = found[-1] if found else None
            if before is not None and before.weight == answer.weight and _begins_with(prompt, before.tokens):
                is_target[: len(before.is_target)] = before.is_target
                found[-1] = TokenRow(tokens, is_target, answer.weight, before.history)
            else:
                found.append(TokenRow(tokens, is_target, answer.weight, history))
        return found

    @cached_property
    def _suffix(self) -> np.ndarray:
        """The tokens of the generation prompt."""
        return self._ids([self._generation_prompt])[0]

    def _prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        start = [] if self.has_template else self._start_of_text
        return [np.concatenate([np.array(start, np.int32), ids]) for ids in self._ids(texts)]

    @cached_property
    def _start_of_text(self) -> list[int]:
        """What a tokenizer without a template puts before every text."""
        probe = self.tokenizer(PROBE_USER)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and probe and probe[0] == bos else []


def _begins_with(tokens: np.ndarray, prefix: np.ndarray) -> bool:
    return len(prefix) <= len(tokens) and np.array_equal(tokens[: len(prefix)], prefix)


def read_system_prompt(flags: RowFlags) -> str | None:
    """--system_prompt, or the text of the file that it names.

    Raises:
        UserError: the file cannot be read.
    """
    text = flags.system_prompt
    if text is None or "\n" in text or len(text) > 255 or not Path(text).expanduser().is_file():
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--system_prompt {text} cannot be read: {one_line(error)}; name a UTF-8 text file") from error


def _response_text(value: Any, cell: Cell) -> str:
    if isinstance(value, dict):
        if extra := [key for key, one in value.items() if one is not None and key not in ("role", "content")]:
            raise UserError(
                f"{cell}: the response has {', '.join(extra)}, which the chat template renders only after a prompt of "
                "messages and without --with_thinking; write it as text, or change the prompt"
            )
        value = value.get("content")
    if not isinstance(value, str):
        raise UserError(f"{cell}: the response must be a string or one {{role, content}} message, got {kind_of(value)}")
    return value
