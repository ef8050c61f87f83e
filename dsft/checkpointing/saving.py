"""Saving checkpoints: slices of the state from all ranks to files, synchronously or in the background."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
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
from dsft.checkpointing.tensor_files import Shape, TensorFile, TensorWriter, grouped, index_text, plan_files
from dsft.distributed.runtime import World
from dsft.errors import UserError
from dsft.files import is_refusal, reason

Result = TypeVar("Result")
MESSAGE_BYTES = 16 * 2**20  # small tensors are sent together up to this size
BACKGROUND_NICENESS = 19
GROUP_TIMEOUT = timedelta(hours=1)  # a slow disk must not end a run; dsft.distributed.liveness sees a dead rank


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of one checkpoint."""

    state: TrainerState
    slices: dict[str, list[tuple[str, StateSlice]]]
    """By start of the file name: (name in the file, slice), in the same order on all ranks."""
    small_files: dict[str, bytes]
    """By file name; only on rank 0."""
    metrics: tuple[Path, int]
    """metrics.jsonl, and its size in bytes at this step."""
    is_best: bool


class Checkpointer:
    """Saves the checkpoints of a run. Every rank calls every method, in the same order.

    They use a process group of their own, so that a save in the background does not mix with training's collectives.
    """

    def __init__(self, folder: CheckpointFolder, world: World, *, keep: int | None, asynchronous: bool) -> None:
        self._folder, self._world, self._keep, self._asynchronous = folder, world, keep, asynchronous
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.blocked_seconds = 0.0
        """For how long saves have blocked training."""

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed on this rank; `finish` raises the error."""
        return self._error is not None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; in the background, only wait for the previous one and copy the state.

        Raises:
            UserError: this checkpoint, or in the background the previous one, could not be written.
        """
        started = time.perf_counter()
        self.finish()
        if self._asynchronous:
            copied = {
                stem: [(name, replace(part, values=part.values.to("cpu", copy=True))) for name, part in parts]
                for stem, parts in snapshot.slices.items()
            }
            work = partial(self._write_in_background, replace(snapshot, slices=copied))
            self._thread = threading.Thread(target=work, daemon=True)
            self._thread.start()
        else:
            self._write(snapshot)
            self.finish()
        self.blocked_seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save in the background. Raises UserError on all ranks if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_in_background(self, snapshot: Snapshot) -> None:
        """At low priority, because training on CPU uses all cores. On Linux it is per thread, and inherited."""
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICENESS)
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
        """LoRA is small: rank 0 writes the weights in one file, as PEFT reads them, and the moments in another."""
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
        """Run `work` on every rank; returns all results, or raises the same UserError on all ranks."""
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
        keeps = f"{latest} is still valid" if latest else "no older checkpoint exists"
        place = f"cannot save {self._folder.path(step)}"
        if is_refusal(error):
            return f"{place}: {reason(error)}; {keeps}; free some space and rerun the same command"
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{place}: rank {self._world.rank}: {what}; {keeps} (--debug shows the traceback)"

    # Slices to files

    def _write_tensors(self, snapshot: Snapshot, files: list[TensorFile]) -> dict[str, str]:
        """Write this rank's files, and send its slices to the ranks that write the others.

        A thread sends, so that ranks write in parallel. Messages between two ranks keep their order, so
        there is no deadlock. A rank holds at most one message in addition to its slices.

        Returns:
            Checksums by file name of the files that this rank has written.
        """
        parts = {(stem, name): part for stem, of_stem in snapshot.slices.items() for name, part in of_stem}
        places = {key: (part.start, part.values.numel()) for key, part in parts.items()}
        everywhere = [places]
        if self._group is not None:
            everywhere = [{}] * self._world.size
            dist.all_gather_object(everywhere, places, group=self._group)
        messages = [(file, tensors) for file in files for tensors in grouped(file.tensors, MESSAGE_BYTES)]
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
        tensors: Sequence[tuple[str, Shape]],
        parts: dict[tuple[str, str], StateSlice],
        everywhere: list[dict[tuple[str, str], tuple[int, int]]],
    ) -> torch.Tensor:
        """The full tensors of a message, flattened and concatenated."""
        sizes = [math.prod(shape) for _, shape in tensors]
        whole = torch.empty(sum(sizes))
        views = whole.split(sizes)
        for rank, places in enumerate(everywhere):
            lengths = [places[key][1] for key in keys]
            targets = [view[places[key][0] :][: places[key][1]] for view, key in zip(views, keys, strict=True)]
            if rank == self._world.rank:
                pieces: Sequence[torch.Tensor] = [parts[key].values for key in keys]
            elif len(targets) == 1 and lengths[0]:  # a large tensor: received where it belongs
                dist.recv(targets[0], src=rank, group=self._group, tag=tag)
                continue
            else:
                joined = torch.empty(sum(lengths))
                if joined.numel():
                    dist.recv(joined, src=rank, group=self._group, tag=tag)
                pieces = joined.split(lengths)
            for target, piece in zip(targets, pieces, strict=True):
                target.copy_(piece)
        return whole
