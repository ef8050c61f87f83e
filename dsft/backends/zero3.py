"""DeepSpeed ZeRO-3."""

import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from dsft.backends import deepspeed_internals as internals
from dsft.backends.base import (
    MOMENTS,
    PARAMETER,
    Backend,
    BackendOptions,
    HeldMemory,
    MakeOptimizer,
    MakeScheduler,
    Read,
    Source,
    StateSlice,
    decoder_layers,
    set_schedule,
    trainable,
)
from dsft.backends.ds_config import make_ds_config


class Zero3Backend(Backend):
    """DeepSpeed averages gradients over ranks and accumulation steps; both are undone to get plain sums."""

    library = "deepspeed"

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self.ds_config = make_ds_config(options)

    @classmethod
    def memory(cls, model: nn.Module, options: BackendOptions) -> HeldMemory:
        """What DeepSpeed allocates, by its settings under zero_optimization, for the parameters that it is given.

        - Partitions of all parameters in the compute dtype. On several ranks those below
          stage3_param_persistence_threshold are kept whole as well. With zero_hpz_partition_size there is a second
          partition, over so many ranks.
        - Of what is trained float32 masters, moments, and one flat buffer of gradients.
        - The reduce bucket, float32 as communication_data_type says. It is copied when it is reduced.
        - On several ranks parameters are fetched ahead until stage3_max_live_parameters are whole, by default those of
          two decoder layers. Those of one stage3_prefetch_bucket_size exist twice when they are cut out of the buffer
          in which they have arrived.
        - The optimizer steps through sub_group_size values at a time: a copy of their gradients, and two temporaries.
        - While the model loads, one decoder layer, or what is in none, is whole.
        """
        compute, ranks = options.dtype.itemsize, options.ranks
        zero = DeepSpeedZeroConfig(**_with_live_parameters(cls(options).ds_config["zero_optimization"], model))
        trained = set(trainable(model).values())
        given = [p for p in model.parameters() if p in trained or options.sharding != "trainable"]
        sizes = [p.numel() for p in given]
        count, learned, largest = sum(sizes), sum(p.numel() for p in trained), max(sizes)
        whole = sum(p.numel() for p in model.parameters()) - count
        layers = [set(layer.parameters()) for layer in decoder_layers(model)]
        groups = [*layers, set(model.parameters()).difference(*layers)]
        second = count / zero.zero_hpz_partition_size if zero.zero_hpz_partition_size > 1 else 0
        persistent, gathered = 0, 0
        if ranks > 1:
            persistent = sum(size for size in sizes if size < zero.param_persistence_threshold)
            live = min(count, zero.max_live_parameters + zero.prefetch_bucket_size)
            gathered = live + min(count, zero.prefetch_bucket_size + largest)
        bucket = min(zero.reduce_bucket_size, learned)
        held = HeldMemory(
            weights=compute * (whole + count / ranks + second + persistent),
            masters=4 * learned / ranks,
            gradients=4 * learned / ranks + 4 * bucket,
            moments=8 * learned / ranks,
            gathered=compute * (gathered + max((p.numel() for p in trained), default=0)) + 4 * bucket,
            step=12 * min(zero.sub_group_size, learned / ranks),
            loading=compute * max(sum(p.numel() for p in group) for group in groups),
        )
        if options.cpu_offload and options.device.type != "cpu":
            weights = compute * (whole + persistent)
            held = replace(held, weights=weights, masters=0.0, gradients=4 * bucket, moments=0.0, step=0.0)
        return held

    @classmethod
    def traffic(cls, model: nn.Module, options: BackendOptions, micro_batches: int) -> float:
        """Of each micro-batch: parameters are gathered for the forward and again for the backward pass, and gradients
        reduced. With hpZ the second partition serves the backward pass, and frozen parameters always.
        """
        count = sum(p.numel() for p in model.parameters())
        learned = sum(p.numel() for p in trainable(model).values())
        gathered = {"full": 2 * count, "trainable": 2 * learned, "hybrid": learned}[options.sharding]
        return options.other_nodes * micro_batches * (options.dtype.itemsize * gathered + 4 * learned)

    def setup(self) -> None:
        """Import DeepSpeed and let it use the process group."""
        # Its builds look for ninja on PATH, which lacks it if the virtual environment is not activated.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        os.environ.setdefault("LOCAL_RANK", "0")  # required even without a launcher
        import deepspeed

        internals.disable_shm_build()
        with redirect_stdout(sys.stderr):
            deepspeed.init_distributed(
                dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
            )

    def load_model(self, source: Source) -> nn.Module:
        """A model on the meta device, which `prepare` fills and partitions layer by layer."""
        self._source = source
        return source.skeleton(self.options.dtype)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        """Fill and partition one decoder layer at a time, then deepspeed.initialize with our optimizer and schedule."""
        import deepspeed

        zero, trained = self.ds_config["zero_optimization"], sum(p.numel() for p in trainable(model).values())
        # A GPU allocates all of it, by default 2 GB.
        zero["reduce_bucket_size"] = min(DeepSpeedZeroConfig(**zero).reduce_bucket_size, trained)
        zero |= _with_live_parameters(zero, model)
        masters: dict[str, torch.Tensor] = {}
        partitioner = internals.Partitioner(self.ds_config, self.options.dtype)
        for module in [*decoder_layers(model), model]:
            self._source.fill(module)
            if self.options.sharding == "trainable":
                self._hide_frozen(module)
            # The engine computes in the dtype of the parameters it is given and copies them to float32 masters. Given
            # float32 LoRA weights, every layer would cast its input to float32. So it is given rounded weights, and
            # the exact masters are written afterwards.
            for name, parameter in partitioner.parameters(model):
                exact = parameter.detach()
                parameter.data = exact.to(self.options.device, self.options.dtype)
                partitioner.partition(parameter)
                if parameter.requires_grad and not self.options.trains_base:
                    masters[name] = exact.flatten()[slice(*internals.partition_range(parameter))].clone()
        del self._source  # it still holds unsharded tied weights
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.options.device)
        optimizer = make_optimizer(list(trainable(model).values()))
        scheduler = make_scheduler(optimizer)
        with redirect_stdout(sys.stderr):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=scheduler, config=self.ds_config
            )
        self.model = self._engine
        self._zero = self._engine.optimizer
        self._scheduler = scheduler
        self._parameters = trainable(self._engine.module)
        if masters and self.options.dtype != torch.float32:
            internals.write_masters(self._zero, self._parameters, lambda name, *_: masters[name])

    def _hide_frozen(self, module: nn.Module) -> None:
        """Turn frozen parameters into buffers, which ZeRO-3 neither partitions nor gathers."""
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if not parameter.requires_grad and not parameter.is_meta:
                    delattr(owner, name)
                    owner.register_buffer(name, parameter.detach().to(self.options.device), persistent=False)

    def backward(self, loss: torch.Tensor, *, last_micro_batch: bool) -> None:
        """The loss is multiplied by the world size, because ZeRO-3 averages over ranks."""
        self._engine.set_gradient_accumulation_boundary(last_micro_batch)
        self._engine.backward(loss * torch.distributed.get_world_size(), scale_wrt_gas=False)

    def step(self) -> float:
        """The engine skips the update if the norm is not finite."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def learning_rate(self) -> float:
        return self._zero.param_groups[0]["lr"]

    def state(self) -> Iterator[StateSlice]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for kind in (PARAMETER, *MOMENTS):
            for name, parameter in self._parameters.items():
                start, stop = internals.partition_range(parameter)
                values = (
                    safe_get_local_fp32_param(parameter)
                    if kind == PARAMETER
                    else safe_get_local_optimizer_state(parameter, kind)
                )
                yield StateSlice(kind, name, self.shape(parameter), start, values.detach()[: stop - start])

    def load_state(self, read: Read, step: int) -> None:
        internals.write_moments(self._zero, self._parameters, read, step)
        internals.write_masters(self._zero, self._parameters, partial(read, PARAMETER))
        set_schedule(self._scheduler, step)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def close(self) -> None:
        """Free the engine's buffers and hooks."""
        if hasattr(self, "_engine"):
            self._engine.destroy()


def _with_live_parameters(settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Settings of zero_optimization. DeepSpeed's own default, 1e9, would hold a model of that size whole."""
    layers = decoder_layers(model) or [model]
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    return {"stage3_max_live_parameters": 2 * largest} | settings
