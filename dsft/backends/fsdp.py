"""PyTorch's own FSDP2: parameters as DTensors."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

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
from dsft.distributed import runtime


class FsdpBackend(Backend):
    """Each decoder layer is one FSDP group; the rest of the model is the root group."""

    library = "torch"

    @classmethod
    def memory(cls, model: nn.Module, options: BackendOptions) -> HeldMemory:
        """Shards of what is sharded; whole are the group of the root all the time in between, and one layer's.

        The root's group is embeddings, head and norm. A group is gathered in the compute dtype, and the gradients of
        its trained parameters stand beside it whole until they are reduced, in float32. With a frozen base that is
        whole, so is what is trained, in all layers.
        """
        compute = options.dtype.itemsize
        trained = set(trainable(model).values())
        base = 4 if options.trains_base else compute
        shards = options.ranks_per_node if options.sharding == "hybrid" else options.ranks

        def sizes(parameters: set[nn.Parameter]) -> tuple[float, float]:
            return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p in trained)

        everything = set(model.parameters())
        layers = [set(layer.parameters()) for layer in decoder_layers(model)]
        root = everything.difference(*layers)
        count, learned = sizes(everything)
        groups = [sizes(group) for group in layers] or [(0.0, 0.0)]
        gathered = max(whole * compute + own * (compute + 4) for whole, own in groups)
        whole, own = sizes(root)
        gathered += whole * compute + own * (compute + 4)
        frozen = (count - learned) * base / shards
        if options.sharding == "trainable":
            frozen, gathered = (count - learned) * base, learned * (compute + 4)
        largest = max((p.numel() for p in trained), default=0)
        held = HeldMemory(
            weights=frozen + learned * 4 / shards,
            masters=0.0,
            gradients=learned * 4 / shards,
            moments=learned * 8 / shards,
            gathered=gathered,
            step=largest * 8 / shards,
            loading=max([whole, *(size for size, _ in groups)]) * base,
        )
        if options.cpu_offload and options.device.type != "cpu":
            weights = frozen if options.sharding == "trainable" else 0.0
            held = replace(held, weights=weights, gradients=0.0, moments=0.0, step=0.0)
        return held

    @classmethod
    def traffic(cls, model: nn.Module, options: BackendOptions, micro_batches: int) -> float:
        """Parameters are gathered for the forward and again for the backward pass; for gradients see `backward`."""
        count = sum(p.numel() for p in model.parameters())
        learned = sum(p.numel() for p in trainable(model).values())
        compute = options.dtype.itemsize
        if options.sharding == "hybrid":
            return options.other_nodes * 2 * 4 * learned
        if options.sharding == "trainable":
            return options.other_nodes * (compute + 4) * learned
        return options.other_nodes * micro_batches * (2 * compute * count + 4 * learned)

    def setup(self) -> None:
        """One mesh over all ranks, or one of nodes and their ranks: FSDP replicates over the first of two."""
        ranks, node = self.options.ranks, self.options.ranks_per_node
        shape = (ranks // node, node) if self.options.sharding == "hybrid" else (ranks,)
        names = ("nodes", "ranks")[-len(shape) :]
        self._mesh = init_device_mesh(self.options.device.type, shape, mesh_dim_names=names)

    def load_model(self, source: Source) -> nn.Module:
        """A model on the meta device, which `prepare` fills and shards layer by layer."""
        self._source = source
        # In full fine-tuning the sharded parameters are the float32 masters, cast to `dtype` for compute.
        return source.skeleton(torch.float32 if self.options.trains_base else self.options.dtype)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        """Fill and shard one decoder layer at a time, so that no more than one is ever whole."""
        policy: dict = {"mesh": self._mesh, "reshard_after_forward": self.options.sharding != "trainable"}
        if self.options.dtype != torch.float32:
            policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=self.options.dtype, reduce_dtype=torch.float32)
        if self.options.cpu_offload:
            policy["offload_policy"] = CPUOffloadPolicy(pin_memory=self.options.device.type == "cuda")
        for module in [*decoder_layers(model), model]:
            self._source.fill(module)
            whole = self._whole_parameters(module)
            for parameter in whole:
                parameter.data = parameter.data.to(self.options.device)
            fully_shard(module, **policy, ignored_params=whole)
        del self._source  # it still holds unsharded tied weights
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The contract asks for the plain sum, and gloo supports no scaled reduction.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.model = model
        self._parameters = trainable(model)
        self._optimizer = make_optimizer(list(self._parameters.values()))
        self._scheduler = make_scheduler(self._optimizer)

    def _whole_parameters(self, module: nn.Module) -> set[nn.Parameter]:
        if self.options.sharding != "trainable":
            return set()
        return {parameter for parameter in module.parameters() if not parameter.requires_grad}

    def backward(self, loss: torch.Tensor, *, last_micro_batch: bool) -> None:
        """Between nodes, gradients are reduced once per step.

        Within a node they are reduced after every micro-batch, so that only their shards are kept. But where the base
        is whole, so are its few trained parameters and their gradients, from the first micro-batch to the last.
        """
        self.model.set_is_last_backward(last_micro_batch)  # type: ignore[operator]
        if self.options.sharding == "trainable":
            self.model.set_requires_gradient_sync(last_micro_batch)  # type: ignore[operator]
            self.model.set_reshard_after_backward(last_micro_batch)  # type: ignore[operator]
        elif self.options.sharding == "hybrid":
            self.model.set_requires_all_reduce(last_micro_batch)  # type: ignore[operator]
        loss.backward()

    def step(self) -> float:
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        # In float64, because on CPU the float32 norm of ten million values is wrong in the fourth digit.
        norms = [torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards]
        square = float(torch.stack(norms).square().sum()) if norms else 0.0
        replicas = self._mesh.size() / self._mesh.size(-1)
        norm = math.sqrt(runtime.sum_over_ranks([square], self.options.device)[0] / replicas)
        if math.isfinite(norm):
            if self.options.clip_grad:
                coefficient = min(1.0, self.options.clip_grad / (norm + 1e-6))
                for shard in shards:
                    shard.mul_(coefficient)
            self._optimizer.step()
            self._scheduler.step()
        self._optimizer.zero_grad()
        return norm

    def learning_rate(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def state(self) -> Iterator[StateSlice]:
        """Of several nodes with the same shards, the first has them."""
        is_first = self._mesh.ndim == 1 or self._mesh.get_local_rank(0) == 0
        for kind in (PARAMETER, *MOMENTS):
            for name, parameter in self._parameters.items():
                whole = parameter if kind == PARAMETER else self._optimizer.state[parameter][kind]
                values = _local(whole) if is_first else _local(whole)[:0]
                yield StateSlice(kind, name, tuple(parameter.shape), _range(parameter)[0], values)

    def load_state(self, read: Read, step: int) -> None:
        for name, parameter in self._parameters.items():
            held = _range(parameter)
            _local(parameter).copy_(read(PARAMETER, name, *held))
            state = self._optimizer.state[parameter]
            state["step"] = torch.tensor(float(step))
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter)
                _local(state[moment]).copy_(read(moment, name, *held))
        set_schedule(self._scheduler, step)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard as a 1-D view."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def _range(parameter: nn.Parameter) -> tuple[int, int]:
    """Start and stop of this rank's shard in the flattened tensor. FSDP2 shards dimension 0 as torch.chunk does."""
    assert isinstance(parameter, DTensor)
    assert parameter.placements[-1] == Shard(0), parameter.placements
    mesh = parameter.device_mesh
    rows = -(-parameter.shape[0] // mesh.size(-1))
    first = min(rows * mesh.get_local_rank(mesh.ndim - 1), parameter.shape[0])
    start = first * math.prod(parameter.shape[1:])
    return start, start + parameter.to_local().numel()
