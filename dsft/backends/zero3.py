"""DeepSpeed ZeRO-3."""

import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

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
    def memory(cls, model: nn.Module, options: BackendOptions, ranks: int) -> HeldMemory:
        """What DeepSpeed allocates, by its settings under zero_optimization.

        - Partitions of all parameters in the compute dtype. On several ranks those below
          stage3_param_persistence_threshold are kept whole as well.
        - Of what is trained float32 masters, moments, and one flat buffer of gradients.
        - The reduce bucket, float32 as communication_data_type says: a GPU takes all of reduce_bucket_size, a CPU the
          pages that are written. The bucket is copied when it is reduced.
        - On several ranks parameters are fetched ahead until stage3_max_live_parameters are whole. Those of one
          stage3_prefetch_bucket_size exist twice when they are cut out of the buffer in which they have arrived.
        - The optimizer steps through sub_group_size values at a time: a copy of their gradients, and two temporaries.
        - While the model loads, rank 0 has the files mapped, and the largest parameter twice.
        """
        compute = options.dtype.itemsize
        on_cpu = options.device.type == "cpu"
        zero = DeepSpeedZeroConfig(**cls(options).ds_config["zero_optimization"])
        trained = set(trainable(model).values())
        sizes = [p.numel() for p in model.parameters()]
        count, learned, largest = sum(sizes), sum(p.numel() for p in trained), max(sizes)
        persistent, gathered = 0, 0
        if ranks > 1:
            persistent = sum(size for size in sizes if size < zero.param_persistence_threshold)
            live = min(count, zero.max_live_parameters + zero.prefetch_bucket_size)
            gathered = live + min(count, zero.prefetch_bucket_size + largest)
        bucket = min(zero.reduce_bucket_size, learned)
        held = HeldMemory(
            weights=compute * (count / ranks + persistent),
            masters=4 * learned / ranks,
            gradients=4 * learned / ranks + 4 * (bucket if on_cpu else zero.reduce_bucket_size),
            moments=8 * learned / ranks,
            gathered=compute * (gathered + max((p.numel() for p in trained), default=0)) + 4 * bucket,
            step=12 * min(zero.sub_group_size, learned / ranks),
            loading=compute * (count + 2 * largest),
        )
        if options.cpu_offload and not on_cpu:
            on_gpu = 4 * zero.reduce_bucket_size
            held = replace(held, weights=compute * persistent, masters=0.0, gradients=on_gpu, moments=0.0, step=0.0)
        return held

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
        """from_pretrained under transformers' DeepSpeed hook: each rank keeps its shard of every weight."""
        from transformers.integrations import HfDeepSpeedConfig

        self._hook = HfDeepSpeedConfig(self.ds_config)  # must stay alive while from_pretrained runs
        return source.pretrained(self.options.dtype)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        """deepspeed.initialize with our optimizer and schedule."""
        import deepspeed

        parameters = trainable(model)
        # The engine computes in the dtype of the parameters it is given and copies them to float32 masters. Given
        # float32 LoRA weights, every layer would cast its input to float32. So it is given rounded weights, and the
        # exact masters are written afterwards.
        masters = {n: p.detach().clone() for n, p in parameters.items() if not self.options.trains_base}
        for parameter in parameters.values():
            parameter.data = parameter.data.to(self.options.dtype)
        optimizer = make_optimizer(list(parameters.values()))
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
            internals.write_masters(self._zero, self._parameters, lambda name, i, j: masters[name].flatten()[i:j])

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
