"""Started by torchrun: one real training step with SGD for AdamW, so that the weights' change is the gradient.

torchrun … gradient_worker.py OUT.safetensors flags of dsft.train…
"""

import sys

import torch
from safetensors.torch import save_file

from dsft.cli import parse
from dsft.config import TrainConfig
from dsft.runtime import StopSignals, run_to_exit
from dsft.trainer import Trainer
from tests.helpers import seeded_tensor

RATE = 1024.0  # a power of two, large against rounding of the weights


class SgdTrainer(Trainer):
    """The Trainer, but a step subtracts RATE times the gradient."""

    def _make_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=RATE)

    def start_from_seeded_lora(self):
        """LoRA's B is zero at the start, and so would A's gradient be."""
        shapes = {name: tensor.shape for name, tensor in self.backend.named_trainable()}
        self.backend.load_state(
            lambda name: seeded_tensor(name, shapes[name]), lambda name, moment: torch.zeros(shapes[name]), 0
        )


def main():
    output, *flags = sys.argv[1:]
    trainer = SgdTrainer(parse(TrainConfig, flags))
    if trainer.config.lora_rank:
        trainer.start_from_seeded_lora()
    before = {name: tensor.clone() for name, tensor in trainer.backend.named_trainable()}
    trainer._step(StopSignals())
    gradients = {name: (before[name] - after) / RATE for name, after in trainer.backend.named_trainable()}
    if trainer.world.is_main:
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, output)
    trainer.backend.close()


run_to_exit(main, debug=False)
