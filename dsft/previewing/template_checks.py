"""Whether a tokenizer's chat template goes with how rows are trained on and how answers are generated."""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from dsft.dataset.chat_format import THINK, ChatFormat, Segment
from dsft.previewing.row_checks import END_THINK, Finding, Scan, TemplateMarks, rows_of

QUESTION, ANSWER, AGAIN, SYSTEM, THOUGHT = "probequestion", "probeanswer", "probeagain", "probesystem", "probethought"
LONGEST = 60  # characters of a template's own text in a message
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Probe:
    """What a template does with a conversation of ours.

    error: why it cannot be asked; the rest is empty then
    marks: for the search for faults in the rows
    default_system: the system prompt that it inserts where there is none
    rewrites: how a turn looks once another has followed, where that differs from how it was trained on
    strips_thinking: whether the thinking of earlier turns is taken out
    has_end: whether a special token stands directly after an answer
    begins_answer: whether what it puts before an answer in a history is what it ends a prompt for generation with
    """

    error: str | None = None
    marks: TemplateMarks = TemplateMarks()
    default_system: str = ""
    rewrites: str | None = None
    strips_thinking: bool = False
    has_end: bool = True
    begins_answer: bool = True


def probe_template(chat_format: ChatFormat) -> Probe:
    """Ask a tokenizer's template. Without a template there is nothing to ask."""
    tokenizer = chat_format.tokenizer
    end = str(tokenizer.convert_ids_to_tokens(chat_format.end_of_turn))
    if not chat_format.has_template:
        return Probe(marks=TemplateMarks(end_of_turn=end))

    def render(*contents: str, system: str | None = None, generation: bool = False) -> str:
        messages: Messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        assert isinstance(text, str)
        return text

    try:
        asked = render(QUESTION)
        first = render(QUESTION, generation=True)
        answered = render(QUESTION, ANSWER)
        later = render(QUESTION, ANSWER, AGAIN, generation=True)
        thought = f"{THINK}{THOUGHT}{END_THINK}{ANSWER}"
        thinking = render(QUESTION, thought, AGAIN, generation=True)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        return Probe(error=" ".join(str(error).split()), marks=TemplateMarks(str(tokenizer.chat_template), "", end))
    after_answer = answered.partition(ANSWER)[2]
    has_end = after_answer.startswith(end)
    between = later.partition(ANSWER)[2].partition(AGAIN)[0]
    user_header = between.removeprefix(end)
    strips = THOUGHT not in thinking
    rewrites, begins_answer = None, True
    if not later.startswith(first + ANSWER):
        if _common(first + ANSWER, later) < len(asked):
            rewrites = _difference(first + ANSWER, later)
        else:
            begins_answer = False
    elif not strips and not thinking.startswith(first + thought):
        rewrites = _difference(first + thought, thinking)
    try:
        given = render(QUESTION, system=SYSTEM)
        default_system = _inserted(asked, given)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):  # some take no system turn
        default_system = ""
    return Probe(
        marks=TemplateMarks(str(tokenizer.chat_template), user_header, end),
        default_system=default_system,
        rewrites=rewrites,
        strips_thinking=strips,
        has_end=has_end,
        begins_answer=begins_answer,
    )


def _difference(before: str, after: str) -> str:
    """Where a text stops being the beginning of another, in words."""
    same = _common(before, after)
    return f"{_short(before[same:])} becomes {_short(after[same:])}"


def _common(first: str, second: str) -> int:
    """Characters that two texts share at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _short(text: str) -> str:
    return repr(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


def _inserted(without: str, given: str) -> str:
    """The text that stands in a render without a system turn where another has our own."""
    before, _, behind = given.partition(SYSTEM)
    if not before.strip() or not without.startswith(before):
        return ""
    text, found, _ = without[len(before) :].partition(behind)
    return text.strip() if found else ""


def template_findings(
    probe: Probe, scan: Scan, end_of_turn: int, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int] | None
) -> list[Finding]:
    """Two lines: on histories, and on the end of a turn.

    Args:
        probe: of the template.
        scan: of the training rows.
        end_of_turn: the token that is learned after every answer.
        tokenizer: of the model.
        stops: what generation_config.json or config.json names as the end; None where neither does.
    """
    end = str(tokenizer.convert_ids_to_tokens(end_of_turn))
    if not tokenizer.chat_template:
        return [
            Finding("ok", "template", "none: prompt and response are put together as they are"),
            _end_finding(end_of_turn, end, tokenizer, stops),
        ]
    if probe.error is not None:
        text = f"the chat template refuses a conversation of user and assistant: {probe.error}"
        return [Finding("warning", "template", text), _end_finding(end_of_turn, end, tokenizer, stops)]
    findings = [_history_finding(probe, scan)]
    if not probe.has_end:
        text = (
            f"the chat template puts no special token directly after an answer; {end} is learned there in all "
            f"{scan.rows:,} rows, but no history has it; mend the template, or take an instruction-tuned model's"
        )
        findings.append(Finding("warning", "end of turn", text))
    else:
        findings.append(_end_finding(end_of_turn, end, tokenizer, stops))
    return findings


def _history_finding(probe: Probe, scan: Scan) -> Finding:
    """Whether the render of a history is the beginning of its render one turn later."""
    if probe.rewrites is not None:
        text = (
            f"the chat template renders a turn otherwise once another follows: {probe.rewrites}; the rows of a "
            "dialogue share less than their texts do, and --messages_key is refused"
        )
        return Finding("warning", "histories", text)
    if probe.strips_thinking and scan.thinking_histories:
        text = (
            f"the chat template strips the thinking of earlier turns: {rows_of(scan.thinking_histories, scan.rows)} "
            f"lose some, e.g. {scan.thinking_example}; the model is trained on histories that it would not have written"
        )
        return Finding("warning", "histories", text)
    text = "the render of a history is the beginning of its render one turn later"
    if probe.strips_thinking:
        text += "; thinking of earlier turns is stripped, but the rows have none"
    if probe.default_system and scan.without_system:
        rows = rows_of(scan.without_system, scan.rows)
        text += f"; {rows} have no system turn and get the template's: {_short(probe.default_system)}"
    return Finding("ok", "histories", text)


def _end_finding(
    end_of_turn: int, end: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int] | None
) -> Finding:
    """Whether what is learned at an answer's end is what programs that generate stop at."""
    at = f"{end} is learned after every answer"
    known = [tokenizer.eos_token_id] if stops is None else list(stops)
    if end_of_turn in known:
        return Finding("ok", "end of turn", f"{at}, and generation stops at it")
    source = "the tokenizer's end of sequence" if stops is None else "the model's generation config"
    names = ", ".join(str(tokenizer.convert_ids_to_tokens(stop)) for stop in known if stop is not None)
    text = (
        f"{at}, but {source} stops at {names or 'nothing'}: dsft.validate stops at both, other programs will not; "
        "name it as eos_token_id in generation_config.json of the merged model"
    )
    return Finding("warning", "end of turn", text)


def start_finding(
    probe: Probe, chat_format: ChatFormat, rows: Sequence[tuple[str, list[Segment], np.ndarray, np.ndarray]]
) -> Finding:
    """Whether generation would start exactly where training's targets begin.

    The prompt of every answer is made into tokens in one piece, as dsft.validate does it, and compared with the tokens
    that stand before the answer's targets in the row.

    Args:
        probe: of the template.
        chat_format: of the run.
        rows: for each row where it stands, its segments, and its untruncated tokens and targets.
    """
    different, example, prompts = 0, "", 0
    for where, segments, tokens, is_target in rows:
        starts = np.flatnonzero(is_target & ~np.concatenate([[False], is_target[:-1]]))
        texts = _prompts(segments, str(chat_format.tokenizer.convert_ids_to_tokens(chat_format.end_of_turn)))
        # Answers that follow each other directly make one run of targets, whose first prompt is compared.
        made = chat_format.tokenize([[Segment(text, False)] for text in texts[: len(starts)]])
        prompts += len(made)
        unlike = sum(
            not np.array_equal(prompt, tokens[:start]) for (prompt, _), start in zip(made, starts, strict=True)
        )
        different += unlike
        example = example or (where if unlike else "")
    name = "start of answers"
    if different:
        text = (
            f"{different:,} of {prompts:,} prompts have other tokens where they are generated from than in training, "
            f"e.g. {example}; give one row a turn, with prompt and response"
        )
        return Finding("warning", name, text)
    if chat_format.has_template and probe.error is None and not probe.begins_answer:
        text = (
            "the chat template ends a prompt for generation otherwise than it begins an answer in a history, so "
            "answers are trained after the one and read after the other"
        )
        return Finding("warning", name, text)
    return Finding("ok", name, f"generation starts where the targets begin, in {prompts:,} prompts compared")


def _prompts(segments: Sequence[Segment], end: str) -> list[str]:
    """The text before each answer of a row."""
    texts, so_far, after_answer = [], "", False
    for segment in segments:
        if segment.is_target:
            if not after_answer:
                texts.append(so_far)
            so_far += segment.text + end
        else:
            so_far += segment.text
        after_answer = segment.is_target or (after_answer and not segment.text)
    return texts
