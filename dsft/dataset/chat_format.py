"""One row as tokens and a loss mask: template(prompt) + response + end-of-turn, of which the last two are targets.

The prompt goes through the tokenizer's chat template; the response is tokenized on its own, so the boundary is exact.
The mask comes from lengths, never from token ids: pad and end-of-turn are often the same id.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from dsft.dataset.readers import Cell
from dsft.errors import UserError
from dsft.text import one_line

THINK = "<think>"
PROBE_USER, PROBE_ANSWER = "probequestion", "probeanswer"


@dataclass(frozen=True)
class Segment:
    """A part of a row's text: context, or a target (then an end-of-turn token follows)."""

    text: str
    is_target: bool


class ChatFormat:
    """How one tokenizer turns prompts, responses and conversations into tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, with_thinking: bool = False) -> None:
        """Raises:
        UserError: the tokenizer has no token that could end a turn.
        """
        self.tokenizer = tokenizer
        self.with_thinking = with_thinking
        self.has_template = bool(tokenizer.chat_template)
        self.marks: list[str] = []
        after_answer = ""
        if self.has_template:
            probe = [{"role": "user", "content": PROBE_USER}, {"role": "assistant", "content": PROBE_ANSWER}]
            before, _, rest = self._render(probe, None, generation=False).partition(PROBE_USER)
            between, _, after_answer = rest.partition(PROBE_ANSWER)
            self.marks = self._own_marks([before, between, after_answer])
        self.end_of_turn = self._find_end_of_turn(after_answer)

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

    def _render(self, messages: list[dict[str, str]], cell: Cell | None, *, generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"{f'{cell}: ' if cell else ''}the chat template refuses the messages: {one_line(error)}; change the "
                "row's roles, or name a --model whose template takes them"
            ) from error
        assert isinstance(text, str)
        return text

    def prompt_and_response(self, prompt: Any, response: Any, cell: Cell) -> list[Segment]:
        """A prompt (a string, or a list of messages) and a response (a string, or one message) as segments.

        Raises:
            UserError: values of another kind, with file and row.
        """
        answer = _response_text(response, cell)
        if isinstance(prompt, str):
            text = prompt
            if self.has_template and not any(mark in prompt for mark in self.marks):  # else formatted already
                text = self._render([{"role": "user", "content": prompt}], cell, generation=True)
        elif self.has_template:
            text = self._render(_messages(prompt, "prompt", cell), cell, generation=True)
        else:
            raise UserError(
                f"{cell}: the prompt is a list of messages, but the tokenizer has no chat template; write prompts "
                "as strings, or name a --model with a template"
            )
        if self.with_thinking:
            if not text.rstrip().endswith(THINK):
                text += THINK
            answer = answer.lstrip().removeprefix(THINK)
        if not text:
            raise UserError(f"{cell}: the prompt is empty, so nothing predicts the first response token; drop the row")
        return [Segment(text, False), Segment(answer, True)]

    def conversation(self, messages: Any, cell: Cell) -> list[Segment]:
        """A whole conversation as segments; every assistant turn is a target.

        Raises:
            UserError: not a list of messages, no assistant turn, or a template that rewrites earlier turns.
        """
        turns = _messages(messages, "conversation", cell)
        if not self.has_template:
            raise UserError(
                f"{cell}: --messages_key needs a tokenizer with a chat template; name a --model with one, or use "
                "prompt and response columns"
            )
        end = str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn))
        segments: list[Segment] = []
        so_far = ""
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            history = self._render(turns[:index], cell, generation=True) if index else ""
            if not history.startswith(so_far) or not history:
                raise UserError(
                    f"{cell}: the chat template changes the turns before turn {index} (it may strip thinking, or need "
                    "a user turn first); write one row per turn, with prompt and response"
                )
            segments += [Segment(history[len(so_far) :], False), Segment(turn["content"], True)]
            so_far = history + turn["content"] + end
        if not segments:
            raise UserError(f"{cell}: the conversation has no assistant turn, so there is no target; drop the row")
        return segments

    def tokenize(self, rows: list[list[Segment]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows of segments as (token ids int32 [length], is-target bool [length]), in one call to the tokenizer."""
        texts = [segment.text for row in rows for segment in row]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        start = [] if self.has_template else self._start_of_text()
        result = []
        for row in rows:
            ids, mask = list(start), [False] * len(start)
            for segment in row:
                tokens = list(next(encoded)) + ([self.end_of_turn] if segment.is_target else [])
                ids += tokens
                mask += [segment.is_target] * len(tokens)
            result.append((np.array(ids, np.int32), np.array(mask, bool)))
        return result

    def _start_of_text(self) -> list[int]:
        """What a tokenizer without a template puts before every text."""
        probe = self.tokenizer(PROBE_USER)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and probe and probe[0] == bos else []


def _messages(value: Any, what: Literal["prompt", "conversation"], cell: Cell) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        kinds = "a string or a list of {role, content}" if what == "prompt" else "a list of {role, content}"
        raise UserError(f"{cell}: the {what} must be {kinds}, got {_kind(value)}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{cell}: message {index} of the {what} must have a role and a content, both strings")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _response_text(value: Any, cell: Cell) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str):
        raise UserError(f"{cell}: the response must be a string or one {{role, content}} message, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}"[:60]
