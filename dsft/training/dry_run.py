"""--dry_run: one forward and backward pass of the longest micro-batch, and a report."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsft.backends.base import Backend
from dsft.dataset.micro_batches import MicroBatches
from dsft.distributed import runtime
from dsft.files import guard_disk, write_text
from dsft.loss import TargetHead, summed_loss
from dsft.planning.plan import Needs
from dsft.planning.prediction import longest_micro_batch
from dsft.training.data import RunData
from dsft.units import GIB, gib

REPORT = "dry_run.json"


@dataclass(frozen=True)
class DryRun:
    """What a dry run has found.

    needs: memory as predicted, time by the pass
    loss: of the micro-batches, summed over ranks
    measured: peak memory of the largest rank, bytes
    """

    needs: Needs
    loss: float
    measured: float

    def lines(self) -> list[str]:
        """For the console."""
        predicted = self.needs.memory
        return [
            f"dry run  one forward and backward pass of {predicted.tokens:,} tokens; no weight has changed",
            f"measured {gib(self.measured)} per rank, {gib(predicted.before_first_step)} predicted for this pass "
            f"({predicted.before_first_step / self.measured - 1:+.0%}), {gib(predicted.peak)} for the run",
            f"time     {self.needs.time_text(by='by this pass')}",
        ]

    def write(self, folder: Path) -> None:
        """The report, as JSON.

        Raises:
            UserError: it cannot be written.
        """
        predicted = self.needs.memory
        values = {"tokens": predicted.tokens, "measured_bytes": self.measured}
        values |= {"predicted_bytes": predicted.before_first_step} | self.needs.as_dict()
        path = folder / REPORT
        guard_disk(lambda: write_text(path, json.dumps(values, indent=2) + "\n"), path)


def dry_run(
    backend: Backend,
    head: TargetHead,
    data: RunData,
    micro_batches: MicroBatches,
    needs: Needs,
    world: runtime.World,
    device: torch.device,
) -> DryRun:
    """Take the step with the longest micro-batch up to that one's backward pass. Every rank takes part."""
    plan, place, _ = longest_micro_batch(micro_batches, data.train.lengths, data.batches)
    batch = micro_batches.make(plan.parts[world.rank][place]).to(device)
    backend.model.train()
    started = time.perf_counter()
    loss = summed_loss(backend.model, head, batch)
    backend.backward(loss / plan.weight, last_micro_batch=True)
    [total] = runtime.sum_over_ranks([loss.item()], device)
    seconds = time.perf_counter() - started
    measured = max(runtime.gather_objects(runtime.peak_memory_gib(device) * GIB))
    tokens = sum(runtime.gather_objects(batch.input_ids.numel()))
    flops = plan.flops * tokens / max(1, plan.tokens)  # of the step's, the share that was computed
    return DryRun(replace(needs, step_seconds=needs.step_flops / flops * seconds), total, measured)
