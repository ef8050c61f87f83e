"""The model card of a merged model (README.md in the Hub's format): base model, training, results."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dsft.checkpointing.state import TrainerState, read_command, read_flags, read_state
from dsft.config.games import TUNED
from dsft.config.sources import read_sources
from dsft.config.values import value_text
from dsft.errors import UserError
from dsft.files import write_text
from dsft.model.embedded import HUB_NAME, LICENSE
from dsft.model.embedded import NAME as EMBEDDED
from dsft.reporting.document import Block, Mono, as_markdown, fenced, heading, paragraph, table
from dsft.reporting.eval_reports import EvalReport, result_tables

HYPERPARAMETERS = (
    "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "lr", "betas",
    "weight_decay", "warmup_ratio", "schedule", "min_lr_ratio", "clip_grad", "train_batch_size", "max_length",
    "truncation", "fold", "total_epochs", "seed", "dtype",
)  # fmt: skip
RESULTS = "## Results: "
COMMAND = "The training command; absolute paths are shortened to their last name:"


def model_card(checkpoint: Path, base_name: str, base_path: str, *, name: str, place: str, dtype: str) -> ModelCard:
    """The card of a LoRA checkpoint merged into its base. It says less if the checkpoint's own files say less.

    The adapter calls the base `base_name`; `base_path` is its local folder, or its name on the Hub. The merged model
    is called `name`, and from_pretrained loads it from `place`.
    """
    base, licence = _lineage(base_name, base_path)
    flags, state, command = _origin(checkpoint)
    losses = _losses(flags, state)
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dsft", "sft", "lora", "text-generation"],
        model_name=name if losses else None,
        eval_results=losses,
        **licence | ({"base_model_relation": "finetune"} if base else {}),
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
        *_training(flags, state, command),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{as_markdown(blocks)}")


def name_of(folder: Path) -> str:
    """The name of a merged model without a repository: its folder's, or its run's for a folder called merged."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "merged" else folder.name


def add_results(folder: Path, eval_reports: Sequence[EvalReport]) -> None:
    """Add reports of a merged model, and of those it is compared with, to its card, in place of earlier ones."""
    path = folder / REPOCARD_NAME
    if not path.is_file() or not eval_reports:
        return
    card = ModelCard.load(path)
    reports = [replace(report, model=_public(report.model), values=_public(report.values)) for report in eval_reports]
    own = [result for report in reports if report.model == TUNED for result in _results(report)]
    kept = [r for r in card.data.eval_results or [] if r.dataset_type not in {result.dataset_type for result in own}]
    if own:
        card.data.eval_results = [*kept, *own]
        card.data.model_name = card.data.model_name or name_of(folder)
    text = card.text.partition(f"\n{RESULTS}")[0].rstrip("\n")
    card.text = f"{text}\n\n{as_markdown(result_tables(reports, several=False))}"
    write_text(path, str(card))


def _public(value: Any) -> Any:
    """A value without this machine's folders: of absolute paths, the last name."""
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or ".." in Path(value).parts):
        return Path(value).name or value
    return value


def _lineage(base_name: str, base_path: str) -> tuple[str | None, dict[str, Any]]:
    """The base's name on the Hub, and the licence fields of its card.

    A base in a local folder has no name on the Hub; then it is the base that its own card names.
    """
    if base_name == EMBEDDED:
        return HUB_NAME, {"license": LICENSE}
    card = _card_of(base_path)
    licence = {field: card[field] for field in ("license", "license_name", "license_link") if card.get(field)}
    if "license" not in licence:
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
    name = value_text(licence["license"])
    if name == "unknown":
        return "Licence: unknown. The base model has no card that names one; check before you share this model."
    return f"Licence: {licence.get('license_name', name)}, according to the base model's card."


def _origin(checkpoint: Path) -> tuple[dict[str, Any], TrainerState | None, str | None]:
    """Public flags, state and command of the run; an adapter that is not a checkpoint of dsft has none."""
    flags, state, command = {}, None, None
    with suppress(UserError):
        flags = _public(read_flags(checkpoint))
    with suppress(UserError):
        state = read_state(checkpoint)
    with suppress(ValueError):  # somebody has edited it
        command = _public_command(read_command(checkpoint.resolve().parent) or "")
    return flags, state, command


def _public_command(command: str) -> str:
    """A command whose words name none of this machine's folders, alone, after a flag's = or in a list."""
    words = [re.split(r"([=,'\"\[\](){}]+\s*)", word) for word in shlex.split(command)]
    return shlex.join("".join(map(_public, parts)) for parts in words)


def _training(flags: dict[str, Any], state: TrainerState | None, command: str | None) -> list[Block]:
    rows = [(name, value_text(flags[name])) for name in HYPERPARAMETERS if flags.get(name) is not None]
    if state is not None:
        rows += [
            ("steps", f"{state.step} of {state.total_steps}, {state.epoch:.4g} epochs"),
            ("backend", f"{state.backend}, ranks: {state.world_size}"),
            ("val/loss", "none" if state.val_loss is None else f"{state.val_loss:.6f}"),
            ("versions", ", ".join(f"{key} {value}" for key, value in state.versions.items())),
        ]
    blocks: list[Block] = [table(("setting", "value"), [tuple(map(Mono, row)) for row in rows])] if rows else []
    if state is not None:
        files = value_text(flags.get("train_files") or "unknown")
        loss_text = "The loss is the mean negative log-likelihood per response token."
        blocks.append(paragraph(f"Rows: {files}; fingerprint of the tokenised rows: {state.data}. {loss_text}"))
    return blocks + ([paragraph(COMMAND), fenced(command, "bash")] if command else [])


def _losses(flags: dict[str, Any], state: TrainerState | None) -> list[EvalResult] | None:
    if state is None or state.val_loss is None or not math.isfinite(state.val_loss):
        return None
    sources = read_sources(list(map(str, flags.get("val_files") or [])), "val_files")
    files = [source.name or Path(path).stem for source in sources for path in source.paths] or ["validation"]
    values = [("loss", "Validation loss", state.val_loss)]
    with suppress(OverflowError):
        values.append(("perplexity", "Perplexity", math.exp(state.val_loss)))
    return [_result(", ".join(files), "validation", *value) for value in values]


def _results(report: EvalReport) -> list[EvalResult]:
    values = report.values
    if report.is_game:
        interval = " to ".join(f"{bound:.4f}" for bound in values["success_interval"])
        name = f"Success rate, {values['episodes']} levels, 95 % interval {interval}"
        return [_result(report.task, "levels of other seeds", "success_rate", name, values["success_rate"])]
    figures = [("well_formed_rate", "Well formed answers", values["well_formed_rate"])]
    if isinstance(values["val/loss"], float) and math.isfinite(values["val/loss"]):
        figures.insert(0, ("loss", "Loss", values["val/loss"]))
    return [_result(Path(report.task).stem, "test", *figure) for figure in figures]


def _result(dataset: str, split: str, kind: str, name: str, value: float) -> EvalResult:
    """One figure for the Hub's model-index. A dataset's type is its id on the Hub; local data gets a slug."""
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
