"""LoRA's initial weights, drawn from (seed, layer name)."""

import hashlib
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


class LoraInitializer:
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
                _initialize_magnitudes(layer, weight)


def _initialize_magnitudes(layer: LoraLayer, weight: torch.Tensor) -> None:
    """DoRA's magnitudes: for each output the norm of the base weights that lead to it.

    PEFT computes them while it wraps, when a skeleton has no weights yet. LoRA's B is zero at the start, so the
    norm is that of the base weight alone (Liu et al. 2024, DoRA, equation 5). PEFT's own function knows how the
    weight lies (GPT-2's is transposed) and rounds to its dtype.
    """
    magnitudes: Any = layer.lora_magnitude_vector
    for magnitude in magnitudes.values():
        with torch.no_grad():
            magnitude.weight.copy_(magnitude.get_weight_norm(weight, lora_weight=weight.new_zeros(()), scaling=0.0))
