"""A game as a conversation: instruction, positions as user turns, moves as assistant turns."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dsft.envs.base import ACTIONS, Environment

Style = Literal["messages", "chatml", "plain"]
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL | re.IGNORECASE)
NOT_UNDERSTOOD = "That was no valid answer."


def format_answer(action: str) -> str:
    """An action as an assistant's turn."""
    return f"<answer>{action}</answer>"


def parse_answer(text: str) -> str | None:
    """The action of an answer: exactly one <answer> with the name of one action; else None."""
    found = ANSWER.findall(text)
    if len(found) != 1:
        return None
    return next((action for action in ACTIONS if action.lower() == found[0].lower()), None)


def instruction(environment: Environment) -> str:
    """The system prompt of a game."""
    return f"{environment.rules}\nAnswer with one action only: {' or '.join(map(format_answer, ACTIONS))}"


@dataclass
class Conversation:
    """One episode as a model sees it."""

    system: str
    states: list[str]
    """User turns: the positions, with a note after an invalid answer."""
    answers: list[str] = field(default_factory=list)
    """Assistant turns, one fewer than `states` while the player is to move."""

    def messages(self, history_turns: int | None = None) -> list[dict[str, str]]:
        """The conversation so far as {role, content}, with the last `history_turns` answers (None: all)."""
        first = 0 if history_turns is None else max(0, len(self.answers) - history_turns)
        result = [{"role": "system", "content": self.system}]
        for state, answer in zip(self.states[first:], [*self.answers[first:], None], strict=False):
            result.append({"role": "user", "content": state})
            if answer is not None:
                result.append({"role": "assistant", "content": answer})
        return result

    def prompt(self, style: Style, history_turns: int | None = None) -> Any:
        """The prompt, in the style of the flag."""
        messages = self.messages(history_turns)
        if style == "messages":
            return messages
        if style == "chatml":
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            return "".join(turns) + "<|im_start|>assistant\n"
        return "\n\n".join(message["content"] for message in messages)
