"""LoRA's initial weights, drawn from (seed, layer name)."""

import hashlib
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from dsft.model.library_internals import reset_lora


class LoraInitializer:
    """PEFT's own initialization of LoRA, drawn from (seed, layer name) alone.

    So the weights are the same whether a backend builds the model whole or layer by layer. Calling it with a module
    initializes the LoRA layers in it that have their base weights, each once.
    """

    def __init__(self, model: PeftModel, seed: int) -> None:
        self._names: dict[Any, str] = {
            layer: name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        self._seed = seed

    def __call__(self, module: nn.Module) -> None:
        layers: list[Any] = [layer for layer in module.modules() if layer in self._names]
        for layer in layers:
            weight = layer.get_base_layer().weight
            if weight.is_meta:
                continue
            digest = hashlib.sha256(f"{self._seed} {self._names.pop(layer)}".encode()).digest()
            with torch.random.fork_rng():
                torch.manual_seed(int.from_bytes(digest[:8], "big"))
                reset_lora(layer, weight)
