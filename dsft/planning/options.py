"""What flags mean to those who read none: the backend and LoRA."""

import torch

from dsft.backends import backend_class
from dsft.backends.base import BackendOptions, RunSettings
from dsft.config import TrainConfig
from dsft.model.lora import LoraOptions


def backend_options(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> BackendOptions:
    """For the backend of --backend.

    Raises:
        UserError: the file of --ds_config cannot be used, or contradicts a flag.
    """
    settings = RunSettings(config.train_batch_size, config.clip_grad, dtype)
    return BackendOptions(
        device=device,
        dtype=dtype,
        trains_base=config.lora_rank == 0,
        clip_grad=config.clip_grad,
        cpu_offload=config.cpu_offload,
        library_config=backend_class(config.backend).read_library_config(config.ds_config, settings),
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
