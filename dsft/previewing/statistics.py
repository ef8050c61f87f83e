"""Statistics of a set of rows as training would take them: lengths, padding, folding, steps."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from dsft.config import TrainConfig
from dsft.dataset.batches import GlobalBatches
from dsft.dataset.micro_batches import MicroBatches, Plan
from dsft.dataset.tokens import SourceStatistics, TokenDataset
from dsft.planning.plan import RunPlan

MAX_BINS = 12
MAX_PLANNED = 64  # steps of the first epoch that are planned; of a longer epoch they are a sample


@dataclass(frozen=True)
class Bin:
    """Rows with `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class SetStatistics:
    """Of one set.

    rows, tokens, targets: as trained on, after truncation
    target_share: targets to tokens
    shortest, longest, mean, median: tokens per row, after truncation
    lengths: histogram before truncation
    conversations and all up to `ignored`: see Counts
    sources: of the named sources
    duplicates: rows with the tokens and targets of an earlier row
    padding: share of padding if batches were drawn row by row, each padded to its longest row
    padding_to_max_length: the same if each row were padded to max_length
    """

    rows: int
    tokens: int
    targets: int
    target_share: float
    shortest: int
    longest: int
    mean: float
    median: float
    lengths: list[Bin]
    conversations: int
    split_conversations: int
    split_rows: int
    conversations_text: str
    rows_cut: int
    tokens_cut: int
    rows_dropped: int
    tokens_dropped: int
    rows_without_weight: int
    ignored: dict[str, int]
    format: str
    sources: list[SourceStatistics]
    duplicates: int
    padding: float
    padding_to_max_length: float


def set_statistics(data: TokenDataset, whole_lengths: np.ndarray, config: TrainConfig) -> SetStatistics:
    """Of rows as trained on, and the tokens of every row before truncation, int64 [rows]."""
    lengths, counts = data.lengths, data.counts
    batches = GlobalBatches(np.arange(len(data)), data.sorted_place, config.train_batch_size, config.seed).epoch(0)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return SetStatistics(
        **asdict(counts),
        conversations_text=counts.conversations_text(),
        sources=data.source_statistics(),
        target_share=counts.targets / counts.tokens,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        lengths=histogram(whole_lengths),
        duplicates=len(data) - len(np.unique(data.row_hash)),
        padding=1 - counts.tokens / padded,
        padding_to_max_length=1 - counts.tokens / (len(data) * config.max_length),
    )


def histogram(lengths: np.ndarray, max_bins: int = MAX_BINS) -> list[Bin]:
    """Bins from the shortest to the longest row (int64 [rows]), all as wide: 1, 2 or 5 times a power of ten."""
    low, high = int(lengths.min()), int(lengths.max())
    widths = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < max_bins)
    first = low // width
    counts = np.bincount(lengths // width - first)
    return [Bin((first + i) * width, (first + i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]


@dataclass(frozen=True)
class Folding:
    """How many times fewer tokens are computed than the rows have; 1 is no folding.

    trees: where the model's attention takes prefix trees
    chains: where only rows that continue each other are folded
    used: trees, chains or off: what training does with these flags and this model
    why: the reason, where it is not trees
    """

    trees: float
    chains: float
    used: str
    why: str = ""


@dataclass(frozen=True)
class Batches:
    """Optimizer steps.

    steps_first_epoch, steps: their number
    rows, tokens, targets: of a step before folding, mean
    ranks, micro_batches: of a step on each rank, mean of the planned steps
    computed_per_rank: tokens that a rank computes in a step, after folding, mean of ranks and planned steps
    imbalance: by how much the slowest rank exceeds the mean, of the planned steps
    token_budget: most tokens in a micro-batch
    planned: steps of the first epoch that were planned for these means and the folding
    """

    steps_first_epoch: int
    steps: int
    rows: float
    tokens: float
    targets: float
    ranks: int
    micro_batches: float
    computed_per_rank: float
    imbalance: float
    token_budget: int
    planned: int


def batches_and_folding(
    data: TokenDataset, order: GlobalBatches, plan: RunPlan, total_steps: int
) -> tuple[Batches, Folding]:
    """What the steps of a run consist of, from the rows as trained on and their order.

    Raises:
        UserError: a row is longer than the token budget.
    """
    in_epoch, rows = order.first_step(1), np.concatenate(order.epoch(0))
    planned = np.unique(np.linspace(0, in_epoch - 1, min(in_epoch, MAX_PLANNED)).astype(int))
    folding, plans = fold_ratios(data, [order[step] for step in planned], plan)
    ranks = plan.micro_batches.ranks
    batches = Batches(
        steps_first_epoch=in_epoch,
        steps=total_steps,
        rows=len(rows) / in_epoch,
        tokens=float(data.lengths[rows].sum()) / in_epoch,
        targets=float(data.targets[rows].sum()) / in_epoch,
        ranks=ranks,
        micro_batches=float(np.mean([len(p.parts[0]) for p in plans])),
        computed_per_rank=float(np.mean([p.tokens for p in plans])) / ranks,
        imbalance=sum((1 + p.imbalance) * p.flops for p in plans) / sum(p.flops for p in plans) - 1,
        token_budget=plan.micro_batches.token_budget,
        planned=len(planned),
    )
    return batches, folding


def fold_ratios(data: TokenDataset, batches: Sequence[np.ndarray], plan: RunPlan) -> tuple[Folding, list[Plan]]:
    """What folding saves in these batches (int64 [rows] each), and how training lays them out."""
    used = "off" if not plan.micro_batches.fold else "trees" if plan.micro_batches.trees else "chains"
    layouts = {
        "trees": replace(plan.micro_batches, fold=True, trees=True),
        "chains": replace(plan.micro_batches, fold=True, trees=False),
    }
    ratios: dict[str, float] = {}
    used_plans: list[Plan] = []
    for name, layout in (layouts | {used: plan.micro_batches}).items():
        planner = MicroBatches(data, layout, plan.cost, None)
        plans = [planner.plan(batch) for batch in batches]
        ratios[name] = sum(p.row_tokens for p in plans) / sum(p.tokens for p in plans)
        if name == used:
            used_plans = plans
    reason = "--fold off" if used == "off" else plan.tree_unsupported_reason or ""
    return Folding(ratios["trees"], ratios["chains"], used, reason), used_plans
