"""Memory that will run out, or has: one line with settings to try."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dsft.config import TrainConfig
from dsft.errors import UserError
from dsft.planning.plan import Needs
from dsft.planning.prediction import TOO_HIGH
from dsft.text import one_line
from dsft.units import gib

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc", "not enough memory")


def refuse(needs: Needs) -> None:
    """Raise UserError if a run would run out of memory even where the prediction is too high by its stated error."""
    if needs.memory.peak / (1 + TOO_HIGH) > needs.available:
        raise UserError(
            f"the run needs {gib(needs.memory.peak)} per rank by prediction, and {gib(needs.available)} are available; "
            f"try {', '.join(needs.remedies)}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system, the allocator or the GPU has refused memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in OUT_OF_MEMORY)


@contextmanager
def out_of_memory(config: TrainConfig, remedies: Callable[[], list[str]]) -> Iterator[None]:
    """Turn an allocation that fails within into a UserError; `remedies` gives flags to try, if some are known."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if config.debug or not is_out_of_memory(error):
            raise
        smaller = ["a lower --max_tokens_per_micro_batch"]
        smaller += ["--gradient_checkpointing True"] if config.gradient_checkpointing is not True else []
        smaller += ["--dtype bfloat16"] if config.dtype != "bfloat16" else []
        smaller += ["--lora_rank 16"] if not config.lora_rank else []
        remedy = ", ".join(remedies() or [*smaller, "more ranks"])
        reason = one_line(error)[:160]
        raise UserError(f"out of memory ({type(error).__name__}: {reason}); try {remedy}") from error
