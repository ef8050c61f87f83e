"""The private names and internals of libraries that dsft.model uses: torch 2.13, transformers 5.23, peft 0.21."""

from typing import Any

import torch


def has_attention_interface(model: Any) -> bool:
    """Whether a transformers model looks its attention up in AttentionInterface."""
    return getattr(model, "_supports_attention_backend", False)


def softmax_backward(gradient: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Gradient of the input of a softmax over the last dimension, given those of its output, and the output."""
    return torch.ops.aten._softmax_backward_data(gradient, output, -1, output.dtype)


def reset_lora(layer: Any, base_weight: torch.Tensor) -> None:
    """PEFT's own initialization of a LoraLayer, from torch's random state; a layer on the meta device first leaves it.

    PEFT computes DoRA's magnitudes when it wraps the model; a model on the meta device has no weights then. They are
    the norms of the base weight per output, because LoRA's B starts at zero (Liu et al. 2024, DoRA, equation 5). PEFT's
    own function knows the orientation of the weight (GPT-2's is transposed) and rounds to its dtype.
    """
    was_meta = any(parameter.is_meta for parameter in layer.parameters())
    if was_meta:
        for part in layer.adapter_layer_names:
            getattr(layer, part).to_empty(device=base_weight.device)
    layer.reset_lora_parameters("default", True)
    if was_meta:
        with torch.no_grad():
            for dora in layer.lora_magnitude_vector.values():
                zero = base_weight.new_zeros(())
                dora.weight.copy_(dora.get_weight_norm(base_weight, lora_weight=zero, scaling=0.0))
