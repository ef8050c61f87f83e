"""Every flag of every command, defined once: name, type, default, meaning."""

from dsft.config.checkpoint import CheckpointConfig
from dsft.config.games import EnvironmentFlags, GenerateConfig, PromptFlags, ValidateConfig
from dsft.config.merge import MergeConfig
from dsft.config.pipeline import PipelineConfig
from dsft.config.preview import PreviewConfig
from dsft.config.report import ReportConfig
from dsft.config.train import EVERY_EPOCH, TrainConfig

__all__ = [
    "EVERY_EPOCH",
    "CheckpointConfig",
    "EnvironmentFlags",
    "GenerateConfig",
    "MergeConfig",
    "PipelineConfig",
    "PreviewConfig",
    "PromptFlags",
    "ReportConfig",
    "TrainConfig",
    "ValidateConfig",
]
