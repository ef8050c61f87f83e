"""Flags of dsft.train."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dsft.config.flags import CommonFlags, ModelFlags, RowFlags, flag, too_small
from dsft.errors import UserError, did_you_mean

EVERY_EPOCH = "epoch"
Interval = int | Literal["epoch"]


@dataclass(kw_only=True)
class TrainConfig(RowFlags, ModelFlags, CommonFlags):
    """Fine-tune a causal language model on parquet rows."""

    backend: Literal["fsdp", "zero3"] = flag("fsdp", section="Sharding")
    """Sharding library: fsdp (PyTorch FSDP2) or zero3 (DeepSpeed ZeRO-3). The numbers are the same."""
    gradient_checkpointing: bool | Literal["auto"] = flag("auto")
    """Recompute activations in the backward pass: auto does so in as many layers as the longest row needs to fit."""
    cpu_offload: bool = flag(False)
    """Keep parameters and optimizer state in CPU memory between uses."""

    train_files: list[str] = flag(required=True, section="Files")
    """Parquet: a file, a comma-separated list, a glob, or a folder."""
    val_files: list[str] | None = flag(None)
    """Parquet for the validation loss, written as train_files."""
    val_fraction: float | None = flag(None, run_identity=True)
    """Without val_files: validate on this share of the training rows, split off by whole dialogues and the seed."""
    on_leak: Literal["warn", "error", "drop_val", "drop_train", "ignore"] = flag("warn", run_identity=True)
    """Validation rows that stand in the training rows too, or share a dialogue or level: drop leaves out one side's."""
    max_train_rows: int | None = flag(None, run_identity=True)
    """Use the first N training rows only."""
    max_val_rows: int | None = flag(None)
    """Use the first N validation rows only."""

    lora_rank: int = flag(64, section="LoRA", run_identity=True)
    """Rank of the LoRA matrices; 0 is full fine-tuning."""
    lora_alpha: float = flag(32.0, run_identity=True)
    """LoRA scale: the update is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = flag(0.0, run_identity=True)
    """Dropout before the LoRA matrices."""
    target_modules: list[str] = flag(["all-linear"], run_identity=True)
    """Modules that get LoRA: all-linear (all but the head), or names such as q_proj,v_proj."""
    use_rslora: bool = flag(False, run_identity=True)
    """Scale by lora_alpha / sqrt(lora_rank) instead (rank-stabilised LoRA)."""
    use_dora: bool = flag(False, run_identity=True)
    """Weight-decomposed LoRA: a trained magnitude per output beside the direction."""

    train_batch_size: int = flag(128, section="Optimization", run_identity=True)
    """Rows per optimizer step, over all ranks. The last batch of an epoch may be smaller; no row is dropped."""
    max_tokens_per_micro_batch: int | None = flag(None)
    """Tokens per forward pass on one rank; changes memory and speed, not the numbers. Default: by model and memory."""
    fold: Literal["batch", "off"] = flag("batch", run_identity=True)
    """batch draws whole dialogues into a batch and computes what its rows have in common once; off shuffles rows."""
    lr: float = flag(1e-4, run_identity=True)
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = flag((0.9, 0.95), run_identity=True)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = flag(0.01, run_identity=True)
    """AdamW's decoupled weight decay, on every trained parameter."""
    warmup_ratio: float = flag(0.1, run_identity=True)
    """Share of all steps over which the learning rate rises linearly."""
    schedule: Literal["cosine", "linear", "constant"] = flag("cosine", run_identity=True)
    """Learning rate after the warmup."""
    min_lr_ratio: float = flag(0.0, run_identity=True)
    """The schedule ends at lr times this."""
    clip_grad: float = flag(1.0, run_identity=True)
    """Clip the global gradient norm to this; 0 turns clipping off."""
    total_epochs: int = flag(1, run_identity=True)
    """Passes over the training rows."""
    total_training_steps: int | None = flag(None, run_identity=True)
    """Stop after this many optimizer steps instead; the schedule ends there too."""
    seed: int = flag(1, run_identity=True)
    """Seed of LoRA's initial weights, the order of rows and dropout."""
    deterministic: bool = flag(False)
    """Refuse kernels whose results vary from run to run (slower on CUDA)."""

    output_dir: str = flag(required=True, section="Output")
    """Folder of the run: config.yaml, metrics.jsonl and checkpoints."""
    dry_run: bool = flag(False)
    """Do everything up to the first step, and a forward and backward pass of the longest micro-batch; then report."""
    validate_before_training: bool = flag(False)
    """Compute the validation loss before the first step too."""
    eval_steps: Interval = flag(EVERY_EPOCH)
    """Validate every N steps, each "epoch", or 0 for never; also at every checkpoint, so that best is known."""
    save_steps: Interval = flag(EVERY_EPOCH)
    """Save every N steps, each "epoch", or 0 for never; the last step is always saved."""
    max_checkpoints: int | None = flag(None)
    """Keep the newest N checkpoints, and best and latest whatever their age."""
    save_seconds: int | None = flag(None)
    """Also save when this many seconds have passed since the last checkpoint, at the end of the running step."""
    async_save: bool = flag(False)
    """Write checkpoints in the background while training goes on; takes the memory of one more copy of the state."""
    stop_after_steps: int | None = flag(None)
    """End with a checkpoint after step N of the run; the schedule stays that of the whole run, a resume goes on."""
    resume: str = flag("auto")
    """auto goes on from the latest checkpoint in output_dir, never refuses to, a path names a checkpoint."""
    resume_override: list[str] | None = flag(None)
    """Flags that may differ from those of the run that is resumed, such as lr,total_epochs; else that is refused."""
    init_from: str | None = flag(None, run_identity=True)
    """Start from the weights of a checkpoint, of a run's best one, or of a merged model, with a fresh optimizer."""
    logger: list[str] = flag(["console"])
    """Any of console, wandb, tensorboard; metrics.jsonl is always written."""
    project_name: str = flag("dsft")
    """Project in wandb."""
    experiment_name: str | None = flag(None)
    """Name of the run in wandb and tensorboard; the output folder's name by default."""
    ds_config: str | None = flag(None)
    """A DeepSpeed JSON file whose settings go over those of ds_configs/zero3.json (zero3 only)."""

    def check(self) -> None:
        """Raise UserError with every problem that can be seen without reading data or model."""
        problems = too_small(self, 0, "lora_rank", "weight_decay", "clip_grad", "seed")
        problems += too_small(self, 1, "max_length", "train_batch_size", "max_tokens_per_micro_batch", "total_epochs")
        problems += too_small(self, 1, "max_train_rows", "max_val_rows", "total_training_steps", "max_checkpoints")
        problems += too_small(self, 1, "save_seconds", "stop_after_steps")
        for name in ("lr", "lora_alpha"):
            if getattr(self, name) <= 0:
                problems.append(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout must be 0 or more and below 1, got {self.lora_dropout}")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must each be 0 or more and below 1, got {self.betas}")
        if self.val_fraction is not None:
            if not 0 < self.val_fraction < 1:
                problems.append(f"val_fraction must be above 0 and below 1, got {self.val_fraction}")
            given = [f"--{name}" for name in ("val_files", "max_val_rows") if getattr(self, name) is not None]
            if given:
                problems.append(f"val_fraction splits --train_files; drop it, or {' and '.join(given)}")
        for name in ("eval_steps", "save_steps"):
            value = getattr(self, name)
            if value != EVERY_EPOCH and value < 0:
                problems.append(f'{name} must be a number of steps, "epoch", or 0 for never, got {value}')
        if self.lora_rank == 0 and (self.use_dora or self.use_rslora or self.lora_dropout):
            problems.append("use_dora, use_rslora and lora_dropout need lora_rank above 0, got lora_rank=0")
        if not self.target_modules:
            problems.append("target_modules is empty; name modules, or all-linear")
        identity = {*self.run_identity(), "train_files"}
        for name in set(self.resume_override or []) - identity:
            problems.append(f"resume_override: {name} is not compared on resume{did_you_mean(name, identity)}")
        unknown = [name for name in self.logger if name not in ("console", "wandb", "tensorboard")]
        if unknown:
            problems.append(f"logger must be any of console, wandb, tensorboard, got {', '.join(unknown)}")
        if self.ds_config is not None and self.backend != "zero3":
            problems.append(f"ds_config is for --backend zero3, got --backend {self.backend}; drop one of them")
        if self.messages_key is not None and self.with_thinking:
            problems.append("with_thinking needs prompt and response columns; it cannot be combined with messages_key")
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            problems.append(f"output_dir {self.output_dir} is a file; name a folder")
        if problems:
            raise UserError("\n".join(problems))

    def run_identity(self) -> dict[str, Any]:
        """The values that define the run: a resume with others would be another run."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["run_identity"]}

    @staticmethod
    def is_same_run(name: str, before: Any, after: Any) -> bool:
        """Whether two values of a flag in `run_identity` define the same run: on_leak may only change what is said."""
        if name == "on_leak":
            return (before == "drop_train") == (after == "drop_train")
        return bool(before == after)
