"""A run's state to and from its checkpoints."""

import shutil
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dsft
from dsft.backends.base import MOMENTS, PARAMETER, Backend, StateSlice, trainable
from dsft.checkpointing.folder import ADAPTER, CONFIG, METRICS, MODEL, OPTIMIZER, CheckpointFolder
from dsft.checkpointing.saving import Checkpointer, Snapshot
from dsft.checkpointing.state import TrainerState, read_state
from dsft.checkpointing.tensor_files import TensorReader
from dsft.config import TrainConfig
from dsft.config.values import as_yaml
from dsft.distributed import runtime
from dsft.errors import UserError
from dsft.files import guard_disk
from dsft.training.base_model import BaseModel


class RunCheckpoints:
    """Restores and saves one run. Every rank calls every method, in the same order."""

    def __init__(
        self,
        config: TrainConfig,
        folder: CheckpointFolder,
        world: runtime.World,
        backend: Backend,
        model: Any,
        base: BaseModel,
    ) -> None:
        """`model` is what `backend` shards. The output folder exists.

        Raises:
            UserError: the output folder cannot be written.
        """
        self._config, self._folder, self._world = config, folder, world
        self._backend, self._weights_stem = backend, ADAPTER if config.lora_rank else MODEL
        parameters = trainable(model)
        self._shapes = {name: backend.shape(parameter) for name, parameter in parameters.items()}
        # PEFT leaves the adapter's name out of the names in its files.
        self._stored_name = {n: n.replace(".default", "") if config.lora_rank else n for n in parameters}
        self._small_files: dict[str, bytes] = {}
        runtime.on_main(world, lambda: guard_disk(partial(self._make_small_files, model, base), folder.root))
        self.writer = Checkpointer(folder, world, keep=config.max_checkpoints, asynchronous=config.async_save)

    def _make_small_files(self, model: Any, base: BaseModel) -> None:
        """Flags, adapter or model configuration, and tokenizer: the same in all checkpoints, so they are made once."""
        folder = self._folder.root / ".small_files.tmp"
        folder.mkdir()
        try:
            if self._config.lora_rank:
                model.peft_config["default"].save_pretrained(folder)
            else:
                model.config.save_pretrained(folder)
                model.generation_config.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
            self._small_files = {path.name: path.read_bytes() for path in folder.iterdir()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._small_files[CONFIG] = as_yaml(self._config).encode()

    # Restoring

    def restore(self, checkpoint: Path, now: TrainerState) -> TrainerState:
        """Load a checkpoint into the backend.

        Args:
            now: the state of this run if it started afresh; its rows must be those of the checkpoint.

        Raises:
            UserError: it is damaged, or of other rows or another model.
        """
        state, weights, moments = runtime.together(lambda: self._open(checkpoint, now.data))

        def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
            if kind == PARAMETER:
                return weights.read(self._stored_name[name], start, stop)
            return moments.read(f"{kind}.{name}", start, stop)

        self._backend.load_state(read, state.step)
        runtime.on_main(self._world, lambda: self.repair_links(state))
        if state.best_by != now.best_by:
            state = replace(state, best_by=now.best_by, best_step=None, best_loss=None)
        return replace(
            state, backend=now.backend, world_size=now.world_size, total_steps=now.total_steps, data=now.data
        )

    def _open(self, checkpoint: Path, fingerprint: str) -> tuple[TrainerState, TensorReader, TensorReader]:
        state, config = read_state(checkpoint), self._config
        if state.data != fingerprint and "train_files" not in (config.resume_override or []):
            without = ",".join(config.val_files or []) if config.on_leak == "drop_train" else ""
            raise UserError(
                f"{checkpoint} was trained on other rows than --train_files {','.join(config.train_files)} "
                + (f"without what leaks into --val_files {without} " if without else "")
                + "gives now; use the same files, another --output_dir, or --resume_override train_files"
            )
        weights, moments = self._weights_of(checkpoint), TensorReader(checkpoint, OPTIMIZER)
        moments.check({f"{kind}.{name}": shape for name, shape in self._shapes.items() for kind in MOMENTS})
        return state, weights, moments

    def start_from(self, checkpoint: Path) -> None:
        """Load the LoRA weights of --init_from; the optimizer starts afresh."""
        weights = runtime.together(lambda: self._weights_of(checkpoint))
        self._backend.load_state(
            lambda kind, name, start, stop: (
                weights.read(self._stored_name[name], start, stop) if kind == PARAMETER else torch.zeros(stop - start)
            ),
            step=0,
        )

    def _weights_of(self, checkpoint: Path) -> TensorReader:
        """A checkpoint's trained weights, which must be those of this model."""
        weights = TensorReader(checkpoint, self._weights_stem)
        weights.check({self._stored_name[name]: shape for name, shape in self._shapes.items()})
        return weights

    def repair_links(self, state: TrainerState) -> None:
        """Set the links that a killed run may have left behind after its last checkpoint was complete. Rank 0 only."""
        complete = set(self._folder.all())
        steps = {"latest": state.step, "best": state.best_step}
        for name, step in steps.items():
            if step is not None and (checkpoint := self._folder.path(step)) in complete:
                guard_disk(partial(self._folder.point, name, checkpoint), checkpoint)

    # Saving

    def save(self, state: TrainerState, metrics_bytes: int, *, is_best: bool) -> None:
        """Write a checkpoint of `state`, whose metrics.jsonl has `metrics_bytes` bytes.

        Raises:
            UserError: it, or with --async_save the one before, cannot be written.
        """
        packages = ("torch", "transformers", "peft", self._backend.library)
        state.versions = {"dsft": dsft.__version__} | {name: version(name) for name in packages}
        slices: dict[str, list[tuple[str, StateSlice]]] = {self._weights_stem: [], OPTIMIZER: []}
        for part in self._backend.state():
            if part.kind == PARAMETER:
                slices[self._weights_stem].append((self._stored_name[part.name], part))
            else:
                slices[OPTIMIZER].append((f"{part.kind}.{part.name}", part))
        metrics = (self._folder.root / METRICS, metrics_bytes)
        snapshot = Snapshot(replace(state), slices, self._small_files, metrics, is_best)
        runtime.together(lambda: self.writer.save(snapshot))  # whose ranks agree on errors among themselves
