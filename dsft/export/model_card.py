"""The card of a merged model, README.md in the Hub's format: where it comes from, how it was made, what it reaches."""

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dsft.checkpointing.state import TrainerState, read_flags, read_state
from dsft.errors import UserError
from dsft.files import write_text
from dsft.model.embedded import HUB_NAME, LICENSE
from dsft.model.embedded import NAME as EMBEDDED
from dsft.reporting.document import Block, Mono, as_markdown, fenced, heading, paragraph, table
from dsft.reporting.eval_reports import TUNED, Judgement, tables
from dsft.reporting.runs import listed, training_command

HYPERPARAMETERS = (
    "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "lr", "betas",
    "weight_decay", "warmup_ratio", "schedule", "min_lr_ratio", "clip_grad", "train_batch_size", "max_length",
    "truncation", "fold", "total_epochs", "seed", "dtype",
)  # fmt: skip
PLAYED = "## Results: "
COMMAND = "The training command, with the names of files and folders where their whole paths were given:"


def model_card(checkpoint: Path, base_name: str, base_path: str, *, name: str, place: str, dtype: str) -> ModelCard:
    """The card of a LoRA checkpoint merged into its base.

    Args:
        checkpoint: that was merged.
        base_name: of the base, as the adapter names it.
        base_path: where the base was loaded from: its folder, or its name on the Hub.
        name: of the merged model.
        place: what from_pretrained takes to load it.
        dtype: of the merged weights.

    Returns:
        A card whose metadata huggingface_hub reads back. It says less where the checkpoint's own files say less.
    """
    base, licence = _lineage(base_name, base_path)
    flags, state = _origin(checkpoint)
    losses = _losses(flags, state)
    fields = licence | ({"base_model_relation": "finetune"} if base else {})
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dsft", "sft", "lora", "text-generation"],
        model_name=name if losses else None,
        eval_results=losses,
        **fields,
    )
    blocks: list[Block] = [
        heading(1, name),
        paragraph(
            f"{flags.get('model', _public(base_name))}, fine-tuned with LoRA by dsft and merged: the adapter of "
            f"{checkpoint.name} is added to the base model's weights, which are {dtype.removeprefix('torch.')} here."
        ),
        paragraph(_licence_words(licence)),
        heading(2, "Use"),
        fenced(
            "from transformers import pipeline\n\n"
            f"generate = pipeline('text-generation', model={place!r})\n"
            "generate([{'role': 'user', 'content': '…'}])",
            "python",
        ),
        heading(2, "Training"),
        *_training(flags, state),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{as_markdown(blocks)}")


def name_of(folder: Path) -> str:
    """What a merged model is called that has no repository: after its folder, or what that is the merged model of."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "merged" else folder.name


def add_results(folder: Path, judgements: Sequence[Judgement]) -> None:
    """Add what a merged model has reached to its card; what was added before is replaced.

    Args:
        folder: of the merged model.
        judgements: of this model, of others beside it.
    """
    path = folder / REPOCARD_NAME
    if not path.is_file() or not judgements:
        return
    card = ModelCard.load(path)
    judgements = [
        replace(j, player=_public(j.player), report=j.report | {"settings": _public(j.report["settings"])})
        for j in judgements
    ]
    own = [result for j in judgements if j.player == TUNED for result in _reached(j)]
    kept = [r for r in card.data.eval_results or [] if r.dataset_type not in {result.dataset_type for result in own}]
    if own:
        card.data.eval_results = [*kept, *own]
        card.data.model_name = card.data.model_name or name_of(folder)
    text = card.text.partition(f"\n{PLAYED}")[0].rstrip("\n")
    card.text = f"{text}\n\n{as_markdown(tables(judgements, several=False))}"
    write_text(path, str(card))


def _public(value: Any) -> Any:
    """A flag's value as others may read it: of paths that tell where this machine keeps its files, the last name."""
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or ".." in Path(value).parts):
        return Path(value).name or value
    return value


def _lineage(base_name: str, base_path: str) -> tuple[str | None, dict[str, Any]]:
    """The base's name on the Hub, and the licence fields, as far as its own card or name says them.

    A base in a local folder has no name there; what its card names as its base is the closest model that has one.
    """
    if base_name == EMBEDDED:
        return HUB_NAME, {"license": LICENSE}
    card = _card_of(base_path)
    fields = {field: card.get(field) for field in ("license", "license_name", "license_link")}
    licence = {field: value for field, value in fields.items() if value}
    if not licence.get("license"):
        licence = {"license": "unknown"}
    if not Path(base_path).exists():
        return base_name, licence
    above = card.get("base_model")
    return above if _is_hub_name(above) else None, licence


def _is_hub_name(name: Any) -> bool:
    with suppress(HFValidationError):
        validate_repo_id(name)
        return isinstance(name, str) and "/" in name
    return False


def _card_of(base_path: str) -> dict[str, Any]:
    """Metadata of a base model's card; empty where there is none that can be read."""
    place = Path(base_path) / REPOCARD_NAME if Path(base_path).exists() else base_path
    with suppress(Exception):  # no card, no network, no YAML: the merge does not depend on it
        return dict(ModelCard.load(place, ignore_metadata_errors=True).data.to_dict())
    return {}


def _licence_words(licence: dict[str, Any]) -> str:
    name = listed(licence["license"])
    if name == "unknown":
        return "Licence: unknown. The base model comes without a card that names one; look before you pass this on."
    return f"Licence: {licence.get('license_name', name)}, as the base model's card says."


def _origin(checkpoint: Path) -> tuple[dict[str, Any], TrainerState | None]:
    """Public flags and state of the run; an adapter that is no checkpoint of dsft has neither."""
    flags: dict[str, Any] = {}
    state = None
    with suppress(UserError):
        flags = _public(read_flags(checkpoint))
    with suppress(UserError):
        state = read_state(checkpoint)
    return flags, state


def _training(flags: dict[str, Any], state: TrainerState | None) -> list[Block]:
    blocks: list[Block] = []
    rows = [(Mono(name), Mono(listed(flags[name]))) for name in HYPERPARAMETERS if flags.get(name) is not None]
    if state is not None:
        val_loss = "none" if state.val_loss is None else f"{state.val_loss:.6f}"
        rows += [
            (Mono("steps"), Mono(f"{state.step} of {state.total_steps}, {state.epoch:.4g} epochs")),
            (Mono("backend"), Mono(f"{state.backend}, ranks: {state.world_size}")),
            (Mono("val/loss"), Mono(val_loss)),
            (Mono("versions"), Mono(", ".join(f"{key} {value}" for key, value in state.versions.items()))),
        ]
    if rows:
        blocks.append(table(("setting", "value"), rows))
    files = listed(flags.get("train_files") or [])
    if state is not None:
        rows_text = f"Rows: {files or 'unknown'}; fingerprint of the tokenised rows: {state.data}."
        loss_text = "The loss is the mean negative log-likelihood per response token."
        blocks.append(paragraph(f"{rows_text} {loss_text}"))
    command = training_command(flags, state.world_size if state is not None else 1) if flags else None
    if command:
        blocks += [paragraph(COMMAND), fenced(command, "bash")]
    return blocks


def _losses(flags: dict[str, Any], state: TrainerState | None) -> list[EvalResult] | None:
    if state is None or state.val_loss is None or not math.isfinite(state.val_loss):
        return None
    files = [Path(str(file)).stem for file in flags.get("val_files") or []] or ["validation"]
    values = [("loss", "Validation loss", state.val_loss)]
    with suppress(OverflowError):
        values.append(("perplexity", "Perplexity", math.exp(state.val_loss)))
    return [_result(", ".join(files), "validation", *value) for value in values]


def _reached(judgement: Judgement) -> list[EvalResult]:
    report = judgement.report
    if judgement.is_game:
        interval = " to ".join(f"{bound:.4f}" for bound in report["success_interval"])
        name = f"Success rate, {report['episodes']} levels, 95 % interval {interval}"
        return [_result(judgement.task, "levels of other seeds", "success_rate", name, report["success_rate"])]
    values = [("well_formed_rate", "Well formed answers", report["well_formed_rate"])]
    if isinstance(report["val/loss"], float) and math.isfinite(report["val/loss"]):
        values.insert(0, ("loss", "Loss", report["val/loss"]))
    return [_result(Path(judgement.task).stem, "test", *value) for value in values]


def _result(dataset: str, split: str, kind: str, name: str, value: float) -> EvalResult:
    """One figure, as the Hub's model-index has it. A dataset's type is its id there, which a local file has not."""
    slug = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "local"
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=slug,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=kind,
        metric_name=name,
        metric_value=json.loads(json.dumps(value)),
    )
