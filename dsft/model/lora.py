"""LoRA by PEFT, wrapped alike for every backend."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from dsft.errors import UserError, did_you_mean

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraOptions:
    """Shape of LoRA; see the flags of the same names."""

    rank: int
    alpha: float
    dropout: float
    target_modules: Sequence[str]
    use_rslora: bool
    use_dora: bool


def add_lora(model: nn.Module, options: LoraOptions, base_name: str) -> PeftModel:
    """Wrap a model; its own weights are frozen, the LoRA weights are float32 (they are the master weights).

    Raises:
        UserError: a target that matches no module, with those that could be matched.
    """
    if list(options.target_modules) == [ALL_LINEAR]:
        targets: Any = ALL_LINEAR
    else:
        linear = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        names = [name for name, _ in model.named_modules()]
        known = {*linear, ALL_LINEAR}
        for target in options.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise UserError(
                    f"target_modules: '{target}' matches no module{did_you_mean(target, known - {target})}; "
                    f"linear modules: {', '.join(linear)}, or all-linear"
                )
        targets = list(options.target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=targets,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    try:
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"target_modules {','.join(options.target_modules)}: {reason}; name linear modules") from error
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    return wrapped  # type: ignore[return-value]


class LoraStart:
    """Gives LoRA its initial weights: PEFT's own initialisation, drawn from (seed, layer name) alone.

    So they are the same whether a backend builds the model whole or layer by layer. Calling it with a module
    starts the LoRA layers within it whose base weights are there and which were not started before.
    """

    def __init__(self, model: PeftModel, seed: int) -> None:
        self._waiting: dict[nn.Module, str] = {
            module: name  # type: ignore[misc]
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self._seed = seed

    def __call__(self, module: nn.Module) -> None:
        for layer in [layer for layer in module.modules() if layer in self._waiting]:
            assert isinstance(layer, LoraLayer)
            weight: Any = layer.get_base_layer().weight
            if weight.is_meta:
                continue
            name = self._waiting.pop(layer)
            was_skeleton = any(parameter.is_meta for parameter in layer.parameters())
            if was_skeleton:
                for part in layer.adapter_layer_names:
                    getattr(layer, part).to_empty(device=weight.device)
            with torch.random.fork_rng():
                digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big"))
                layer.reset_lora_parameters("default", True)
            if was_skeleton:
                _start_magnitudes(layer, weight)


def _start_magnitudes(layer: LoraLayer, weight: torch.Tensor) -> None:
    """DoRA's magnitudes: for each output the norm of the base weights that lead to it.

    PEFT computes them while it wraps, when a skeleton has no weights yet. LoRA's B is zero at the start, so the
    norm is that of the base weight alone (Liu et al. 2024, DoRA, equation 5). PEFT's own function knows how the
    weight lies (GPT-2's is transposed) and rounds to its dtype.
    """
    magnitudes: Any = layer.lora_magnitude_vector
    for magnitude in magnitudes.values():
        with torch.no_grad():
            magnitude.weight.copy_(magnitude.get_weight_norm(weight, lora_weight=weight.new_zeros(()), scaling=0.0))


def adapter_tensors(model: PeftModel, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Trained tensors by parameter name -> the names that PEFT reads from adapter_model.safetensors."""
    return get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
