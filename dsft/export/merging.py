"""Merges a LoRA checkpoint into its base model, and verifies the result."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsft.checkpointing.folder import ADAPTER, find_checkpoint
from dsft.checkpointing.models import resolve_model
from dsft.checkpointing.tensor_files import TensorReader
from dsft.config import MergeConfig
from dsft.errors import UserError
from dsft.export.model_card import model_card, name_of
from dsft.files import is_refusal, make_readable, reason
from dsft.model.source import ModelSource, load_tokenizer
from dsft.text import one_line

FLOAT32_TOLERANCE = 1e-3  # measured: 1e-5 on the embedded model
# Rounding weights to 16 bits: 0.06 to 0.41 in runs of the embedded model. The float32 sum is verified separately.
ROUNDED_TOLERANCE = 1.0
PROMPTS = (
    "What is the capital of France?",
    "I have had a headache for three days. What should I do?",
    "Write one sentence about the sea.",
)


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how it compares with base + adapter.

    largest_difference: of a logit of the reloaded model
    relative_difference: the same over the standard deviation of base + adapter's logits
    """

    output: Path
    checkpoint: Path
    merged_weights: int
    largest_difference: float
    relative_difference: float
    tolerance: float


def merge(config: MergeConfig) -> MergeReport:
    """Merge, write to a temporary folder, verify, and only then rename it.

    Raises:
        UserError: bad input, or a result that fails verification; then nothing is left behind.
    """
    checkpoint = find_checkpoint(config.checkpoint, "checkpoint")
    given = Path(config.checkpoint).expanduser()
    run = given if given.resolve() != checkpoint else checkpoint.parent
    output = Path(config.output).expanduser() if config.output else run / "merged"
    if output.exists():
        raise UserError(f"{output} exists and is not overwritten; choose another --output, or remove it")
    base_name = config.base or _base_of(checkpoint)
    path = resolve_model(base_name)
    source = ModelSource(path, trust_remote_code=config.trust_remote_code)
    source.check()
    tokenizer = load_tokenizer(str(checkpoint), trust_remote_code=config.trust_remote_code)
    original = source.pretrained("auto")
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else original.dtype
    prompts = [_encode(tokenizer, prompt) for prompt in PROMPTS]
    unfinished = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model = _with_adapter(source.pretrained(torch.float32), checkpoint, base_name)
        expected = _logits(model, prompts)
        merged, targets = _merge_layers(model)
        unmerged = "the sum itself is wrong; use the checkpoint unmerged, by --adapter"
        _compare(_logits(merged, prompts), expected, FLOAT32_TOLERANCE, unmerged)
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(dtype)
        merged.save_pretrained(unfinished, max_shard_size=config.max_shard_size)
        tokenizer.save_pretrained(unfinished)
        repository = config.push_to_hub or config.hub_name
        place = repository or output.name  # no local path: the card may be published later
        name = repository.rpartition("/")[2] if repository else name_of(output)
        card = model_card(checkpoint, base_name, path, name=name, place=place, dtype=str(dtype))
        card.save(unfinished / "README.md")
        for file in unfinished.iterdir():
            make_readable(file)
        reloaded = ModelSource(str(unfinished)).pretrained(dtype)
        _check_weights(reloaded, merged, original, targets)
        default = FLOAT32_TOLERANCE if dtype == torch.float32 else ROUNDED_TOLERANCE
        tolerance = default if config.tolerance is None else config.tolerance
        remedy = f"rounding to {str(dtype).removeprefix('torch.')} moves them so far; merge with --dtype float32"
        largest, relative = _compare(_logits(reloaded.float(), prompts), expected, tolerance, remedy)
        unfinished.rename(output)
    except Exception as error:
        if isinstance(error, UserError) or not is_refusal(error):
            raise
        raise UserError(
            f"cannot write {output}: {reason(error)}; free some space, or choose another --output"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return MergeReport(output, checkpoint, len(targets), largest, relative, tolerance)


def _compare(
    ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, remedy: str
) -> tuple[float, float]:
    """Largest difference of a logit, absolute and relative to the standard deviation; refused beyond the tolerance."""
    differences = [float((our - theirs).abs().max()) for our, theirs in zip(ours, expected, strict=True)]
    largest, relative = max(differences), max(d / float(e.std()) for d, e in zip(differences, expected, strict=True))
    if not relative <= tolerance:
        raise UserError(
            f"the merged model's logits differ from base + adapter by {largest:.3g}, {relative:.3g} of their spread, "
            f"tolerance {tolerance:g}, so nothing was written; {remedy}"
        )
    return largest, relative


def _base_of(checkpoint: Path) -> str:
    config = checkpoint / "adapter_config.json"
    if not config.is_file():
        raise UserError(f"{checkpoint} contains no adapter; a fully fine-tuned model needs no merge, use it as it is")
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{config} is damaged ({error}); choose another checkpoint") from error
    if not name:
        raise UserError(f"{config} names no base model; set it with --base")
    return name


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """int64 [1, length]."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids: Any = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return torch.tensor([ids])


@torch.no_grad()
def _logits(model: nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """float32 [length, vocabulary] for each prompt, from a float32 model."""
    return [model(input_ids=ids, use_cache=False).logits[0] for ids in prompts]


def _with_adapter(base: Any, checkpoint: Path, base_name: str) -> PeftModel:
    """Base + adapter, all in float32."""
    TensorReader(checkpoint, ADAPTER)  # a damaged file is refused in one line
    try:
        return PeftModel.from_pretrained(base.float(), str(checkpoint)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        why = one_line(error)[:300]
        raise UserError(
            f"the adapter of {checkpoint} does not fit {base_name}: {why}; choose another --base"
        ) from error


def _merge_layers(model: PeftModel) -> tuple[Any, set[str]]:
    """The plain model with the adapter added to its weights in place, and the names of those weights."""
    wrapped: Any = model.base_model.model
    layers = [(name, layer) for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)]
    for _, layer in tqdm(layers, desc="merging", unit=" weights", disable=None):
        layer.merge(safe_merge=True)
    return model.unload(), {f"{name}.weight" for name, _ in layers}


def _check_weights(reloaded: nn.Module, merged: nn.Module, original: nn.Module, targets: set[str]) -> None:
    """Raise UserError unless the written weights are the merged ones, and exactly the targeted weights changed."""
    written, before = reloaded.state_dict(), original.state_dict()
    for name, weight in merged.state_dict().items():
        if not torch.equal(written[name], weight):
            raise UserError(
                f"{name} was not read back as it was written; the disk may be damaged, choose another --output"
            )
        same = torch.equal(weight, before[name].to(weight.dtype))
        if same and name in targets:
            raise UserError(
                f"{name} is a target of the adapter but did not change: the update is smaller than {weight.dtype} "
                "resolves, or was never trained; train longer, or merge with --dtype float32"
            )
        if not same and name not in targets:
            raise UserError(
                f"{name} changed, though the adapter does not target it, so nothing was written; is --base the model "
                "that the adapter was trained on?"
            )
