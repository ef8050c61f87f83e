"""Flags of dsft.pipeline: its own, those that its steps share, and a section for each step."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dsft.config.flags import CommonFlags, ModelFlags, flag
from dsft.config.games import SCRIPTED_PLAYERS, EnvironmentFlags, GenerateConfig, PromptFlags, ValidateConfig
from dsft.config.merge import MergeConfig
from dsft.config.train import TrainConfig
from dsft.errors import did_you_mean

COMMANDS: dict[str, Any] = {
    "generate": GenerateConfig,
    "train": TrainConfig,
    "merge": MergeConfig,
    "validate": ValidateConfig,
}
STEPS = tuple(COMMANDS)
SHARED = {f.name for part in (EnvironmentFlags, PromptFlags, ModelFlags) for f in fields(part)} | {"debug"}
SET_BY_PIPELINE = {
    "generate": {"output_dir", "config"},
    "train": {"train_files", "val_files", "messages_key", "output_dir", "resume", "config", "backend"},
    "merge": {"checkpoint", "output", "config", "trust_remote_code"},
    "validate": {"adapter", "data", "levels", "exclude_levels", "output", "config", "with_thinking"},
}


@dataclass(kw_only=True)
class PipelineConfig(PromptFlags, EnvironmentFlags, ModelFlags, CommonFlags):
    """Generate expert data, train on it, merge the best checkpoint, and compare the result with its base by playing."""

    backend: Literal["fsdp", "zero3"] = flag("fsdp", section="Pipeline")
    """Sharding library of the training."""
    nproc: int = flag(1, must_be="1 or more")
    """Ranks of training and of playing with a model."""
    select: Literal["val_loss", "success_rate"] = flag("val_loss")
    """How the best checkpoint is chosen: by validation loss, or by playing the levels of test.parquet with each one."""
    force: Literal["generate", "train", "merge", "validate"] | None = flag(None)
    """Delete the results of this step and later ones, and continue from there."""
    output_dir: str = flag(required=True)
    """Folder of all results, report.html and report.md. Rerun the same command to continue with the remaining steps."""

    generate: dict[str, Any] = flag({}, section="Steps")
    """Flags of dsft.generate: --generate.train_size 1000, or a section in the YAML file."""
    train: dict[str, Any] = flag({})
    """Flags of dsft.train: --train.lr 1e-3, …"""
    merge: dict[str, Any] = flag({})
    """Flags of dsft.merge."""
    validate: dict[str, Any] = flag({})
    """Flags of dsft.validate: --validate.episodes 100, …"""

    def problems(self) -> Iterator[str]:
        yield from self.environment_problems(required=True)
        if self.model in SCRIPTED_PLAYERS:
            yield f"--model {self.model} plays without weights, so it cannot be trained; name a model"
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            yield f"output_dir {self.output_dir} is a file; name a folder"
        if self.select == "success_rate" and str(self.generate.get("test_size")) == "0":
            yield "--select success_rate plays the levels of test.parquet, got --generate.test_size 0"
        for step in STEPS:
            known = {f.name for f in fields(COMMANDS[step])}
            for name in getattr(self, step):
                if name not in known:
                    yield f"unknown flag --{step}.{name}{did_you_mean(name, known)}"
                elif name in SET_BY_PIPELINE[step] or (name in SHARED and step != "merge"):
                    own = f"; give --{name}" if name in {f.name for f in fields(self)} else ""
                    yield f"--{step}.{name} is set by the pipeline{own}"
