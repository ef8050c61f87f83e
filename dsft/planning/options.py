"""What flags mean to those who read none: the backend and LoRA."""

import torch

from dsft.backends.base import BackendOptions
from dsft.config import TrainConfig
from dsft.model.lora import LoraOptions


def backend_options(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> BackendOptions:
    """What the flags say to a backend."""
    return BackendOptions(
        device=device,
        dtype=dtype,
        trains_base=config.lora_rank == 0,
        clip_grad=config.clip_grad,
        train_batch_size=config.train_batch_size,
        cpu_offload=config.cpu_offload,
        config_file=config.ds_config,
    )


def lora_options(config: TrainConfig) -> LoraOptions | None:
    """None where everything is trained."""
    if not config.lora_rank:
        return None
    return LoraOptions(
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.target_modules,
        config.use_rslora,
        config.use_dora,
    )
