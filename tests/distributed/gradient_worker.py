"""A command: one training step with SGD instead of AdamW, so that the change of the weights is the gradient.

Arguments: OUT.safetensors, then flags of dsft.train.
"""

import sys
from itertools import chain, islice

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dsft.backends.base import PARAMETER, trainable
from dsft.cli import parse
from dsft.config import TrainConfig
from dsft.distributed.runtime import StopSignals, run_to_exit
from dsft.training.trainer import Trainer
from tests.helpers import seeded_tensor

RATE = 1024.0  # a power of two, large against rounding of the weights


class SgdTrainer(Trainer):
    """A Trainer whose step subtracts RATE times the gradient."""

    def _make_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=RATE)

    def start_from_seeded_lora(self):
        """LoRA's B is initialized to zero, which would make A's gradient zero."""
        shapes = {name: tensor.shape for name, tensor in self.parameters().items()}

        def read(kind, name, start, stop):
            values = seeded_tensor(name, shapes[name]).flatten()[start:stop]
            return values if kind == PARAMETER else torch.zeros_like(values)

        self.backend.load_state(read, 0)

    def parameters(self):
        """Whole parameters by name, gathered from all ranks. SGD has no moments."""
        parts = islice(self.backend.state(), len(trainable(self.model)))
        mine = [(part.name, part.shape, part.start, part.values.clone()) for part in parts]
        everywhere = [None] * self.world.size
        dist.all_gather_object(everywhere, mine)
        whole = {}
        for name, shape, start, values in chain(*everywhere):
            whole.setdefault(name, torch.full(shape, float("nan"))).view(-1)[start : start + len(values)] = values
        return whole


def work():
    output, *flags = sys.argv[1:]
    trainer = SgdTrainer(parse(TrainConfig, flags))
    if trainer.config.lora_rank:
        trainer.start_from_seeded_lora()
    before = trainer.parameters()
    if trainer.config.backend == "zero3":  # a GPU allocates the whole bucket
        assert trainer.backend._zero.reduce_bucket_size == sum(values.numel() for values in before.values())
    trainer._step(StopSignals())
    gradients = {name: (before[name] - after) / RATE for name, after in trainer.parameters().items()}
    if trainer.world.is_main:
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, output)
    trainer.backend.close()


def main():
    run_to_exit(work, debug=False)
