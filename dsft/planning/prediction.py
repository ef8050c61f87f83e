"""Peak memory and time of a run before it starts: from shapes, the longest micro-batch and the machine's own rates.

What is predicted is what a run logs as `memory`: the highest resident memory of the process on CPU, the most that was
allocated on CUDA. No weight is read. The model is built on the meta device, one forward and backward of the longest
micro-batch runs there, and what it would allocate is noted; on CPU that sequence is played to the machine's malloc,
because the process keeps more than its tensors take. What the library holds beside that, its backend says.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from dsft.backends import backend_class
from dsft.backends.base import BackendOptions, HeldMemory
from dsft.dataset.batches import GlobalBatches
from dsft.dataset.folding import fold
from dsft.dataset.micro_batches import MicroBatch, MicroBatches, Plan, packed
from dsft.distributed import runtime
from dsft.errors import UserError
from dsft.loss import TargetHead, summed_loss
from dsft.model import tree_attention
from dsft.model.lora import LoraOptions, add_lora
from dsft.planning.activations import ActivationMemory, AllocationTrace, recompute_layers
from dsft.planning.heap import heap_peaks
from dsft.units import GIB

PASSES = 2  # played to malloc
HEAP_GROWTH = 1.3  # by further passes, whose objects that outlive them spoil holes; 1.1 to 1.8 measured
WITHIN = 0.15  # relative error of a prediction, see docs/benchmarks.md
LOOKED_AT = 8  # steps of an epoch whose micro-batches are made to find the longest
REACHED = {("cpu", torch.float32): 0.59, ("cpu", torch.bfloat16): 0.37, ("cuda", torch.bfloat16): 0.43}
"""Share of the measured matrix product's rate that a step reaches; of CUDA unmeasured. See docs/benchmarks.md."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc", "not enough memory")


@dataclass(frozen=True)
class Setting:
    """What memory follows from, beside the rows."""

    backend: str
    options: BackendOptions
    ranks: int
    lora: LoraOptions | None
    """None is full fine-tuning."""
    checkpointed_layers: int = 0
    copies_state: bool = False
    """A checkpoint is written in the background, from a copy."""


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process that has loaded libraries and rows but no model."""

    now: float
    peak: float
    """So far: to make rows into tokens takes more than to have them."""

    @classmethod
    def of(cls, device: torch.device) -> "ProcessMemory":
        """This process's; none of it is on a GPU."""
        if device.type == "cuda":
            return cls(0.0, 0.0)
        now = float(psutil.Process().memory_info().rss)
        return cls(now, max(now, runtime.peak_memory_gib(device) * GIB))


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and backward pass takes beside what is held."""

    first: float
    """In the first pass."""
    lasting: float
    """At most, over many passes."""
    kept: float = 0.0
    """By the process between passes."""


@dataclass(frozen=True)
class Prediction:
    """Bytes of one rank, the one with the longest micro-batch."""

    process: ProcessMemory
    held: HeldMemory
    activations: Activations
    copied: float
    """State that a checkpoint in the background is written from."""
    tokens: int
    """Of the micro-batch."""
    by_trace: bool
    """Whether the activations come from a pass on the meta device; else from a formula, and are rougher."""

    @property
    def before_first_step(self) -> float:
        """Peak up to the end of the first backward pass: what a dry run measures."""
        held = self.held
        state = held.lasting - (0 if held.moments_from_start else held.moments)
        loading = held.built - held.leftover + held.loading
        return max(self.process.peak, self.process.now + max(loading, state + held.gathered + self.activations.first))

    @property
    def peak(self) -> float:
        """Of the whole run."""
        held, activations = self.held, self.activations
        running = held.lasting + held.gathered + activations.lasting
        stepping = held.lasting + activations.kept + held.step
        return max(self.before_first_step, self.process.now + self.copied + max(running, stepping))

    def parts(self) -> dict[str, float]:
        """Bytes by what they are for; they add up to the peak of a forward and backward pass."""
        held = self.held
        parts = {
            "process": self.process.now,
            "weights": held.weights + held.masters,
            "gradients": held.gradients,
            "moments": held.moments,
            "gathered": held.gathered,
            "activations" if self.by_trace else "activations by a formula": self.activations.lasting,
            "loading": held.leftover,
            "checkpoint": self.copied,
        }
        return {name: size for name, size in parts.items() if size}


def predict(bare: Any, setting: Setting, batch: MicroBatch, *, process: ProcessMemory) -> Prediction:
    """Peak memory of a rank.

    Args:
        bare: what `ModelSource.empty` gives, before a backend has loaded a model.
        setting: of the run.
        batch: the longest micro-batch, on CPU; see `longest_micro_batch` and `chains`.
        process: of the rank, before it has a model.

    Raises:
        UserError: LoRA does not fit the model.
    """
    options = setting.options
    chosen = backend_class(setting.backend)
    model = shapes(bare, setting)
    held = chosen.memory(model, options, setting.ranks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations = None
    with suppress(NotImplementedError, RuntimeError, TypeError, AttributeError):  # code that meta tensors cannot follow
        activations = trace_activations(model, batch, setting)
    return Prediction(
        process=process,
        held=held,
        activations=activations or estimate_activations(model, batch, setting),
        copied=checkpoint_bytes(trained) / setting.ranks if setting.copies_state else 0.0,
        tokens=batch.input_ids.numel(),
        by_trace=activations is not None,
    )


def shapes(bare: Any, setting: Setting) -> Any:
    """The model on the meta device, wrapped as it is trained."""
    model = copy.deepcopy(bare).to("meta")
    model.tie_weights()
    return model if setting.lora is None else add_lora(model, setting.lora, "")


def trace_activations(model: Any, batch: MicroBatch, setting: Setting) -> Activations:
    """By a forward and backward pass on the meta device. It changes the model, which must not be used afterwards."""
    dtype = setting.options.dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        if parameter.requires_grad:  # whole gradients are the backend's to count
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    model.config.use_cache = False
    if getattr(model, "_supports_attention_backend", False):
        # Also in place of torch's fused kernels, which keep as much; on the meta device those would not be chosen.
        model.set_attn_implementation(tree_attention.NAME)
        batch = batch if batch.tree is not None else _unpadded(batch)
    head = TargetHead(model)
    recompute_layers(model, setting.checkpointed_layers)
    model.train()
    if batch.tree is not None:
        batch.tree.to(torch.device("cpu"))
    on_meta = replace(batch, tree=None).to(torch.device("meta"))
    on_meta.tree = batch.tree
    trace = AllocationTrace([*model.parameters(), *model.buffers()])
    with trace:
        summed_loss(model, head, on_meta).backward()
    if setting.options.device.type == "cuda":
        return Activations(trace.peak, trace.peak)
    peaks = heap_peaks(trace.events, PASSES, runtime.RETURNED_BLOCK)
    if peaks is None:
        return Activations(trace.peak, trace.peak)
    peak, heap = peaks[-1]
    return Activations(peaks[0][0], peak + (HEAP_GROWTH - 1) * heap, HEAP_GROWTH * heap)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def estimate_activations(model: Any, batch: MicroBatch, setting: Setting) -> Activations:
    """By a formula of the model's sizes, for models whose code cannot run on the meta device."""
    memory = ActivationMemory.of(model, setting.options.dtype)
    size = memory.per_token(setting.checkpointed_layers) * batch.input_ids.numel()
    return Activations(size, size)


def chains(lengths: Sequence[int], targets: int) -> MicroBatch:
    """A micro-batch of made-up rows that share nothing, each with so many targets at its end."""
    rows = [(np.full(size, index, np.int32), np.arange(size) >= size - targets) for index, size in enumerate(lengths)]
    return packed([fold([row]) for row in rows])


def _unpadded(batch: MicroBatch) -> MicroBatch:
    """Padded rows as a packed row of the same size."""
    count, length = batch.input_ids.shape
    made = chains([length] * count, 1)
    made.logit_positions, made.labels, made.loss_weights = batch.logit_positions, batch.labels, batch.loss_weights
    return made


def longest_micro_batch(
    micro_batches: MicroBatches, lengths: np.ndarray, batches: GlobalBatches
) -> tuple[Plan, int, MicroBatch]:
    """The plan of the step with the longest micro-batch of the first epoch, its place there, and itself.

    Looked at are the steps with the longest rows and those with the most tokens.

    Args:
        micro_batches: of the training rows.
        lengths: int64 [rows].
        batches: of the run.
    """
    epoch = batches.epoch(0)
    by_row = sorted(range(len(epoch)), key=lambda step: -int(lengths[epoch[step]].max()))[:LOOKED_AT]
    by_sum = sorted(range(len(epoch)), key=lambda step: -int(lengths[epoch[step]].sum()))[:LOOKED_AT]
    best: tuple[tuple[int, int], Plan, int, MicroBatch] | None = None
    for step in dict.fromkeys([*by_row, *by_sum]):
        plan = micro_batches.plan(epoch[step])
        for rank in plan.parts:
            for place, part in enumerate(rank):
                batch = micro_batches.make(part)
                size = (batch.input_ids.numel(), len(batch.logit_positions))
                if best is None or size > best[0]:
                    best = (size, plan, place, batch)
    assert best is not None
    return best[1], best[2], best[3]


def predict_run(
    bare: Any,
    setting: Setting,
    micro_batches: MicroBatches,
    lengths: np.ndarray,
    batches: GlobalBatches,
    *,
    process: ProcessMemory,
    room: float,
) -> tuple[Prediction, list[str]]:
    """Peak memory of the rank with the longest micro-batch, and where it does not fit the settings that would.

    Args:
        bare: as for `predict`.
        setting: of the run.
        micro_batches: of the training rows.
        lengths: int64 [rows].
        batches: of the run.
        process: as for `predict`.
        room: bytes that the rank may have.
    """
    _, _, batch = longest_micro_batch(micro_batches, lengths, batches)
    predicted = predict(bare, setting, batch, process=process)
    if predicted.peak <= room:
        return predicted, []
    return predicted, remedies(predicted, bare, setting, longest=int(lengths.max()), room=room)


def epoch_flops(micro_batches: MicroBatches, batches: GlobalBatches) -> float:
    """Operations of an epoch, from a few of its steps."""
    epoch = batches.epoch(0)
    looked_at = epoch[:: -(-len(epoch) // LOOKED_AT)]
    return sum(micro_batches.plan(rows).flops for rows in looked_at) / len(looked_at) * len(epoch)


def seconds_of(flops: float, matmul_rate: float, dtype: torch.dtype, device: torch.device) -> float:
    """How long operations take on all ranks, from the rate of their own matrix product.

    Args:
        flops: operations.
        matmul_rate: of all ranks together, a second.
        dtype: that is computed in.
        device: whose habit to assume.
    """
    return flops / (matmul_rate * REACHED.get((device.type, dtype), min(REACHED.values())))


def remedies(prediction: Prediction, bare: Any, setting: Setting, *, longest: int, room: float) -> list[str]:
    """Settings with which the run would fit, each alone or where need be with recomputed activations, as flags.

    Args:
        prediction: that does not fit.
        bare: as for `predict`.
        setting: of that prediction.
        longest: tokens of the longest row.
        room: bytes that the rank may have.
    """
    model = shapes(bare, setting)
    layers = model.config.get_text_config().num_hidden_layers
    chosen = backend_class(setting.backend)

    def per_token(changed: Setting) -> float:
        return ActivationMemory.of(model, changed.options.dtype).per_token(changed.checkpointed_layers)

    def total(changed: Setting, tokens: int) -> float:
        """From the prediction, by what the formula says of the change."""
        factor = per_token(changed) * tokens / (per_token(setting) * prediction.tokens)
        now = prediction.activations
        scaled = Activations(now.first * factor, now.lasting * factor, now.kept * factor)
        held = chosen.memory(shapes(bare, changed), changed.options, changed.ranks)
        return replace(prediction, held=held, activations=scaled).peak

    def most_tokens(changed: Setting) -> int | None:
        """The largest round micro-batch that fits."""
        tokens = prediction.tokens
        while tokens > longest and total(changed, tokens) > room:
            tokens = max(longest, tokens * 3 // 4 // 64 * 64)
        return tokens if total(changed, tokens) <= room else None

    recomputing = replace(setting, checkpointed_layers=layers)
    bfloat16 = replace(setting, options=replace(setting.options, dtype=torch.bfloat16))
    adapter = LoraOptions(16, 32.0, 0.0, ["all-linear"], False, False)
    tried: list[tuple[str, Setting]] = [("", setting)]
    if setting.checkpointed_layers < layers:
        tried.append(("--gradient_checkpointing True", recomputing))
    if setting.options.dtype != torch.bfloat16:
        tried.append(("--dtype bfloat16", bfloat16))
    if setting.lora is None:
        frozen = replace(setting.options, trains_base=False)
        tried.append(("--lora_rank 16", replace(setting, lora=adapter, options=frozen)))
    for more in (2, 4, 8):
        tried.append((f"{setting.ranks * more} ranks", replace(setting, ranks=setting.ranks * more)))
    if setting.options.device.type != "cpu" and not setting.options.cpu_offload:
        tried.append(("--cpu_offload True", replace(setting, options=replace(setting.options, cpu_offload=True))))
    found: list[str] = []
    for words, changed in tried:
        if words.endswith(" ranks") and any(one.split(",")[0].endswith(" ranks") for one in found):
            continue  # fewer of them do
        try:
            tokens = most_tokens(changed)
        except UserError:  # --ds_config contradicts the flag
            continue
        if tokens is None:
            continue
        fewer = f"--max_tokens_per_micro_batch {tokens}" if tokens < prediction.tokens else ""
        found.append(" ".join(word for word in (words, fewer) if word))
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system, the allocator or the GPU has refused memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in OUT_OF_MEMORY)


def checkpoint_bytes(trained: int) -> int:
    """Weights and two moments of what is trained, float32."""
    return trained * 12


def checkpoints_kept(total_steps: int, steps: int, save_steps: int | str, most: int | None) -> int:
    """The most checkpoints that lie on the disk at once.

    With --max_checkpoints the newest, the best, and the one that is being written.

    Args:
        total_steps: of the run.
        steps: of an epoch.
        save_steps: the flag.
        most: the flag --max_checkpoints.
    """
    every = steps if isinstance(save_steps, str) else save_steps
    count = -(-total_steps // every) if every else 1
    return count if most is None else min(count, most + 2)
