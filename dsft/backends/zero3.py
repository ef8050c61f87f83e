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
from dsft.backends.ds_config import AUTO, make_ds_config
from dsft.distributed import runtime


class Zero3Backend(Backend):
    """DeepSpeed averages gradients over ranks and accumulation steps; both are undone to get plain sums."""

    library = "deepspeed"

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self.ds_config = make_ds_config(options)

    @classmethod
    def memory(cls, model: nn.Module, options: BackendOptions, ranks: int) -> HeldMemory:
        """Shards in the compute dtype, and float32 masters, moments and a flat gradient buffer of what is trained.

        On several ranks small parameters stay whole; others are gathered module by module. The buffer from which
        gradients are reduced is as large as reduce_bucket_size says on a GPU; on CPU only what is ever written counts.
        """
        compute = options.dtype.itemsize
        zero = cls(options).ds_config["zero_optimization"]
        bucket = _number(zero.get("reduce_bucket_size"), 500_000_000)
        small = _number(zero.get("stage3_param_persistence_threshold"), 100_000)
        prefetch = _number(zero.get("stage3_prefetch_bucket_size"), 50_000_000)
        trained = set(trainable(model).values())
        everything = set(model.parameters())
        count, learned = sum(p.numel() for p in everything), sum(p.numel() for p in trained)
        whole = sum(p.numel() for p in everything if p.numel() < small) if ranks > 1 else 0
        largest = max(p.numel() for p in everything)
        largest_trained = max((p.numel() for p in trained), default=0)
        gathered = float(largest)
        if ranks > 1:
            # From the second pass on parameters are fetched ahead: a bucket in use, one that comes, and the flat buffer
            # from which it is cut. The largest one, fetched beside them, is cut out of a buffer too.
            gathered = 2 * largest + 3 * min(prefetch, count)
        on_gpu = options.device.type != "cpu"
        bucket_bytes = compute * (bucket if on_gpu else min(bucket, learned))
        # Weights are read in 16 bits as a rule, one after the other, and their shards are cut out: blocks that malloc
        # does not give back stay in the heap as holes. After loading the 135 M model 140 to 190 MiB were, of 203.
        read = [2 * p.numel() for p in everything if not (p in trained and not options.trains_base)]
        left = sum(size for size in read if size < runtime.RETURNED_BLOCK)
        held = HeldMemory(
            weights=count * compute / ranks + whole * compute,
            masters=learned * 4 / ranks,
            gradients=learned * 4 / ranks + bucket_bytes,
            moments=learned * 8 / ranks,
            gathered=compute * (gathered + largest_trained),
            step=learned * 12 / ranks,  # all is one flat tensor: its gradient, and two temporaries of AdamW
            loading=count * compute,  # every rank reads all weights, and keeps its shards
            moments_from_start=True,
            leftover=0.0 if on_gpu else left,
        )
        if options.cpu_offload and on_gpu:
            held = replace(held, weights=whole * compute, masters=0.0, gradients=bucket_bytes, moments=0.0, step=0.0)
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


def _number(value: Any, default: int) -> float:
    """A setting of DeepSpeed's, which may be "auto", missing, or written as 5e8."""
    return default if value in (None, AUTO) else float(value)
