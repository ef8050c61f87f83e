"""LoRA by PEFT, the same for every backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import nn

from dsft.errors import UserError, did_you_mean
from dsft.text import one_line

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraOptions:
    """See the flags of the same names."""

    rank: int
    alpha: float
    dropout: float
    target_modules: Sequence[str]
    use_rslora: bool
    use_dora: bool


def add_lora(model: nn.Module, options: LoraOptions, base_name: str) -> PeftModel:
    """Wrap a model; its own weights are frozen, the LoRA weights are float32 (they are the master weights).

    Raises:
        UserError: a target that matches no module, with those available.
    """
    targets: Any = ALL_LINEAR
    if list(options.target_modules) != [ALL_LINEAR]:
        names = [name for name, _ in model.named_modules()]
        linear = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        for target in options.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                meant = did_you_mean(target, {*linear, ALL_LINEAR} - {target})
                raise UserError(
                    f"target_modules: '{target}' matches no module{meant}; "
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
        raise UserError(
            f"target_modules {','.join(options.target_modules)}: {one_line(error)}; name linear modules"
        ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    return wrapped  # type: ignore[return-value]


def adapter_tensors(model: PeftModel, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Trained tensors by parameter name, renamed as PEFT reads them from adapter_model.safetensors."""
    return get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
