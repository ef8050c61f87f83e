"""The Trainer: build, step, validate, save, in the order in which they run. It names no backend."""

import math
import time
from contextlib import suppress
from dataclasses import replace

import torch

from dsft.backends import backend_class
from dsft.checkpointing.folder import CONFIG, CheckpointFolder
from dsft.checkpointing.resuming import InitialWeights, find_resume, open_output, read_history
from dsft.checkpointing.state import TrainerState, with_command
from dsft.config import EVERY_EPOCH, TrainConfig
from dsft.config.train import VAL_LOSS
from dsft.config.values import as_yaml
from dsft.dataset.micro_batches import MicroBatches
from dsft.distributed import runtime
from dsft.distributed.liveness import Liveness
from dsft.distributed.rendezvous import start_process_group
from dsft.errors import UserError
from dsft.files import guard_disk, write_text
from dsft.loss import mean_losses, perplexity, source_losses, summed_loss, validation_losses
from dsft.model.flops import measure_matmul
from dsft.planning.activations import free_memory
from dsft.planning.disk import disk_warning
from dsft.planning.out_of_memory import out_of_memory, refuse
from dsft.planning.plan import backend_options, choose_sharding
from dsft.planning.prediction import ProcessMemory
from dsft.processes import launch_command
from dsft.training.base_model import BaseModel, build_model, find_base_model
from dsft.training.checkpoints import RunCheckpoints
from dsft.training.data import load_data
from dsft.training.dry_run import dry_run
from dsft.training.optimizer import make_optimizer
from dsft.training.summary import end_lines, resume_hint, start_lines
from dsft.training.tracking import Console, Tracker, warn
from dsft.units import gib


class Trainer:
    """One run. `Trainer(config).train()` is all that a command line calls."""

    def __init__(self, config: TrainConfig) -> None:
        """Build everything up to the first step, on every rank.

        Raises:
            UserError: on the rank that says what is wrong; PeerFailedError on the others.
        """
        self.config = config
        self.world = runtime.World.from_environment()
        self.folder = CheckpointFolder(config.output_dir)
        self.remedies: list[str] = []
        self._validated_step: int | None = None
        with out_of_memory(config, lambda: self.remedies):
            self._build()

    # Building

    def _build(self) -> None:
        config, world = self.config, self.world
        self._start_runtime()
        self.resume_from = runtime.on_main(world, lambda: find_resume(config, self.folder, warn))
        runtime.check_visible(self.resume_from)
        base = find_base_model(config, self.resume_from, world, self.dtype)
        self.data = load_data(config, base.tokenizer, world, warn)
        self._plan(base)
        self.backend = backend_class(config.backend)(replace(self.options, sharding=self.plan.sharding))
        self.model, self.head = build_model(
            config, base, self.plan, self.backend, self._make_optimizer, self.data.total_steps
        )
        if world.is_main and base.source.loads_whole:
            size = gib(self.plan.parameters * self.dtype.itemsize)
            warn(f"transformers converts the weights of {config.model} while loading: each rank has held all {size}")
        runtime.return_freed_memory()
        runtime.on_main(world, self._open_output)
        runtime.check_visible(self.folder.root if config.dry_run else self.folder.root / CONFIG)
        self.checkpoints = RunCheckpoints(config, self.folder, world, self.backend, self.model, base)
        self.state = self._restore(base.initial_adapter)
        self.console = runtime.together(self._open_console)
        for line in start_lines(
            config, self.data, self.plan, self.needs, self.state, self.resume_from, self.device, self.dtype_name
        ):
            self.console.say(line)
        if world.is_main and (message := disk_warning(config, self.plan.trained, self.needs, self.folder.root)):
            warn(message)

    def _start_runtime(self) -> None:
        config, world = self.config, self.world
        self.liveness = Liveness(lambda: resume_hint(self.folder), debug=config.debug)
        self.liveness.start()
        if not config.debug:
            runtime.silence_libraries()
        runtime.set_threads(world)
        self.device = runtime.pick_device(world)
        runtime.return_freed_memory()
        start_process_group(self.device)
        self.liveness.meet()
        runtime.check_same_everywhere(as_yaml(config), "the flags", "start all ranks alike")
        runtime.seed_everything(config.seed, deterministic=config.deterministic)
        self.dtype = runtime.pick_dtype(config.dtype, self.device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        ranks = {"ranks": world.size, "ranks_per_node": runtime.ranks_per_node(world)}
        self.options = backend_options(config, self.device, self.dtype, **ranks)
        runtime.together(lambda: backend_class(config.backend)(self.options))  # only to check them

    def _plan(self, base: BaseModel) -> None:
        """Lay the run out, and predict what it needs; nothing of the model has been read yet."""
        config, data = self.config, self.data
        [free] = runtime.min_over_ranks([free_memory(self.device, self.world)], self.device)
        [self.matmul_rate] = runtime.sum_over_ranks([measure_matmul(self.dtype, self.device)], self.device)
        memory = ProcessMemory.of(self.device, free)
        rows = data.train, data.batches, data.longest
        self.plan, self.needs = runtime.on_main(
            self.world,
            lambda: choose_sharding(config, base.shapes, self.options, memory, *rows, self.matmul_rate),
        )
        self.remedies, plan = self.needs.remedies, self.plan
        train, *val = runtime.together(
            lambda: [
                MicroBatches(rows, plan.micro_batches, plan.cost, base.tokenizer.pad_token_id) for rows in data.sets
            ]
        )
        self.train_micro_batches, self.val_micro_batches = train, val[0] if val else None

    def _make_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(parameters, self.config)

    def _open_output(self) -> None:
        """Fail now, not at the first checkpoint."""
        config, root = self.config, self.folder.root
        if config.dry_run:
            guard_disk(lambda: root.mkdir(parents=True, exist_ok=True), root)
            return
        open_output(self.folder, self.resume_from, warn)
        text = with_command(as_yaml(config), launch_command(without=("resume", "stop_after_steps")))
        guard_disk(lambda: write_text(root / CONFIG, text), root / CONFIG)

    def _restore(self, initial: InitialWeights | None) -> TrainerState:
        config, data = self.config, self.data
        start = (0, data.total_steps, 0.0, config.backend, self.world.size, data.train.fingerprint)
        state = TrainerState(*start, best_by=config.best_by)
        if self.resume_from is not None:
            return self.checkpoints.restore(self.resume_from, state)
        if initial is not None:
            self.checkpoints.start_from(initial.folder)
        return state

    def _open_console(self) -> Console:
        if self.config.dry_run or not self.world.is_main:
            return Console(enabled=self.world.is_main)
        history = read_history(self.resume_from) if self.resume_from else ""
        return Tracker(self.config, self.folder.root, self.dtype_name, self.state, history)

    # Running

    def train(self) -> None:
        """All steps that are left, with their evaluations and checkpoints, or up to a stop; or a dry run."""
        try:
            with out_of_memory(self.config, lambda: self.remedies):
                if self.config.dry_run:
                    self._dry_run()
                else:
                    self._train()
            self.console.close()
            self.backend.close()
        finally:
            self.folder.unlock()

    def _dry_run(self) -> None:
        """Raise UserError where the run would not fit into memory, or something that it needs does not work."""
        runtime.together(lambda: refuse(self.needs))
        runtime.seed_step(self.config.seed, self.state.step, self.world.rank)
        report = dry_run(
            self.backend, self.head, self.data, self.train_micro_batches, self.needs, self.world, self.device
        )
        self._refuse_non_finite(report.loss, "the loss of the longest micro-batch")
        runtime.on_main(self.world, lambda: report.write(self.folder.root))
        for line in report.lines():
            self.console.say(line)

    def _train(self) -> None:
        command = launch_command(without=("resume", "stop_after_steps"))  # while its launcher lives
        self._last_save = time.monotonic()
        with runtime.StopSignals() as stop:
            self.liveness.on_orphaned = stop.orphaned
            try:
                stopped = self._take_steps(stop)
            except (UserError, runtime.PeerFailedError):  # on all ranks at the same place
                with suppress(Exception):
                    self.checkpoints.writer.finish()  # what is in flight is still good
                raise
            runtime.together(self.checkpoints.writer.finish)
        if self.state.step == self.data.total_steps and not self.state.validation_due:
            for line in end_lines(self.config, self.folder, self.state):
                self.console.say(line)
        else:
            reason = stopped or f"--stop_after_steps {self.config.stop_after_steps}"
            self.console.say(f"stopped by {reason} after step {self.state.step}; to resume: {command}")

    def _take_steps(self, stop: runtime.StopSignals) -> str | None:
        """Returns what asked the run to stop before its end, if anything did."""
        config, state = self.config, self.state
        end = min(self.data.total_steps, config.stop_after_steps or self.data.total_steps)
        stopped = None
        if state.validation_due and self.val_micro_batches is not None:  # the run was stopped before it
            self._validate()
            # The checkpoint exists already. Written again, it could be lost by a kill in between.
            if self._is_best():
                runtime.on_main(self.world, lambda: self.checkpoints.repair_links(state))
        elif config.validate_before_training and state.step == 0 and self.val_micro_batches is not None:
            self._validate()
        while state.step < end and not stopped:
            stopped, save_by_time = self._step(stop)
            save = state.step == self.data.total_steps or self._is_due(config.save_steps)
            validates = self.val_micro_batches is not None and config.eval_steps != 0
            if validates and (save or self._is_due(config.eval_steps)):
                if stopped:
                    state.validation_due = True  # whoever stops a run does not wait for that long
                else:
                    self._validate()
            if save or stopped or save_by_time or state.step == end:
                self._save()
        return stopped

    def _is_due(self, interval: int | str) -> bool:
        if interval == EVERY_EPOCH:
            return self.state.epoch == int(self.state.epoch)
        return int(interval) > 0 and self.state.step % int(interval) == 0

    def _step(self, stop: runtime.StopSignals) -> tuple[str | None, bool]:
        """One optimizer step over one global batch.

        Returns:
            What asks the run to stop, on whichever rank, if anything does; and whether --save_seconds have passed.
        """
        state, batches = self.state, self.train_micro_batches
        started = time.perf_counter()
        runtime.seed_step(self.config.seed, state.step, self.world.rank)
        plan = batches.plan(self.data.batches[state.step])
        parts = plan.parts[self.world.rank]
        data_seconds = time.perf_counter() - started
        self.backend.model.train()
        sums = torch.zeros(len(batches.sources), dtype=torch.float64, device=self.device)
        for index, part in enumerate(parts):
            before = time.perf_counter()
            batch = batches.make(part).to(self.device)
            data_seconds += time.perf_counter() - before
            loss = summed_loss(self.backend.model, self.head, batch)
            self.backend.backward(loss / plan.weight, last_micro_batch=index == len(parts) - 1)
            sums += source_losses(self.head, batch)
        totals, stopped, save_by_time = self._agree(sums.tolist(), stop)
        losses = mean_losses("train/loss", batches.sources, totals, plan)
        self._refuse_non_finite(losses["train/loss"], f"the loss of step {state.step + 1}")
        rate = self.backend.learning_rate()
        norm = self.backend.step()
        self._refuse_non_finite(norm, f"the gradient norm of step {state.step + 1}")
        state.step += 1
        state.epoch = self.data.batches.epochs_after(state.step)
        state.position = self.data.batches.position(state.step)
        state.validation_due = False
        seconds = time.perf_counter() - started
        metrics = losses | {
            "train/grad_norm": norm,
            "train/lr": rate,
            "train/targets": plan.targets,
            "train/tokens": plan.row_tokens,
            "train/tokens_per_second": plan.tokens / seconds,
            "train/effective_tokens_per_second": plan.row_tokens / seconds,
            "train/fold_ratio": plan.row_tokens / plan.tokens,
            "train/mfu": plan.flops / seconds / self.matmul_rate,
            "train/rank_imbalance": plan.imbalance,
            "train/data_seconds": data_seconds,
            "train/save_seconds": self.checkpoints.writer.blocked_seconds,
            "train/step_seconds": seconds,
            "memory": runtime.peak_memory_gib(self.device),
        }
        self.console.step(self._place() | metrics)
        self.checkpoints.writer.blocked_seconds = 0.0
        return stopped, save_by_time

    def _agree(self, sums: list[float], stop: runtime.StopSignals) -> tuple[list[float], str | None, bool]:
        """One collective per step: the losses over all ranks, what asks the run to stop, and whether a save is due."""
        limit = self.config.save_seconds
        save_by_time = self.world.is_main and limit is not None and time.monotonic() - self._last_save >= limit
        failed = self.console.error is not None or self.checkpoints.writer.has_failed
        reasons = [stop.received == reason for reason in stop.REASONS]
        values = [*map(float, (failed, save_by_time, *reasons)), *sums]
        failures, due, *totals = runtime.sum_over_ranks(values, self.device)
        if failures:
            self._raise_background_error()
        counts, totals = totals[: len(reasons)], totals[len(reasons) :]
        asked = [reason for reason, count in zip(stop.REASONS, counts, strict=True) if count]
        return totals, asked[0] if asked else None, due > 0

    def _refuse_non_finite(self, value: float, what: str) -> None:
        """The value is the same on all ranks, so all of them stop here."""
        if math.isfinite(value):
            return
        latest = self.folder.latest()
        if self.state.step == 0:
            remedy = f"no weight has changed yet, so check those of --model {self.config.model}"
        else:
            remedy = "try a lower --lr in another --output_dir"
        runtime.fail_together(
            f"{what} is {value}; the run has stopped, {f'{latest} is valid' if latest else 'nothing was saved'}; "
            + remedy
            + (", or --dtype float32" if self.dtype_name != "float32" else "")
        )

    def _validate(self) -> None:
        assert self.val_micro_batches is not None
        self.backend.model.eval()
        losses = validation_losses(self.backend.model, self.head, self.val_micro_batches, self.world, self.device)
        self._refuse_non_finite(losses[VAL_LOSS], f"the validation loss after step {self.state.step}")
        self.state.val_losses, self._validated_step = losses, self.state.step
        self.state.validation_due = False
        self.console.evaluation(self._place() | losses | {"val/perplexity": perplexity(losses[VAL_LOSS])})

    def _place(self) -> dict[str, float]:
        return {"step": self.state.step, "epoch": round(self.state.epoch, 6)}

    def _raise_background_error(self) -> None:
        """End all ranks where the log, or a checkpoint in the background, could not be written on one of them."""

        def check() -> None:
            if self.console.error is not None:
                raise self.console.error
            if self.checkpoints.writer.has_failed:
                self.checkpoints.writer.finish()

        runtime.together(check)

    # Saving

    def _is_best(self) -> bool:
        """Whether the --best_by of this step, if it was validated, is the lowest so far; then it is noted."""
        state, loss = self.state, self.state.val_losses.get(self.config.best_by)
        if loss is None or (state.best_loss is not None and loss >= state.best_loss):
            return False
        state.best_step, state.best_loss = state.step, loss
        return True

    def _save(self) -> None:
        """A checkpoint of this step; every rank takes part."""
        self._raise_background_error()
        if self._validated_step != self.state.step:
            self.state.val_losses = {}
        self.checkpoints.save(self.state, self.console.metrics_bytes, is_best=self._is_best())
        self._last_save = time.monotonic()
