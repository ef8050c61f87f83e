"""This process and the other ranks: world size, device, threads, seeds, agreement, and exit."""

import contextlib
import ctypes
import logging
import math
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist

from dsft.distributed.liveness import Liveness
from dsft.errors import UserError, end_quietly, run_and_report

Result = TypeVar("Result")
M_MMAP_THRESHOLD = -3  # malloc.h
RETURNED_BLOCK = 8 * 2**20  # bytes, see return_freed_memory
LONGEST_WORK = timedelta(hours=2)
"""While one rank tokenizes or reads a checkpoint, the others wait. dsft.distributed.liveness sees a dead rank."""

VISIBLE_AFTER_SECONDS = 60

_object_groups: "WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = WeakKeyDictionary()


class AgreedError(UserError):
    """A UserError that all ranks know of; this rank prints it."""

    is_agreed = True


class PeerFailedError(BaseException):
    """Another rank prints its UserError; this rank exits quietly with status 1."""


@dataclass(frozen=True)
class World:
    """This process among the ranks, from the variables that torchrun and the DeepSpeed launcher set."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> "World":
        """One process if no launcher has set RANK."""
        env = os.environ
        size = int(env.get("WORLD_SIZE", 1))
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)
        return cls(int(env.get("RANK", 0)), size, int(env.get("LOCAL_RANK", 0)), local_size)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes."""
        return self.rank == 0


def ranks_per_node(world: World) -> int:
    """How many consecutive ranks share a node, on every node; the greatest common divisor, where nodes have more."""
    return math.gcd(*gather_objects(world.local_size))


def pick_device(world: World) -> torch.device:
    """cuda:LOCAL_RANK if CUDA is available, else cpu.

    Raises:
        UserError: on the first rank without a GPU; PeerFailedError on the others.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank > torch.cuda.device_count():
        raise PeerFailedError
    if world.local_rank == torch.cuda.device_count():
        raise AgreedError(
            f"local rank {world.local_rank} has no GPU: {torch.cuda.device_count()} available on this machine; "
            "start as many processes as GPUs, or set CUDA_VISIBLE_DEVICES= to train on CPU"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype for --dtype. auto is bfloat16 if the hardware supports it natively.

    On CPU that means AVX512-BF16 or AMX: otherwise bfloat16 is emulated, and slower than float32.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def set_threads(world: World) -> None:
    """Divide the cores among the local ranks, unless the user set OMP_NUM_THREADS.

    With several processes torchrun sets OMP_NUM_THREADS=1, which wastes cores, and the DeepSpeed launcher sets nothing,
    which makes ranks compete for them.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and world.local_size > 1
    if "OMP_NUM_THREADS" in os.environ and not (by_torchrun and os.environ["OMP_NUM_THREADS"] == "1"):
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))


def return_freed_memory() -> None:
    """Let glibc return to the system what is free in its heap now, and from now on blocks of 8 MiB when they are freed.

    It otherwise learns from the first large tensor that is freed to keep blocks of up to 32 MiB in its heap, where
    activations of many sizes leave holes: 13.0 GiB at the peak of a 6,000-token micro-batch of the embedded model
    in float32, 8.8 GiB with this, for a tenth more time. Smaller thresholds also cost time on short rows.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_MMAP_THRESHOLD, RETURNED_BLOCK)
        library.malloc_trim(0)


def silence_libraries() -> None:
    """Turn off warnings and progress bars of libraries; not called with --debug."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns
    warnings.filterwarnings("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights
    for name in ("DeepSpeed", "transformers", "torch.distributed", "peft", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch alike on every rank, so that LoRA starts from the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one rank.

    Dropout then depends only on (seed, step, rank), so a resumed run repeats it and no random state is stored.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def gather_objects(value: Result) -> list[Result]:
    """Gather small Python objects from all ranks, ordered by rank; a list of one without a process group.

    They use a gloo group of their own: with NCCL they would pass through the GPU, and time out after ten minutes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    everyone = dist.group.WORLD
    assert everyone is not None
    if everyone not in _object_groups:
        _object_groups[everyone] = dist.new_group(backend="gloo", timeout=LONGEST_WORK)
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_object_groups[everyone])
    return values


def together(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank; a UserError on one rank ends all of them.

    `work` must not use collectives, in which the others would wait for a rank that failed.

    Raises:
        AgreedError: on the lowest rank that failed, which prints it; PeerFailedError on the others.
    """
    result, error = None, None
    try:
        result = work()
    except UserError as failure:
        error = AgreedError(str(failure))
        error.__cause__ = failure
    failed = [rank for rank, is_failed in enumerate(gather_objects(error is not None)) if is_failed]
    if failed and dist.is_initialized() and failed[0] != dist.get_rank():
        raise PeerFailedError
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def fail_together(message: str) -> NoReturn:
    """Raise a UserError that all ranks have at the same place, so that one of them prints it."""

    def fail() -> NoReturn:
        raise UserError(message)

    together(fail)
    raise AssertionError


def on_first_local_rank(world: World, work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank of each machine, then on the others, which find the cache filled.

    `work` must not use collectives. Raises as `together` does.
    """
    first = world.local_rank == 0
    result = together(lambda: work() if first else None)
    return together(lambda: result if first else work())  # type: ignore[return-value]


def on_main(world: World, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 only; all ranks get its result, which must be small. Raises as `together` does."""
    return gather_objects(together(lambda: work() if world.is_main else None))[0]  # type: ignore[return-value]


def check_same_everywhere(value: str, what: str, remedy: str) -> None:
    """Raise a UserError with the lines that differ if `value` differs between ranks."""
    values = gather_objects(value)

    def compare() -> None:
        different = [rank for rank in range(len(values)) if values[rank] != values[0]]
        if different:
            theirs, ours = (str(values[rank]).splitlines() for rank in (different[0], 0))
            there, here = ([line for line in a if line not in b] for a, b in ((theirs, ours), (ours, theirs)))
            raise UserError(
                f"{what} on rank {different[0]} ({', '.join(there)}) differ from rank 0's ({', '.join(here)}); {remedy}"
            )

    together(compare)


def check_visible(path: Path | None) -> None:
    """Raise a UserError if rank 0 sees `path` and another rank does not, a minute later either.

    A network file system may show a file that another machine has written so much later; reading the folder makes NFS
    ask the server again.
    """
    for _ in range(VISIBLE_AFTER_SECONDS):
        seen = gather_objects(path is None or path.exists())
        if all(seen) or not seen[0] or path is None:
            return
        time.sleep(1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
    missing = seen.index(False)
    fail_together(f"{path} exists on rank 0, but not on rank {missing}; all machines must see the same folder")


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over all ranks, in float64. One collective and one host synchronization."""
    return _reduce(values, device, dist.ReduceOp.SUM)


def min_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise minimum over all ranks, in float64."""
    return _reduce(values, device, dist.ReduceOp.MIN)


def _reduce(values: list[float], device: torch.device, op: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor.tolist()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on the GPU, or resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class StopSignals:
    """Remember a request to stop until the current step is done. A second SIGINT raises KeyboardInterrupt.

    SIGUSR1 is sent by Slurm's --signal=USR1@120 before a job's time limit.
    """

    ORPHANED = "the end of its launcher"
    REASONS = ("SIGINT", "SIGTERM", "SIGUSR1", ORPHANED)

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def orphaned(self) -> None:
        """The launcher has died; called from another thread."""
        self.received = self.received or self.ORPHANED

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


def run_to_exit(work: Callable[[], Any], *, debug: bool) -> None:
    """Run a command's work and exit the process: one line and status 1 for an error, no traceback.

    A rank that fails alone must not wait for the others in a library's clean-up, so the process exits at once,
    and the launcher or their own watch ends the others.
    """

    def watched() -> None:
        error: BaseException | None = None
        try:
            work()
            if dist.is_initialized():
                dist.barrier()  # no rank exits while another may still need it
        except BaseException as caught:
            error = caught
            raise
        finally:
            if Liveness.current is not None:
                Liveness.current.close(error)

    try:
        status = run_and_report(watched, debug=debug)
    except PeerFailedError:
        end_quietly()  # were this rank the first to exit, its launcher could end the one that reports
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status or dist.is_initialized():
        # Not through the interpreter's clean-up: about one two-rank gloo run in eight aborted there after its last
        # step ("terminate called without an active exception"), and a launcher reports that as a failed run.
        os._exit(status)
