"""The rows of a run: loaded, separated, and in the order in which they are trained on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dsft.config import TrainConfig
from dsft.config.train import VAL_LOSS
from dsft.dataset.batches import GlobalBatches
from dsft.dataset.leaks import separate
from dsft.dataset.tokens import TokenDataset, load_dataset
from dsft.distributed import runtime
from dsft.planning.plan import order_rows


@dataclass(frozen=True)
class RunData:
    """The same on all ranks.

    train, val: rows as token ids; val is None where nothing is validated
    batches: which training rows form each step
    total_steps: of the run
    leak_text: what --on_leak has left out, in one line; empty where nothing
    """

    train: TokenDataset
    val: TokenDataset | None
    batches: GlobalBatches
    total_steps: int
    leak_text: str

    @property
    def sets(self) -> list[TokenDataset]:
        """Training rows, and validation rows if there are any."""
        return [data for data in (self.train, self.val) if data is not None]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(data.lengths.max()) for data in self.sets)


def load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, world: runtime.World, warn: Callable[[str], None]
) -> RunData:
    """Make the rows into tokens, or find them in the cache, and separate training from validation. On every rank.

    Raises:
        UserError: faults in the files or their rows, on the rank that says so; PeerFailedError on the others.
    """

    def load(names: list[str], flag: str, max_rows: int | None) -> TokenDataset:
        return runtime.on_first_local_rank(
            world,
            lambda: load_dataset(names, flag, tokenizer, config, max_rows=max_rows, show_progress=world.is_main),
        )

    train = load(config.train_files, "train_files", config.max_train_rows)
    val = load(config.val_files, "val_files", config.max_val_rows) if config.val_files else None
    runtime.check_same_everywhere(
        "\n".join([train.fingerprint, val.fingerprint if val else "none"]),
        "the rows of --train_files or --val_files",
        "give all machines the same files and model",
    )
    for name, data in (("train_files", train), ("val_files", val)):
        if world.is_main and data is not None and (text := data.counts.ignored_text()):
            warn(f"--{name}: {text}")
    separation = runtime.on_main(world, lambda: separate(train, val, config, warn))
    train, val = separation.apply(train, val)
    batches = runtime.together(lambda: order_rows(train, config))
    if val is not None and config.best_by != VAL_LOSS:
        validate = {f"{VAL_LOSS}/{val.sources[index]}" for index in np.unique(val.source)}
        if config.best_by not in validate:
            remedy = "raise --val_fraction" if config.val_fraction else "change --on_leak or --truncation"
            runtime.fail_together(f"best_by is {config.best_by}, but no row of that source validates; {remedy}")
    total_steps = config.total_training_steps or batches.first_step(config.total_epochs)
    return RunData(train, val, batches, total_steps, separation.text)
