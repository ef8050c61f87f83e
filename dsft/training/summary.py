"""What a run prints at its start and at its end."""

import os
from pathlib import Path

import torch

from dsft.checkpointing.folder import CheckpointFolder
from dsft.checkpointing.state import TrainerState
from dsft.config import TrainConfig
from dsft.planning.plan import Needs, RunPlan
from dsft.training.data import RunData


def start_lines(
    config: TrainConfig,
    data: RunData,
    plan: RunPlan,
    needs: Needs,
    state: TrainerState,
    resumed: Path | None,
    device: torch.device,
    dtype: str,
) -> list[str]:
    """The start-up block, a line each."""
    train, val, ranks = data.train, data.val, plan.micro_batches.ranks
    block: list[tuple[str, str]] = [
        (
            "model",
            f"{config.model}, {plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.2f} M trained "
            f"({plan.trained / plan.parameters:.1%}), {dtype}",
        ),
        ("data", rows_text(len(train), train.counts.tokens, train.counts.targets, train.counts.losses())),
    ]
    block += [("", text) for text in (train.counts.format, train.counts.conversations_text()) if text]
    block += [("", str(source)) for source in train.source_statistics()]
    if val is not None:
        split = f", {config.val_fraction:g} of the rows by whole dialogues" if config.val_fraction else ""
        block.append(("val", rows_text(len(val), val.counts.tokens, val.counts.targets, val.counts.losses(), split)))
        block += [("", str(source)) for source in val.source_statistics()]
    if data.leak_text:
        block.append(("leaks", data.leak_text))
    block += [
        (
            "batch",
            f"{config.train_batch_size:,} rows on {ranks} rank{'' if ranks == 1 else 's'}, at most "
            f"{plan.micro_batches.token_budget:,} tokens per micro-batch; {needs.steps_per_epoch:,} steps per epoch, "
            f"{needs.total_steps:,} in all",
        ),
        ("fold", _fold_text(plan, needs.fold_ratio)),
        (
            "backend",
            f"{config.backend} on {device.type}{_network()}, {torch.get_num_threads()} threads per rank; "
            f"sharding {plan.sharding}" + (f" ({plan.sharding_reason})" if plan.sharding_reason else ""),
        ),
        ("output", config.output_dir),
        ("memory", needs.memory_text()),
    ]
    if not needs.fits:
        block.append(("", f"this is more than is available; try {', '.join(needs.remedies)}"))
    block.append(("time", needs.time_text(needs.total_steps - state.step)))
    if resumed is not None:
        ahead = f"resuming at step {state.step + 1}" if state.step < needs.total_steps else "already complete"
        block.append(("resumed", f"{resumed}, {ahead}"))
    return [f"{name:<8} {text}" for name, text in block]


def rows_text(rows: int, tokens: int, targets: int, losses: str, more: str = "") -> str:
    """Counts of a set of rows, and what truncation has cost."""
    return f"{rows:,} rows, {tokens:,} tokens, {targets:,} targets{more}" + (f"; {losses}" if losses else "")


def _network() -> str:
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    return f" over {interface}" if interface else ""


def _fold_text(plan: RunPlan, ratio: float) -> str:
    if not plan.micro_batches.fold:
        text = "off: rows are shuffled one by one, each computed by itself"
    elif plan.micro_batches.trees:
        text = "the rows of a dialogue share a batch, and their common prefixes are computed once"
    else:
        text = f"only rows that continue each other, because {plan.tree_unsupported_reason}"
    if plan.micro_batches.fold:
        text += f" ({ratio:.2f}x fewer tokens)"
    if plan.checkpointed_layers:
        text += f"; {plan.checkpointed_layers} layers recompute their activations"
    return text


def resume_hint(folder: CheckpointFolder) -> str:
    """What to do after the run has ended by the loss of a rank."""
    latest = folder.latest()
    return f"rerun the same command to resume from {latest}" if latest else "there is no checkpoint to resume from"


def end_lines(config: TrainConfig, folder: CheckpointFolder, state: TrainerState) -> list[str]:
    """What a finished run has reached, and the command that usually follows."""
    lines = []
    if (best := folder.best()) is not None:
        lines.append(f"best     {best.name}, {state.best_by} {state.best_loss:.6f}")
    if config.lora_rank:
        lines.append(f"merge    python -m dsft.merge --checkpoint {config.output_dir}")
    return lines
