"""DeepSpeed ZeRO-3."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dsft.backends.base import (
    MOMENTS,
    PARAMETER,
    Backend,
    BackendOptions,
    HeldMemory,
    RunSettings,
    Source,
    StateSlice,
    set_schedule,
    trainable,
)
from dsft.backends.ds_config import AUTO, read_ds_config
from dsft.distributed import runtime
from dsft.errors import UserError


class Zero3Backend(Backend):
    """The engine averages over ranks and accumulation; both are undone, so that gradients are plain sums."""

    library = "deepspeed"

    @classmethod
    def read_library_config(cls, path: str | None, settings: RunSettings) -> dict[str, Any]:
        """DeepSpeed's JSON file over ds_configs/zero3.json.

        Raises:
            UserError: also where DeepSpeed itself does not know a setting of zero_optimization, or its value.
        """
        owned = {
            "train_batch_size": ("train_batch_size", settings.train_batch_size),
            "gradient_clipping": ("clip_grad", settings.clip_grad),
            "bf16.enabled": ("dtype", settings.dtype == torch.bfloat16),
            "fp16.enabled": ("dtype", False),
            "zero_optimization.stage": ("backend", 3),
        }
        config = read_ds_config(path, owned)
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        try:
            DeepSpeedZeroConfig(**{k: v for k, v in config["zero_optimization"].items() if v != AUTO})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise UserError(
                f"--ds_config {path}: zero_optimization: {'; '.join(problems)}; correct the file"
            ) from error
        return config

    @classmethod
    def memory(cls, model: nn.Module, options: BackendOptions, ranks: int) -> HeldMemory:
        """Shards in the compute dtype, and float32 masters, moments and a flat gradient buffer of what is trained.

        On several ranks small parameters stay whole; others are gathered module by module. The buffer from which
        gradients are reduced is as large as reduce_bucket_size says on a GPU; on CPU only what is ever written counts.
        """
        compute = options.dtype.itemsize
        zero = options.library_config.get("zero_optimization", {})
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
        """Import DeepSpeed and hand it the process group."""
        # Its builds look for ninja on PATH, where an environment that was not activated does not show it.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        os.environ.setdefault("LOCAL_RANK", "0")  # it reads this even where no launcher has set it
        import deepspeed

        # On CPU DeepSpeed compiles a shared-memory collective at start-up: half a minute, a C++ compiler, and a
        # lock file that outlives a killed build and stops the next one for ever. Only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with redirect_stdout(sys.stderr):
            deepspeed.init_distributed(
                dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
            )
        self._config = self._library_config()

    def _library_config(self) -> dict:
        config = copy.deepcopy(self.options.library_config)
        config["train_micro_batch_size_per_gpu"] = 1  # labels only: the Trainer decides what a micro-batch is
        config["gradient_accumulation_steps"] = 1
        config["train_batch_size"] = torch.distributed.get_world_size()
        config["gradient_clipping"] = self.options.clip_grad
        config["bf16"] = {"enabled": self.options.dtype == torch.bfloat16}
        config["fp16"] = {"enabled": False}
        if self.options.cpu_offload:
            for part in ("offload_param", "offload_optimizer"):
                config["zero_optimization"].setdefault(part, {"device": "cpu"})
        return config

    def load_model(self, source: Source) -> nn.Module:
        """from_pretrained under transformers' DeepSpeed hook: each rank keeps its shard of every weight."""
        from transformers.integrations import HfDeepSpeedConfig

        self._hook = HfDeepSpeedConfig(self._config)  # must stay alive while from_pretrained runs
        return source.pretrained(self.options.dtype)

    def prepare(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        make_scheduler: Callable[[Optimizer], LambdaLR],
    ) -> None:
        """deepspeed.initialize with our optimizer and schedule."""
        import deepspeed

        parameters = trainable(model)
        # The engine makes float32 masters of what it is given, and computes in that dtype: left in float32, LoRA would
        # turn the input of every layer into float32 first. So it gets rounded weights, and the true masters afterwards.
        masters = {n: p.detach().clone() for n, p in parameters.items() if not self.options.trains_base}
        for parameter in parameters.values():
            parameter.data = parameter.data.to(self.options.dtype)
        optimizer = make_optimizer(list(parameters.values()))
        scheduler = make_scheduler(optimizer)
        with redirect_stdout(sys.stderr):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=scheduler, config=self._config
            )
        self.model = self._engine
        self._zero = self._engine.optimizer
        self._scheduler = scheduler
        self._parameters = trainable(self._engine.module)
        if masters and self.options.dtype != torch.float32:
            self._write_parameters(lambda name, start, stop: masters[name].flatten()[start:stop])

    def backward(self, loss: torch.Tensor, *, last_micro_batch: bool) -> None:
        """Times the world size, because ZeRO-3 averages over ranks."""
        self._engine.set_gradient_accumulation_boundary(last_micro_batch)
        self._engine.backward(loss * torch.distributed.get_world_size(), scale_wrt_gas=False)

    def step(self) -> float:
        """The engine skips the update by itself where the norm is not finite."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def learning_rate(self) -> float:
        """See Backend."""
        return self._zero.param_groups[0]["lr"]

    def state(self) -> Iterator[StateSlice]:
        """See Backend."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for kind in (PARAMETER, *MOMENTS):
            for name, parameter in self._parameters.items():
                start, stop = _range(parameter)
                values = (
                    safe_get_local_fp32_param(parameter)
                    if kind == PARAMETER
                    else safe_get_local_optimizer_state(parameter, kind)
                )
                yield StateSlice(kind, name, self.shape(parameter), start, values.detach()[: stop - start])

    def load_state(self, read: Callable[[str, str, int, int], torch.Tensor], step: int) -> None:
        """See Backend."""
        from deepspeed.utils import safe_set_local_optimizer_state

        for flat in self._zero.fp32_partitioned_groups_flat:
            state = {"step": torch.tensor(float(step))}
            state |= {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._zero.optimizer.state[flat] = state
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                values = _padded(read(moment, name, *_range(parameter)), parameter)
                safe_set_local_optimizer_state(parameter, values, moment)
        self._write_parameters(lambda name, start, stop: read(PARAMETER, name, start, stop))
        set_schedule(self._scheduler, step)

    def _write_parameters(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        """Set the float32 masters and everything that the engine derives from them."""
        from deepspeed.utils import safe_set_local_fp32_param

        self._zero._partition_all_parameters()
        for name, parameter in self._parameters.items():
            safe_set_local_fp32_param(parameter, _padded(read(name, *_range(parameter)), parameter))
        for group in range(len(self._zero.fp16_groups)):  # what the engine's own step does after an update
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """See Backend."""
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def close(self) -> None:
        """Free the engine's buffers and hooks."""
        if hasattr(self, "_engine"):
            self._engine.destroy()


def _number(value: Any, default: int) -> float:
    """A setting of DeepSpeed's, which may be "auto", missing, or written as 5e8."""
    return default if value in (None, AUTO) else float(value)


def _range(parameter: nn.Parameter) -> tuple[int, int]:
    """Where this rank's partition stands in the flattened tensor: equal sizes, the last ones may lack values."""
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    first, last = (size * (torch.distributed.get_rank() + i) for i in (0, 1))
    return min(first, parameter.ds_numel), min(last, parameter.ds_numel)  # type: ignore[attr-defined]


def _padded(values: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's values with zeros behind them where ZeRO-3's partition is longer."""
    whole = torch.zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32)  # type: ignore[attr-defined]
    whole[: values.numel()] = values
    return whole.to(parameter.device)
