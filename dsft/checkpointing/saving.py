"""Writing checkpoints: slices of the state from all ranks into files, in the foreground or beside the training."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dsft.backends.base import StateSlice
from dsft.checkpointing.folder import ADAPTER, METRICS, CheckpointFolder
from dsft.checkpointing.integrity import checksum
from dsft.checkpointing.state import STATE, TrainerState
from dsft.checkpointing.tensor_files import TensorFile, TensorWriter, index_text, plan_files
from dsft.distributed.runtime import World
from dsft.errors import UserError
from dsft.files import is_refusal, reason

Result = TypeVar("Result")
MESSAGE_BYTES = 16 * 2**20  # small tensors travel together up to this size
PRIORITY_ASIDE = 19  # a nice value
GROUP_TIMEOUT = timedelta(hours=1)  # a slow disk is no reason to end a run; a rank that has died is seen elsewhere


@dataclass(frozen=True)
class Snapshot:
    """All that one checkpoint holds, as far as this rank has it."""

    state: TrainerState
    slices: dict[str, list[tuple[str, StateSlice]]]
    """By stem of the file names: (name in the file, slice), in one order on all ranks."""
    small_files: dict[str, bytes]
    """By file name; only on rank 0."""
    metrics: tuple[Path, int]
    """metrics.jsonl, and how many of its bytes belong to this step."""
    is_best: bool


class Checkpointer:
    """Saves the checkpoints of a run. Every rank calls every method, in the same order.

    The ranks talk through a process group of their own, so that a save in the background never meets the training's
    collectives.
    """

    def __init__(self, folder: CheckpointFolder, world: World, *, keep: int | None, asynchronous: bool) -> None:
        self._folder, self._world, self._keep, self._asynchronous = folder, world, keep, asynchronous
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.blocked_seconds = 0.0
        """How long saves have kept the training waiting."""

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed on this rank; `finish` raises its error."""
        return self._error is not None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; in the background, only wait for the one before and copy the state.

        Raises:
            UserError: this checkpoint, or in the background the one before, could not be written.
        """
        started = time.perf_counter()
        self.finish()
        if self._asynchronous:
            copied = {
                stem: [(name, replace(part, values=part.values.to("cpu", copy=True))) for name, part in parts]
                for stem, parts in snapshot.slices.items()
            }
            work = partial(self._write_aside, replace(snapshot, slices=copied))
            self._thread = threading.Thread(target=work, daemon=True)
            self._thread.start()
        else:
            self._write(snapshot)
            self.finish()
        self.blocked_seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save in the background.

        Raises:
            UserError: it has failed; on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_aside(self, snapshot: Snapshot) -> None:
        """With what the training leaves of the processor: on CPU all of its cores compute. Linux has a priority a
        thread, which the threads that this one starts inherit.
        """
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PRIORITY_ASIDE)
        self._write(snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        step, is_main = snapshot.state.step, self._world.is_main
        try:
            files = self._plan(snapshot)
            self._agree(lambda: self._folder.begin(step) if is_main else None, step)
            sums: dict[str, str] = {}
            for written in self._agree(lambda: self._write_tensors(snapshot, files), step):
                sums |= written
            self._agree(lambda: self._complete(snapshot, files, sums) if is_main else None, step)
        except Exception as error:
            self._error = error
            if is_main:
                self._folder.abandon(step)

    def _plan(self, snapshot: Snapshot) -> list[TensorFile]:
        """LoRA is small: rank 0 writes it, the weights in one file, as PEFT reads them, and the moments in another."""
        files: list[TensorFile] = []
        for stem, parts in snapshot.slices.items():
            tensors = [(name, part.shape) for name, part in parts]
            if ADAPTER in snapshot.slices:
                files.append(TensorFile(f"{stem}.safetensors", tensors, owner=0))
            else:
                files += plan_files(stem, tensors, self._world.size, first_owner=len(files) % self._world.size)
        return files

    def _complete(self, snapshot: Snapshot, files: list[TensorFile], sums: dict[str, str]) -> None:
        folder = self._folder.unfinished(snapshot.state.step)
        texts = {STATE: snapshot.state.to_json().encode()}
        for stem in snapshot.slices:
            numbered = [file for file in files if file.name.startswith(f"{stem}-")]
            if numbered:
                texts[f"{stem}.safetensors.index.json"] = index_text(numbered).encode()
        path, length = snapshot.metrics
        with open(path, "rb") as handle:
            texts[METRICS] = handle.read(length)
        for name, content in (snapshot.small_files | texts).items():
            with open(folder / name, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            sums[name] = checksum(folder / name)
        checkpoint = self._folder.commit(snapshot.state.step, sums)
        self._folder.point("latest", checkpoint)
        if snapshot.is_best:
            self._folder.point("best", checkpoint)
        self._folder.rotate(self._keep)

    def _agree(self, work: Callable[[], Result], step: int) -> list[Result]:
        """Run `work` on every rank; the results of all of them, or the same UserError on all of them."""
        result, text = None, None
        try:
            result = work()
        except Exception as error:
            text = self._refusal(step, error)
        everywhere: list[Any] = [(result, text)]
        if self._group is not None:
            everywhere = [None] * self._world.size
            dist.all_gather_object(everywhere, (result, text), group=self._group)
        for _, failed in everywhere:
            if failed is not None:
                raise UserError(failed)
        return [one for one, _ in everywhere]

    def _refusal(self, step: int, error: Exception) -> str:
        if isinstance(error, UserError):
            return str(error)
        latest = self._folder.latest()
        keeps = f"{latest} is still valid" if latest else "there is no older checkpoint"
        place = f"cannot save {self._folder.path(step)}"
        if is_refusal(error):
            return f"{place}: {reason(error)}; {keeps}; make room and start the same command again"
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{place}: rank {self._world.rank}: {what}; {keeps} (--debug shows more)"

    # Slices to files

    def _write_tensors(self, snapshot: Snapshot, files: list[TensorFile]) -> dict[str, str]:
        """This rank's part of writing all files: it writes its own ones, and sends the other ranks what they need.

        Sending has a thread of its own, so that ranks write at the same time: for every pair of ranks messages keep one
        order, therefore none can wait for ever. No rank holds more than one message beside what it was given.

        Returns:
            Checksums by file name of the files that this rank has written.
        """
        parts = {(stem, name): part for stem, of_stem in snapshot.slices.items() for name, part in of_stem}
        places = {key: (part.start, part.values.numel()) for key, part in parts.items()}
        everywhere = [places]
        if self._group is not None:
            everywhere = [{}] * self._world.size
            dist.all_gather_object(everywhere, places, group=self._group)
        messages = list(_messages(files))
        stem_of = {file.name: next(stem for stem in snapshot.slices if file.name.startswith(stem)) for file in files}
        failures: list[Exception] = []

        def send() -> None:
            try:
                for tag, (file, tensors) in enumerate(messages):
                    if file.owner == self._world.rank:
                        continue
                    values = [parts[stem_of[file.name], name].values.to("cpu") for name, _ in tensors]
                    joined = values[0] if len(values) == 1 else torch.cat(values)
                    if joined.numel():
                        dist.send(joined, dst=file.owner, group=self._group, tag=tag)
            except Exception as error:
                failures.append(error)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        sums: dict[str, str] = {}
        folder = self._folder.unfinished(snapshot.state.step)
        for file in files:
            if file.owner != self._world.rank:
                continue
            received = (
                self._receive(tag, [(stem_of[file.name], name) for name, _ in tensors], tensors, parts, everywhere)
                for tag, (other, tensors) in enumerate(messages)
                if other is file
            )
            try:
                with TensorWriter(folder / file.name, file.tensors) as writer:
                    for values in received:
                        writer.write(values)
                    sums[file.name] = writer.finish()
            except Exception as error:
                failures.append(error)
                for _ in received:  # the others still send
                    pass
        sender.join()
        if failures:
            raise failures[0]
        return sums

    def _receive(
        self,
        tag: int,
        keys: list[tuple[str, str]],
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        parts: dict[tuple[str, str], StateSlice],
        everywhere: list[dict[tuple[str, str], tuple[int, int]]],
    ) -> torch.Tensor:
        """The whole tensors of a message, flattened, one behind the other: float32 1-D."""
        sizes = [math.prod(shape) for _, shape in tensors]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        whole = torch.empty(sum(sizes))
        for rank, places in enumerate(everywhere):
            ranges = [(start + places[key][0], places[key][1]) for key, start in zip(keys, starts, strict=True)]
            if rank == self._world.rank:
                for (start, length), key in zip(ranges, keys, strict=True):
                    whole[start : start + length] = parts[key].values
            elif len(ranges) == 1:
                start, length = ranges[0]
                if length:
                    dist.recv(whole[start : start + length], src=rank, group=self._group, tag=tag)
            elif sum(length for _, length in ranges):
                joined = torch.empty(sum(length for _, length in ranges))
                dist.recv(joined, src=rank, group=self._group, tag=tag)
                for start, length in ranges:
                    whole[start : start + length] = joined[:length]
                    joined = joined[length:]
        return whole


def _messages(files: Sequence[TensorFile]) -> Iterator[tuple[TensorFile, list[tuple[str, tuple[int, ...]]]]]:
    """What travels together: neighbours in one file, up to MESSAGE_BYTES, or one larger tensor."""
    for file in files:
        together: list[tuple[str, tuple[int, ...]]] = []
        size = 0
        for name, shape in file.tensors:
            more = 4 * math.prod(shape)
            if together and size + more > MESSAGE_BYTES:
                yield file, together
                together, size = [], 0
            together.append((name, shape))
            size += more
        yield file, together
