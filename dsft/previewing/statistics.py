"""Figures of a set of rows as training would take them: lengths, padding, folding, batches, truncation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsft.dataset.batches import GlobalBatches
from dsft.dataset.folding import common_prefix
from dsft.dataset.micro_batches import MicroBatches
from dsft.dataset.tokens import TokenDataset
from dsft.planning.plan import RunPlan

MOST_BINS = 12
MOST_PLANNED = 64  # batches of the first epoch that are laid out to know their folding; more are sampled
BAR = 40  # characters of the histogram's longest bar


@dataclass(frozen=True)
class Bin:
    """Rows with `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Truncation:
    """What max_length does to the rows.

    too_long: rows with more tokens than max_length
    longest: tokens of the longest row
    answers_cut: rows that lose targets, but not all
    dropped: rows that are left out
    lost: rows that are left out because no target of theirs would be left; all of the dropped ones but for drop
    example: number of the first row that is dropped or loses targets, else of the first that is too long
    """

    too_long: int
    longest: int
    answers_cut: int
    dropped: int
    lost: int
    example: int | None


@dataclass(frozen=True)
class Figures:
    """Of one set.

    rows, tokens, targets: as trained on, after truncation
    target_share: targets to tokens
    shortest, longest, mean, median: tokens of a row, after truncation
    lengths: histogram before truncation
    rows_cut, tokens_cut, rows_dropped, tokens_dropped: by truncation
    duplicates: rows whose tokens and targets are those of an earlier row
    padding: share of padding, if the rows of a batch were drawn one by one and each padded to the longest of the batch
    padding_to_max_length: the same, if each were padded to max_length
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
    rows_cut: int
    tokens_cut: int
    rows_dropped: int
    tokens_dropped: int
    duplicates: int
    padding: float
    padding_to_max_length: float


@dataclass(frozen=True)
class Folding:
    """How many times fewer tokens are computed than the rows have; 1 is no folding.

    trees: where the model's attention takes trees
    chains: where only rows that continue each other are folded
    used: trees, chains or off: what training with these flags and this model does
    why: the reason, where it is not trees
    """

    trees: float
    chains: float
    used: str
    why: str = ""

    @property
    def ratio(self) -> float:
        """Of what is used."""
        return {"trees": self.trees, "chains": self.chains}.get(self.used, 1.0)


@dataclass(frozen=True)
class Batches:
    """The arithmetic of steps.

    steps_first_epoch, steps: optimizer steps
    rows: mean rows of a step
    tokens, targets: means of a step's rows, before folding
    ranks, micro_batches: of a step on each rank, mean of the planned ones
    token_budget: most tokens in a micro-batch
    planned: steps of the first epoch that were laid out for these means and the folding
    """

    steps_first_epoch: int
    steps: int
    rows: float
    tokens: float
    targets: float
    ranks: int
    micro_batches: float
    token_budget: int
    planned: int


def figures(data: TokenDataset, whole_lengths: np.ndarray, batch_size: int, max_length: int, seed: int) -> Figures:
    """The figures of a set.

    Args:
        data: the rows as trained on.
        whole_lengths: tokens of every row before truncation, int64 [rows].
        batch_size: rows of a step.
        max_length: the flag.
        seed: of the order of rows.
    """
    lengths, counts = data.lengths, data.counts
    batches = GlobalBatches(np.arange(len(data)), data.sorted_place, batch_size, seed).epoch(0)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return Figures(
        rows=len(data),
        tokens=counts.tokens,
        targets=counts.targets,
        target_share=counts.targets / counts.tokens,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        lengths=histogram(whole_lengths),
        rows_cut=counts.rows_cut,
        tokens_cut=counts.tokens_cut,
        rows_dropped=counts.rows_dropped,
        tokens_dropped=counts.tokens_dropped,
        duplicates=count_duplicates(data),
        padding=1 - counts.tokens / padded,
        padding_to_max_length=1 - counts.tokens / (len(data) * max_length),
    )


def histogram(lengths: np.ndarray, most: int = MOST_BINS) -> list[Bin]:
    """At most so many bins from the shortest to the longest row, of one width: 1, 2 or 5 times a power of ten.

    Args:
        lengths: tokens of each row, int64 [rows], one at least.
        most: bins.
    """
    low, high = int(lengths.min()), int(lengths.max())
    widths = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width + 1 <= most)
    first = low // width
    counts = np.bincount(lengths // width - first)
    return [Bin((first + i) * width, (first + i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]


def histogram_lines(bins: Sequence[Bin]) -> list[str]:
    """The histogram as text, a line a bin; a bin with a row or more has a bar."""
    most = max(b.rows for b in bins)
    ends = [f"{b.low:,}" if b.low == b.high else f"{b.low:,} to {b.high:,}" for b in bins]
    width = max(map(len, ends))
    counts = max(len(f"{b.rows:,}") for b in bins)
    return [
        f"{end:>{width}}  {b.rows:>{counts},}  {'█' * math.ceil(BAR * b.rows / most)}".rstrip()
        for end, b in zip(ends, bins, strict=True)
    ]


def count_duplicates(data: TokenDataset) -> int:
    """Rows whose tokens and targets are those of an earlier row."""
    seen: set[bytes] = set()
    repeated = 0
    order = np.argsort(data.sorted_place)
    for place, row in enumerate(order):
        tokens, is_target = data[row]
        if place and not _same(data[order[place - 1]][0], tokens):
            seen.clear()  # rows of the same tokens are neighbours
        key = is_target.tobytes()
        repeated += key in seen
        seen.add(key)
    return repeated


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return len(first) == len(second) and common_prefix(first, second) == len(first)


def truncation(whole_lengths: np.ndarray, prompt_lengths: np.ndarray, max_length: int, how: str) -> Truncation:
    """What a length would do to rows.

    Args:
        whole_lengths: tokens of every row, int64 [rows].
        prompt_lengths: tokens before the first target of every row, int64 [rows].
        max_length: the flag.
        how: the flag --truncation.
    """
    too_long = whole_lengths > max_length
    lost = cut = np.zeros(len(whole_lengths), bool)
    if how == "right":  # at least one target must follow a token that predicts it
        lost = too_long & (np.maximum(prompt_lengths, 1) >= max_length)
        cut = too_long & ~lost
    elif how == "left":
        lost = too_long & (whole_lengths - prompt_lengths >= max_length)
    dropped = too_long if how in ("drop", "error") else lost
    worst = dropped | cut if (dropped | cut).any() else too_long
    example = int(np.argmax(worst)) if worst.any() else None
    return Truncation(
        int(too_long.sum()), int(whole_lengths.max()), int(cut.sum()), int(dropped.sum()), int(lost.sum()), example
    )


def batches_and_folding(
    data: TokenDataset, order: GlobalBatches, plan: RunPlan, total_steps: int
) -> tuple[Batches, Folding]:
    """How training would lay out its steps.

    Args:
        data: the rows as trained on.
        order: of these rows.
        plan: of the run.
        total_steps: of the run.

    Raises:
        UserError: a row is longer than the token budget.
    """
    in_epoch = order.first_step(1)
    planned = np.unique(np.linspace(0, in_epoch - 1, min(in_epoch, MOST_PLANNED)).astype(int))
    folding, parts = fold_ratios(data, [order[step] for step in planned], plan)
    batches = Batches(
        steps_first_epoch=in_epoch,
        steps=total_steps,
        rows=len(data) / in_epoch,
        tokens=data.counts.tokens / in_epoch,
        targets=data.counts.targets / in_epoch,
        ranks=plan.micro_batches.ranks,
        micro_batches=parts / len(planned),
        token_budget=plan.micro_batches.token_budget,
        planned=len(planned),
    )
    return batches, folding


def fold_ratios(data: TokenDataset, batches: Sequence[np.ndarray], plan: RunPlan) -> tuple[Folding, int]:
    """How much folding saves in these batches (int64 [rows] each), and their micro-batches on each rank in all."""
    used = "off" if not plan.micro_batches.fold else "trees" if plan.micro_batches.trees else "chains"
    ratios, parts = {}, 0
    for name, fold, trees in (
        ("trees", True, True),
        ("chains", True, False),
        ("off", False, plan.micro_batches.trees),
    ):
        if name == "off" and used != "off":
            continue
        micro_batches = MicroBatches(data, replace(plan.micro_batches, fold=fold, trees=trees), plan.cost, None)
        plans = [micro_batches.plan(batch) for batch in batches]
        ratios[name] = sum(plan.row_tokens for plan in plans) / sum(plan.tokens for plan in plans)
        if name == used:
            parts = sum(len(plan.parts[0]) for plan in plans)
    why = "--fold off" if used == "off" else plan.tree_unsupported_reason or ""
    return Folding(ratios["trees"], ratios["chains"], used, why), parts
