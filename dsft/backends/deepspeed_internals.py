"""What DeepSpeed's public API does not cover, read in 0.19.8; setup.py excludes the next minor version.

`zero` is the engine's optimizer, a DeepSpeedZeroOptimizer_Stage3. A parameter's partition is this rank's part of the
flattened tensor: of the same length on all ranks, so that the last ones are padded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsft.backends.base import MOMENTS, Read


def disable_shm_build() -> None:
    """Keep `init_distributed` from compiling a shared-memory collective, which only inference uses.

    On CPU that takes half a minute and a C++ compiler. A build that is killed leaves a lock file on which the next one
    waits forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Partitioner:
    """zero.Init for a model that is filled a layer at a time on each rank alike.

    zero.Init itself broadcasts every parameter from rank 0, whole.
    """

    def __init__(self, ds_config: dict[str, Any], dtype: torch.dtype) -> None:
        import deepspeed

        # Given a module, it replaces torch's linear function by one that does not keep gathered weights alive.
        self._init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config, dtype=dtype)

    @staticmethod
    def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Those that are filled but not partitioned."""
        return [(n, p) for n, p in model.named_parameters() if not p.is_meta and not hasattr(p, "ds_id")]

    def partition(self, parameter: Any) -> None:
        """Keep this rank's part."""
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()


def partition_range(parameter: Any) -> tuple[int, int]:
    """Start and stop of this rank's partition in the flattened tensor, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = size * torch.distributed.get_rank()
    return min(start, parameter.ds_numel), min(start + size, parameter.ds_numel)


def _padded(values: torch.Tensor, parameter: Any) -> torch.Tensor:
    whole = torch.zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32)
    whole[: values.numel()] = values
    return whole.to(parameter.device)


def write_moments(zero: Any, parameters: dict[str, nn.Parameter], read: Read, step: int) -> None:
    """Set the moments, and the step count of AdamW."""
    from deepspeed.utils import safe_set_local_optimizer_state

    for flat in zero.fp32_partitioned_groups_flat:
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step))} | moments
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            values = _padded(read(moment, name, *partition_range(parameter)), parameter)
            safe_set_local_optimizer_state(parameter, values, moment)


def write_masters(
    zero: Any, parameters: dict[str, nn.Parameter], read: Callable[[str, int, int], torch.Tensor]
) -> None:
    """Set the float32 masters and the compute weights that are copied from them, as the engine's own step does."""
    from deepspeed.utils import safe_set_local_fp32_param

    zero._partition_all_parameters()
    for name, parameter in parameters.items():
        safe_set_local_fp32_param(parameter, _padded(read(name, *partition_range(parameter)), parameter))
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    zero.invalidate_secondary_tensor()  # of zero_hpz_partition_size
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
