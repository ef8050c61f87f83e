"""Evaluates a model on dialogues: the loss on their responses, and the form of the answers it generates."""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsft.config import ValidateConfig
from dsft.config.train import VAL_LOSS
from dsft.dataset.chat_format import THINK, ChatFormat
from dsft.dataset.micro_batches import MicroBatches
from dsft.dataset.readers import read_columns
from dsft.dataset.row_format import find_sources, read_values
from dsft.dataset.tokens import OPTIONAL, TokenDataset, load_dataset
from dsft.distributed import runtime
from dsft.errors import UserError
from dsft.loss import TargetHead, perplexity, validation_losses
from dsft.planning.activations import SHARE, free_memory
from dsft.planning.plan import RunPlan
from dsft.validation.generation import Generator, TransformersGenerator
from dsft.validation.statistics import wilson_interval

UNTAGGED = r"(?:(?!</?(?:think|answer)>).)*"
FORM = re.compile(rf"\s*<think>{UNTAGGED}</think>\s*<answer>{UNTAGGED}</answer>\s*", re.DOTALL)
BLOCK = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
KINDS = {frozenset({"Question"}): "question", frozenset({"Diagnosis", "Recommendation"}): "diagnosis"}
LABEL = re.compile(r"\b(Question|Diagnosis|Recommendation):")


@dataclass(frozen=True)
class Answer:
    """What an answer's text is.

    in_form: thinking, then an answer, each in its tags, and nothing else but whitespace
    kind: of its only answer block, in form or not, by KINDS; None if it is neither, or there is not exactly one block
    question: the question it asks
    """

    in_form: bool
    kind: str | None
    question: str | None = None


def classify_answer(text: str, *, with_thinking: bool = False) -> Answer:
    """What an answer is; `with_thinking` means that the prompt already ended in <think>."""
    if with_thinking:
        text = THINK + text
    blocks = BLOCK.findall(text)
    parts = _parts(blocks[0]) if len(blocks) == 1 else {}
    kind = KINDS.get(frozenset(parts))
    return Answer(FORM.fullmatch(text) is not None, kind, parts["Question"] if kind == "question" else None)


def _parts(content: str) -> dict[str, str]:
    """Label -> text of an answer block; empty if text precedes the labels, or a label is repeated or has no text."""
    before, *rest = LABEL.split(content)
    labels, texts = rest[::2], [text.strip() for text in rest[1::2]]
    if before.strip() or len(set(labels)) < len(labels) or not all(texts):
        return {}
    return dict(zip(labels, texts, strict=True))


def normalize(question: str) -> str:
    """A question without case, punctuation and extra whitespace."""
    kept = (" " if unicodedata.category(c).startswith("P") else c for c in question.casefold())
    return " ".join("".join(kept).split())


def earlier_questions(prompt: str | list[dict[str, Any]]) -> frozenset[str]:
    """The normalized questions that a prompt's assistant turns have asked.

    A plain string has no turns, so there every answer block counts. The examples in instructions do not: they lack
    the label at their start, or words.
    """
    if isinstance(prompt, str):
        blocks = BLOCK.findall(prompt)
    else:
        turns = [str(message.get("content") or "") for message in prompt if message["role"] == "assistant"]
        blocks = [block for turn in turns for block in BLOCK.findall(turn) or [turn]]
    questions = (parts["Question"] for parts in map(_parts, blocks) if list(parts) == ["Question"])
    return frozenset(filter(None, map(normalize, questions)))


def summarize_answers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of answers, each with its 95 % interval. Well formed: in form, and of one of the two kinds."""
    questions = [row for row in rows if row["kind"] == "question"]
    shares = {
        "form": (sum(row["in_form"] for row in rows), len(rows)),
        "question": (len(questions), len(rows)),
        "diagnosis": (sum(row["kind"] == "diagnosis" for row in rows), len(rows)),
        "well_formed": (sum(row["in_form"] and row["kind"] is not None for row in rows), len(rows)),
        "repeated_question": (sum(row["repeated"] for row in questions), len(questions)),
    }
    report: dict[str, Any] = {"answers": len(rows)}
    for name, (successes, trials) in shares.items():
        report[f"{name}_rate"] = successes / trials if trials else None
        report[f"{name}_interval"] = list(wilson_interval(successes, trials))
    return report


def evaluate_dialogues(
    config: ValidateConfig, generator: Generator, world: runtime.World
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report on the rows of --data, and the answered rows in file order; on every rank.

    The loss is that of all rows, the answers are those to the first --episodes.

    Raises:
        UserError: invalid files or rows, on the rank that reports it; PeerFailedError on the others.
    """
    assert config.data is not None
    names, tokenizer = [config.data], generator.tokenizer
    dialogues = runtime.together(lambda: _read_dialogues(names, config, tokenizer))
    data = runtime.on_first_local_rank(
        world, lambda: load_dataset(names, "data", tokenizer, config, show_progress=world.is_main)
    )
    runtime.check_same_everywhere(data.fingerprint, "the rows of --data", "give all machines the same file and model")
    note = "vLLM gives no losses; --engine transformers does"
    losses: dict[str, Any] = {"val/loss": None, "val/perplexity": None, "loss_note": note}
    if isinstance(generator, TransformersGenerator):
        losses = dict(_measure_loss(config, generator, data, world))
    rows = _answer(config, generator, dialogues, world)
    counts = {"rows": len(data), "rows_cut": data.counts.rows_cut, "rows_dropped": data.counts.rows_dropped}
    cut = {"prompts_cut": sum(dialogue.is_cut for dialogue in dialogues)}
    return counts | losses | summarize_answers(rows) | cut, rows


@dataclass(frozen=True)
class _Dialogue:
    """A row's prompt as the model gets it, and the questions asked in it."""

    tokens: list[int]
    is_cut: bool
    asked: frozenset[str]


def _read_dialogues(
    names: Sequence[str], config: ValidateConfig, tokenizer: PreTrainedTokenizerBase
) -> list[_Dialogue]:
    """The first --episodes rows."""
    available = config.max_length - config.max_new_tokens
    if available < 1:
        raise UserError(
            f"--max_length {config.max_length} leaves no tokens for a prompt with --max_new_tokens "
            f"{config.max_new_tokens}; raise the first or lower the second"
        )
    chat_format = ChatFormat.of(tokenizer, config)
    [found] = find_sources(names, "data", replace(config, weight_key=None))
    flags = found.flags
    if flags.messages_key is not None:
        raise UserError(f"--data {names[0]} contains conversations; it needs prompt and response columns")
    dialogues = []
    for rows in read_columns(found.files, *flags.columns(), config.episodes, OPTIONAL):
        for cell, cells in rows:
            prompt, _ = read_values(cells, cell, flags)
            ids = chat_format.prompt(prompt, cell, cells[-1] if flags.tools_key else None)
            if len(ids) > available and config.truncation == "error":
                raise UserError(
                    f"{cell} has a prompt of {len(ids)} tokens, --max_length {config.max_length} leaves {available} "
                    f"with --max_new_tokens {config.max_new_tokens}; raise --max_length, or choose --truncation left"
                )
            asked = earlier_questions(prompt)
            dialogues.append(_Dialogue(ids[-available:].tolist(), len(ids) > available, asked))
    return dialogues


def _measure_loss(
    config: ValidateConfig, generator: TransformersGenerator, data: TokenDataset, world: runtime.World
) -> dict[str, float]:
    """The same figure as the Trainer's."""
    model, device = generator.model, generator.device
    [free] = runtime.min_over_ranks([free_memory(device, world)], device)
    plan = RunPlan.of_model(
        model, model.dtype, device, ranks=world.size, room=SHARE * free, longest=int(data.lengths.max()), trees=False
    )
    micro_batches = MicroBatches(data, plan.micro_batches, plan.cost, generator.tokenizer.pad_token_id)
    losses = validation_losses(model, TargetHead(model), micro_batches, world, device, show_progress=world.is_main)
    loss = losses[VAL_LOSS]

    def check() -> None:
        if not math.isfinite(loss):
            remedy = "" if config.dtype == "float32" else ", or try --dtype float32"
            raise UserError(f"the loss on --data {config.data} is {loss}; check the model's weights{remedy}")

    runtime.together(check)
    return losses | {"val/perplexity": perplexity(loss)}


def _answer(
    config: ValidateConfig, generator: Generator, dialogues: Sequence[_Dialogue], world: runtime.World
) -> list[dict[str, Any]]:
    """Generate an answer to each dialogue and classify it; every rank gets all of them, in file order."""
    # Prompts of similar length share a batch, which keeps padding small; longest first, so that memory fails early.
    order = sorted(range(len(dialogues)), key=lambda row: -len(dialogues[row].tokens))[world.rank :: world.size]
    answered = []
    runtime.seed_step(config.seed, 0, world.rank)
    with tqdm(total=len(order), desc="answers", unit=" rows", disable=None if world.is_main else True) as bar:
        for start in range(0, len(order), config.batch_size):
            members = order[start : start + config.batch_size]
            texts = generator([dialogues[row].tokens for row in members])
            for row, text in zip(members, texts, strict=True):
                dialogue, answer = dialogues[row], classify_answer(text, with_thinking=config.with_thinking)
                repeated = None if answer.question is None else normalize(answer.question) in dialogue.asked
                result = {"row": row, "prompt_tokens": len(dialogue.tokens), "answer": text}
                answered.append(result | {"in_form": answer.in_form, "kind": answer.kind, "repeated": repeated})
            bar.update(len(members))
    return sorted((row for part in runtime.gather_objects(answered) for row in part), key=lambda row: row["row"])
