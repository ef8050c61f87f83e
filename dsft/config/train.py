"""Flags of dsft.train."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dsft.config.flags import CommonFlags, ModelFlags, RowFlags, flag
from dsft.config.sources import read_sources
from dsft.errors import UserError, did_you_mean

EVERY_EPOCH = "epoch"
VAL_LOSS = "val/loss"
Interval = int | Literal["epoch"]


@dataclass(kw_only=True)
class TrainConfig(RowFlags, ModelFlags, CommonFlags):
    """Fine-tune a causal language model on rows of prompt and response, or on conversations."""

    backend: Literal["fsdp", "zero3"] = flag("fsdp", section="Sharding")
    """Sharding library: fsdp (PyTorch FSDP2) or zero3 (DeepSpeed ZeRO-3). Losses and gradients are the same."""
    sharding: Literal["auto", "full", "hybrid", "trainable"] = flag("auto")
    """full shards all parameters over all ranks, hybrid over those of a node, trainable only those that are trained."""
    gradient_checkpointing: bool | Literal["auto"] = flag("auto")
    """Recompute activations in the backward pass; auto does it in as many layers as the longest row needs to fit."""
    cpu_offload: bool = flag(False)
    """Keep parameters and optimizer state in CPU memory while they are not used."""

    train_files: list[str] = flag(required=True, section="Files")
    """Training data: files, globs, folders, hf://datasets/…, comma-separated; NAME=PATH*WEIGHT is one of a mixture."""
    val_files: list[str] | None = flag(None)
    """Validation data, in the same form as train_files, without weights; each named source has a loss of its own."""
    val_fraction: float | None = flag(None, run_identity=True, must_be="above 0 and below 1")
    """Without val_files: validate on this fraction of the training rows, split off by whole dialogues with the seed."""
    on_leak: Literal["warn", "error", "drop_val", "drop_train", "ignore"] = flag("warn", run_identity=True)
    """Validation rows that are also training rows, or share a dialogue or level with one; drop_… skips that side's."""
    max_train_rows: int | None = flag(None, run_identity=True, must_be="1 or more")
    """Use only the first N training rows, of each source."""
    max_val_rows: int | None = flag(None, must_be="1 or more")
    """Use only the first N validation rows, of each source."""

    lora_rank: int = flag(64, section="LoRA", run_identity=True, must_be="0 or more")
    """LoRA rank; 0 is full fine-tuning."""
    lora_alpha: float = flag(32.0, run_identity=True, must_be="above 0")
    """LoRA scaling: updates are multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = flag(0.0, run_identity=True, must_be="0 or more and below 1")
    """Dropout probability of the LoRA layers' input."""
    target_modules: list[str] = flag(["all-linear"], run_identity=True)
    """Modules to apply LoRA to: all-linear (all linear layers but the head), or names such as q_proj,v_proj."""
    use_rslora: bool = flag(False, run_identity=True)
    """Rank-stabilized LoRA: scale by lora_alpha / sqrt(lora_rank) instead."""
    use_dora: bool = flag(False, run_identity=True)
    """Weight-decomposed LoRA (DoRA): train a magnitude per output in addition to the direction."""

    train_batch_size: int = flag(128, section="Optimization", run_identity=True, must_be="1 or more")
    """Rows per optimizer step over all ranks. The last batch of an epoch may be smaller; no row is dropped."""
    max_tokens_per_micro_batch: int | None = flag(None, must_be="1 or more")
    """Tokens per forward pass and rank; affects memory and speed only. By default chosen from model and memory."""
    fold: Literal["batch", "off"] = flag("batch", run_identity=True)
    """Shared-prefix packing: batch keeps dialogues together and computes shared prefixes once; off shuffles rows."""
    lr: float = flag(1e-4, run_identity=True, must_be="above 0")
    """Peak learning rate (AdamW)."""
    betas: tuple[float, float] = flag((0.9, 0.95), run_identity=True)
    """AdamW's beta1 and beta2."""
    weight_decay: float = flag(0.01, run_identity=True, must_be="0 or more")
    """AdamW's weight decay, applied to every trained parameter."""
    warmup_ratio: float = flag(0.1, run_identity=True, must_be="between 0 and 1")
    """Fraction of all steps used for a linear warmup of the learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = flag("cosine", run_identity=True)
    """Learning rate schedule after the warmup."""
    min_lr_ratio: float = flag(0.0, run_identity=True, must_be="between 0 and 1")
    """Final learning rate of the schedule, as a fraction of lr."""
    clip_grad: float = flag(1.0, run_identity=True, must_be="0 or more")
    """Maximum global gradient norm; 0 turns clipping off."""
    total_epochs: int = flag(1, run_identity=True, must_be="1 or more")
    """Number of passes over the training rows."""
    total_training_steps: int | None = flag(None, run_identity=True, must_be="1 or more")
    """Number of optimizer steps; overrides total_epochs, and the schedule ends there."""
    seed: int = flag(1, run_identity=True, must_be="0 or more")
    """Seed of the initial LoRA weights, the order of rows, and dropout."""
    deterministic: bool = flag(False)
    """Use deterministic kernels only (slower on CUDA)."""

    output_dir: str = flag(required=True, section="Output")
    """Output folder of the run: config.yaml, metrics.jsonl and checkpoints."""
    dry_run: bool = flag(False)
    """Prepare the run, try a forward and backward pass of the longest micro-batch, report memory and time, and exit."""
    validate_before_training: bool = flag(False)
    """Also compute the validation loss before the first step."""
    eval_steps: Interval = flag(EVERY_EPOCH, must_be='a number of steps, "epoch", or 0 for never')
    """Validate every N steps, every "epoch", or 0 for never; each checkpoint is validated as well, to find the best."""
    save_steps: Interval = flag(EVERY_EPOCH, must_be='a number of steps, "epoch", or 0 for never')
    """Save a checkpoint every N steps, every "epoch", or 0 for never; the last step is always saved."""
    best_by: str = flag("val/loss", run_identity=True)
    """Metric whose lowest value marks the best checkpoint: val/loss, or val/loss/NAME of one source."""
    max_checkpoints: int | None = flag(None, must_be="1 or more")
    """Keep only the newest N checkpoints; best and latest are never deleted."""
    save_seconds: int | None = flag(None, must_be="1 or more")
    """Also save at the end of a step once this many seconds have passed since the last checkpoint."""
    async_save: bool = flag(False)
    """Write checkpoints in the background during training; needs memory for one more copy of the state."""
    stop_after_steps: int | None = flag(None, must_be="1 or more")
    """Save and exit after step N; the schedule is still that of the whole run, and the same command resumes it."""
    resume: str = flag("auto")
    """auto resumes from the latest checkpoint in output_dir; never refuses to; or the path of a checkpoint."""
    resume_override: list[str] | None = flag(None)
    """Flags whose values may differ from those of the resumed run, such as lr,total_epochs."""
    init_from: str | None = flag(None, run_identity=True)
    """Start from the weights of a checkpoint, a run (its best checkpoint) or a merged model, with a new optimizer."""
    logger: list[str] = flag(["console"])
    """Any of console, wandb and tensorboard; metrics.jsonl is always written."""
    project_name: str = flag("dsft")
    """Project name in wandb."""
    experiment_name: str | None = flag(None)
    """Run name in wandb and tensorboard; by default the name of the output folder."""
    ds_config: str | None = flag(None)
    """DeepSpeed JSON file whose settings override those of ds_configs/zero3.json (zero3 only)."""

    def problems(self) -> Iterator[str]:
        if not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas must each be 0 or more and below 1, got {self.betas}"
        given = [f"--{name}" for name in ("val_files", "max_val_rows") if getattr(self, name) is not None]
        if self.val_fraction is not None and given:
            yield f"val_fraction splits --train_files; drop it, or {' and '.join(given)}"
        if self.lora_rank == 0 and (self.use_dora or self.use_rslora or self.lora_dropout):
            yield "use_dora, use_rslora and lora_dropout need lora_rank above 0, got lora_rank=0"
        if not self.target_modules:
            yield "target_modules is empty; name modules, or all-linear"
        identity = {*self.run_identity(), "train_files"}
        for name in set(self.resume_override or []) - identity:
            yield f"resume_override: {name} is not compared on resume{did_you_mean(name, identity)}"
        if unknown := [name for name in self.logger if name not in ("console", "wandb", "tensorboard")]:
            yield f"logger must be any of console, wandb, tensorboard, got {', '.join(unknown)}"
        if self.ds_config is not None and self.backend != "zero3":
            yield f"ds_config is for --backend zero3, got --backend {self.backend}; drop one of them"
        yield from self.row_problems()
        yield from self._source_problems()
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            yield f"output_dir {self.output_dir} is a file; name a folder"

    def _source_problems(self) -> Iterator[str]:
        validates = self.val_files is not None or self.val_fraction is not None
        try:
            train, val = (read_sources(getattr(self, f) or [], f) for f in ("train_files", "val_files"))
        except UserError as error:
            yield str(error)
            return
        if weighted := [source.name for source in val if source.weight != 1]:
            yield f"val_files has weights, of {', '.join(weighted)}; they are for train_files, so leave them out"
        names = [source.name for source in (train if self.val_fraction is not None else val) if source.name]
        known = [VAL_LOSS, *(f"{VAL_LOSS}/{name}" for name in names)] if validates else [VAL_LOSS]
        if self.best_by not in known:
            hint = did_you_mean(self.best_by, known) or "; sources are named in --val_files, as NAME=PATH"
            yield f"best_by must be one of {', '.join(known)}, got {self.best_by}{hint}"

    def run_identity(self) -> dict[str, Any]:
        """The values that define the run: with others, a resume would be a different run."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["run_identity"]}

    @staticmethod
    def is_same_run(name: str, before: Any, after: Any) -> bool:
        """Whether two values of a `run_identity` flag define the same run: on_leak may change what is printed."""
        if name == "on_leak":
            return (before == "drop_train") == (after == "drop_train")
        return bool(before == after)
