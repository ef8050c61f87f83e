"""Whether a chat template renders conversations as they are trained on and generated from."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsft.dataset.chat_format import THINK, ChatFormat
from dsft.errors import UserError
from dsft.previewing.row_checks import END_THINK, Finding, Scan, excerpt, rows_of
from dsft.text import one_line

QUESTION, ANSWER, NEXT, SYSTEM, THOUGHT = "probequestion", "probeanswer", "probenext", "probesystem", "probethought"


@dataclass(frozen=True)
class ChatTemplate:
    """How a chat template renders a conversation of ours.

    source: of the template; empty where the tokenizer has none
    end_of_turn: the token that training appends to an answer
    error: why the template does not render it; the rest has its defaults then
    user_header: what stands before a user turn
    default_system: the system prompt that is inserted where a conversation has none
    rewrites: how a turn changes once another follows it; None where it stays as it was trained on
    strips_thinking: whether earlier turns lose their thinking
    ends_answers: whether a special token follows an answer directly
    starts_answers: whether an answer in a history begins as a generation prompt ends
    """

    source: str
    end_of_turn: str
    error: str | None = None
    user_header: str = ""
    default_system: str = ""
    rewrites: str | None = None
    strips_thinking: bool = False
    ends_answers: bool = True
    starts_answers: bool = True


def inspect_template(chat_format: ChatFormat) -> ChatTemplate:
    """Render some conversations with a tokenizer's template, if it has one."""
    tokenizer = chat_format.tokenizer
    end = str(tokenizer.convert_ids_to_tokens(chat_format.end_of_turn))
    source = str(tokenizer.chat_template or "")
    if not source:
        return ChatTemplate(source, end)

    def render(*contents: str, system: str | None = None, generation: bool = False) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        return chat_format.render(messages, generation=generation)

    try:
        asked = render(QUESTION)
        trained = render(QUESTION, generation=True) + ANSWER
        history = render(QUESTION, ANSWER, NEXT, generation=True)
        thought = f"{THINK}{THOUGHT}{END_THINK}"
        thinking = render(QUESTION, thought + ANSWER, NEXT, generation=True)
        ends_answers = render(QUESTION, ANSWER).partition(ANSWER)[2].startswith(end)
    except UserError as error:
        return ChatTemplate(source, end, error=one_line(error.__cause__))
    strips_thinking, rewrites = THOUGHT not in thinking, None
    starts_answers = history.startswith(trained)
    if not history.startswith(trained[: len(asked)]):
        rewrites, starts_answers = _difference(trained, history), True
    elif starts_answers and not strips_thinking:
        rewrites = _difference(trained.replace(ANSWER, thought + ANSWER), thinking)
    try:
        default_system = _default_system(asked, render(QUESTION, system=SYSTEM))
    except UserError:  # some take no system turn
        default_system = ""
    return ChatTemplate(
        source,
        end,
        user_header=history.partition(ANSWER)[2].partition(NEXT)[0].removeprefix(end),
        default_system=default_system,
        rewrites=rewrites,
        strips_thinking=strips_thinking,
        ends_answers=ends_answers,
        starts_answers=starts_answers,
    )


def _difference(before: str, after: str) -> str | None:
    """Where a text stops being a prefix of another; None where it is one."""
    pairs = enumerate(zip(before, after, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    return None if same == len(before) else f"{excerpt(before[same:])} becomes {excerpt(after[same:])}"


def _default_system(without: str, given: str) -> str:
    """What a conversation without a system turn has in the place of ours."""
    before, _, after = given.partition(SYSTEM)
    if not before.strip() or not without.startswith(before):
        return ""
    text, found, _ = without[len(before) :].partition(after)
    return text.strip() if found else ""


def template_findings(
    template: ChatTemplate, scan: Scan, chat_format: ChatFormat, stops: Sequence[int] | None
) -> list[Finding]:
    """One on histories, one on the end of a turn.

    `scan` is of the training rows; `stops` are the tokens at which generation_config.json or config.json ends
    generation, None where neither names one.
    """
    if not template.source:
        first = Finding("ok", "template", "none: prompt and response are concatenated as they are")
    elif template.error is not None:
        text = f"the chat template rejects a conversation of user and assistant: {template.error}"
        first = Finding("warning", "template", text)
    else:
        first = _history_finding(template, scan)
    return [first, _end_finding(template, scan, chat_format, stops)]


def _history_finding(template: ChatTemplate, scan: Scan) -> Finding:
    """Whether a conversation is rendered as a prefix of its continuation."""
    name, thinking, no_system = "histories", scan.history_thinks, scan.no_system_turn
    if template.rewrites is not None:
        text = (
            f"the chat template changes a turn once another follows: {template.rewrites}; the rows of a dialogue "
            "share less than their texts do, and a conversation becomes one row per answer"
        )
        return Finding("warning", name, text)
    text = "every conversation is rendered as a prefix of its continuation"
    if template.strips_thinking and thinking.count:
        rows = rows_of(thinking.count, scan.rows)
        text = f"the chat template strips thinking from earlier turns, here as at inference: in {rows}, "
        text += f"e.g. {thinking.example}; a conversation becomes one row per answer"
    elif template.strips_thinking:
        text += "; thinking is stripped from earlier turns, but the rows have none there"
    if template.default_system and no_system.count:
        rows = rows_of(no_system.count, scan.rows)
        text += f"; {rows} have no system turn and get this one: {excerpt(template.default_system)}"
    return Finding("ok", name, text)


def _end_finding(template: ChatTemplate, scan: Scan, chat_format: ChatFormat, stops: Sequence[int] | None) -> Finding:
    """Whether the token that ends an answer is in histories too, and ends generation."""
    name, end, tokenizer = "end of turn", template.end_of_turn, chat_format.tokenizer
    if not template.ends_answers:
        text = (
            f"the chat template puts no special token directly after an answer; training appends {end} in all "
            f"{scan.rows:,} rows, but histories do not have it; fix the template, or use an instruction-tuned model's"
        )
        return Finding("warning", name, text)
    text = f"{end} is learned after every answer"
    known = [tokenizer.eos_token_id] if stops is None else list(stops)
    if chat_format.end_of_turn in known:
        return Finding("ok", name, f"{text}, and generation stops at it")
    source = "the tokenizer's end of sequence" if stops is None else "the model's generation config"
    names = ", ".join(str(tokenizer.convert_ids_to_tokens(stop)) for stop in known if stop is not None)
    text += (
        f", but {source} stops at {names or 'nothing'}: dsft.validate stops at both, other programs do not; "
        "add it to eos_token_id in the merged model's generation_config.json"
    )
    return Finding("warning", name, text)


def start_finding(template: ChatTemplate) -> Finding:
    """Whether the template begins an answer in a history as a generation prompt ends."""
    name = "start of answers"
    if not template.starts_answers:
        text = (
            "the chat template ends a generation prompt otherwise than it begins an answer in a history, so answers "
            "are trained after one and read after the other"
        )
        return Finding("warning", name, text)
    return Finding("ok", name, "each prompt is rendered and tokenized as it is for generation")
