"""The Trainer: build, one step, evaluate, save, in the order in which they run. It names no backend."""

import math
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

import dsft
from dsft.backends import backend_class
from dsft.backends.base import MOMENTS, PARAMETER, StateSlice, trainable
from dsft.checkpointing.folder import ADAPTER, CONFIG, METRICS, MODEL, OPTIMIZER, CheckpointFolder
from dsft.checkpointing.models import resolve_model
from dsft.checkpointing.saving import Checkpointer, Snapshot
from dsft.checkpointing.state import TrainerState, read_state
from dsft.checkpointing.tensor_files import TensorReader
from dsft.config import EVERY_EPOCH, TrainConfig
from dsft.config.values import as_yaml
from dsft.dataset.batches import GlobalBatches
from dsft.dataset.leaks import separate
from dsft.dataset.micro_batches import Layout, MicroBatches
from dsft.dataset.tokens import DataFormat, TokenDataset, load_dataset
from dsft.distributed import runtime
from dsft.distributed.liveness import Liveness
from dsft.errors import UserError
from dsft.files import guard_disk, write_text
from dsft.loss import TargetHead, loss_metrics, mean_loss, summed_loss
from dsft.model import tree_attention
from dsft.model.flops import count_flops, measure_matmul
from dsft.model.initial_weights import LoraInitializer
from dsft.model.lora import add_lora
from dsft.model.source import ModelSource, load_tokenizer
from dsft.planning import prediction as preflight
from dsft.planning.activations import ActivationMemory, fit_micro_batches, free_memory, recompute_layers
from dsft.planning.options import backend_options, lora_options
from dsft.planning.report import DryRun, disk_warning, memory_lines, out_of_memory, refuse, time_line
from dsft.processes import launch_command
from dsft.training.optimizer import learning_rate_factor
from dsft.training.resuming import find_initial_weights, find_resume, open_output, read_history
from dsft.training.tracking import Tracker


class Trainer:
    """One run. `Trainer(config).train()` is all that a command line calls."""

    def __init__(self, config: TrainConfig) -> None:
        """Build everything up to the first step, on every rank.

        Raises:
            UserError: on the rank that says what is wrong; PeerFailedError on the others.
        """
        self.config = config
        self.world = runtime.World.from_environment()
        with out_of_memory(config, lambda: self.remedies):
            self._build()

    def _build(self) -> None:
        config = self.config
        self.remedies: list[str] = []
        self.folder = CheckpointFolder(config.output_dir)
        self.liveness = Liveness(self._how_to_go_on, debug=config.debug)
        self.liveness.start()
        self._start_runtime()
        self.resume_from = runtime.on_main(self.world, lambda: find_resume(config, self.folder, warn))
        runtime.check_same_everywhere(
            str(self.resume_from is None or self.resume_from.is_dir()),
            f"whether {self.resume_from} is there",
            "all machines must see the same folder",
        )
        self._load_data()
        self.process_memory = preflight.ProcessMemory.of(self.device)
        self.room = (
            self.process_memory.now + runtime.min_over_ranks([free_memory(self.device, self.world)], self.device)[0]
        )
        self._load_model()
        self._fit_memory()
        self._predict()
        self._make_output()
        self.state = TrainerState(
            0, self.total_steps, 0.0, config.backend, self.world.size, self.train_data.fingerprint
        )
        if self.resume_from is not None:
            self._restore(self.resume_from)
        elif self.initial is not None and self.initial.is_adapter:
            self._start_from(self.initial.folder)
        self._log_error: UserError | None = None
        self._last_save = time.monotonic()
        self._open_output()

    # Building

    def _start_runtime(self) -> None:
        config = self.config
        if not config.debug:
            runtime.silence_libraries()
        runtime.set_threads(self.world)
        self.device = runtime.pick_device(self.world)
        if self.device.type == "cpu":
            runtime.return_freed_memory()
        runtime.start_process_group(self.world, self.device)
        self.liveness.meet()
        runtime.check_same_everywhere(as_yaml(config), "the flags", "start all ranks alike")
        runtime.seed_everything(config.seed, deterministic=config.deterministic)
        dtype = self.dtype = runtime.pick_dtype(config.dtype, self.device)
        self.dtype_name = str(dtype).removeprefix("torch.")
        chosen = backend_class(config.backend)
        self.backend = chosen(runtime.together(lambda: backend_options(config, self.device, dtype)))

    def _load_data(self) -> None:
        config = self.config
        first = self.world.local_rank == 0
        self.model_path = runtime.on_first_local_rank(self.world, lambda: resolve_model(config.model, check=first))
        is_folder = self.model_path == str(Path(config.model).expanduser().resolve())
        self.base_name = self.model_path if is_folder else config.model  # for adapter_config.json
        self.initial = runtime.together(
            lambda: find_initial_weights(config, self.model_path, self.resume_from, check=first)
        )
        if self.initial is not None and not self.initial.is_adapter:
            self.model_path = self.base_name = str(self.initial.folder)
        self.tokenizer = runtime.together(
            lambda: load_tokenizer(self.model_path, trust_remote_code=config.trust_remote_code)
        )
        data_format = DataFormat.from_flags(config)

        def load(names: list[str], flag: str, max_rows: int | None) -> TokenDataset:
            return runtime.on_first_local_rank(
                self.world,
                lambda: load_dataset(
                    names, flag, self.tokenizer, data_format, max_rows=max_rows, show_progress=self.world.is_main
                ),
            )

        self.train_data = load(config.train_files, "train_files", config.max_train_rows)
        self.val_data = load(config.val_files, "val_files", config.max_val_rows) if config.val_files else None
        prints = [self.train_data.fingerprint, self.val_data.fingerprint if self.val_data else "none"]
        runtime.check_same_everywhere(
            "\n".join(prints), "the rows of --train_files or --val_files", "give all machines the same files and model"
        )
        train, val = self.train_data, self.val_data
        separation = runtime.on_main(self.world, lambda: separate(train, val, config, warn))
        self.train_data, self.val_data = separation.apply(train, val)
        self.leak_text = separation.text
        rows = len(self.train_data)
        dialogue = np.arange(rows) if config.fold == "off" else self.train_data.dialogue
        self.global_batches = GlobalBatches(
            dialogue, self.train_data.sorted_place, config.train_batch_size, config.seed
        )
        self.total_steps = config.total_training_steps or self.global_batches.first_step(config.total_epochs)

    def _load_model(self) -> None:
        config = self.config
        source = ModelSource(
            self.model_path,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
        runtime.together(source.check)
        self.shapes = source.empty(self.dtype)  # before a backend changes how models are built
        self.backend.setup()
        model: Any = self.backend.load_model(source)
        model.config.use_cache = False
        self.why_no_trees = tree_attention.why_no_trees(model, config.attn_implementation)
        if self.why_no_trees is None:
            model.set_attn_implementation(tree_attention.NAME)
        lora = lora_options(config)
        if lora is not None:
            base = model
            model = runtime.together(lambda: add_lora(base, lora, self.base_name))
            source.after_fill = LoraInitializer(model, config.seed)
            source.after_fill(model)
        self.head = TargetHead(model)
        self.full_model = model
        self.backend.prepare(model, self._make_optimizer, self._make_scheduler)

    def _fit_memory(self) -> None:
        """Decide what is recomputed and how many tokens a micro-batch has, and measure the machine."""
        config, model = self.config, self.full_model
        memory = ActivationMemory.of(model, self.dtype)
        [free] = runtime.min_over_ranks([free_memory(self.device, self.world)], self.device)
        datasets = [data for data in (self.train_data, self.val_data) if data is not None]
        longest = max(int(data.lengths.max()) for data in datasets)
        self.checkpointed_layers, budget = fit_micro_batches(
            memory, free, longest, self.device, config.gradient_checkpointing, config.max_tokens_per_micro_batch
        )
        recompute_layers(model, self.checkpointed_layers)
        self.layout = Layout(self.world.size, budget, fold=config.fold != "off", trees=self.why_no_trees is None)
        cost = count_flops(model, self.backend.shape)
        self.train_micro_batches, *rest = runtime.together(
            lambda: [MicroBatches(data, self.layout, cost, self.tokenizer.pad_token_id) for data in datasets]
        )
        self.val_micro_batches = rest[0] if rest else None
        [self.matmul_rate] = runtime.sum_over_ranks([measure_matmul(self.dtype, self.device)], self.device)

    def _predict(self) -> None:
        """Peak memory of the rank with the longest micro-batch, and time; by rank 0, for all."""
        config = self.config

        def work() -> tuple[preflight.Prediction, list[str]]:
            setting = preflight.Setting(
                config.backend,
                self.backend.options,
                self.world.size,
                lora_options(config),
                self.checkpointed_layers,
                config.async_save,
            )
            return preflight.predict_run(
                self.shapes,
                setting,
                self.train_micro_batches,
                self.train_data.lengths,
                self.global_batches,
                process=self.process_memory,
                room=self.room,
            )

        self.prediction, self.remedies = runtime.on_main(self.world, work)
        flops = preflight.epoch_flops(self.train_micro_batches, self.global_batches)
        self.step_flops = flops / self.global_batches.first_step(1)
        seconds = preflight.seconds_of(flops, self.matmul_rate, self.dtype, self.device)
        self.step_seconds = seconds / self.global_batches.first_step(1)

    def _make_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        config = self.config
        warmup = int(config.warmup_ratio * self.total_steps)
        return LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, warmup, self.total_steps, config.schedule, config.min_lr_ratio),
        )

    def _make_output(self) -> None:
        """Fail now, not at the first checkpoint."""
        config, root = self.config, self.folder.root

        def make() -> None:
            if config.dry_run:
                guard_disk(lambda: root.mkdir(parents=True, exist_ok=True), root)
            else:
                open_output(self.folder, self.resume_from, warn)
                guard_disk(lambda: write_text(root / CONFIG, as_yaml(config)), root / CONFIG)
            guard_disk(self._make_small_files, root)

        runtime.on_main(self.world, make)
        seen = root if config.dry_run else root / CONFIG
        runtime.check_same_everywhere(
            str(seen.exists()), f"whether {seen} is there", "all machines must see the same folder"
        )
        self.checkpointer = Checkpointer(
            self.folder, self.world, keep=config.max_checkpoints, asynchronous=config.async_save
        )

    def _make_small_files(self) -> None:
        """Flags, adapter or model configuration, and tokenizer: the same in all checkpoints, so they are made once."""
        folder = self.folder.root / ".small_files.tmp"
        folder.mkdir()
        try:
            if self.config.lora_rank:
                self.full_model.peft_config["default"].save_pretrained(folder)
            else:
                self.full_model.config.save_pretrained(folder)
                self.full_model.generation_config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self._small_files = {path.name: path.read_bytes() for path in folder.iterdir()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._small_files[CONFIG] = as_yaml(self.config).encode()

    def _how_to_go_on(self) -> str:
        """For a run that is ended by the loss of a rank."""
        latest = self.folder.latest()
        return f"the same command goes on from {latest}" if latest else "there is no checkpoint to go on from"

    def _restore(self, checkpoint: Path) -> None:
        def read() -> tuple[TrainerState, TensorReader, TensorReader]:
            state = read_state(checkpoint)
            if state.data != self.train_data.fingerprint and "train_files" not in (self.config.resume_override or []):
                without = ",".join(self.config.val_files or []) if self.config.on_leak == "drop_train" else ""
                raise UserError(
                    f"{checkpoint} was trained on other rows than --train_files {','.join(self.config.train_files)} "
                    + (f"without what leaks into --val_files {without} " if without else "")
                    + "gives now; use the same files, another --output_dir, or --resume_override train_files"
                )
            return state, self._weights_of(checkpoint), TensorReader(checkpoint, OPTIMIZER)

        def check() -> None:
            moments.check({f"{kind}.{name}": shape for name, shape in self._shapes().items() for kind in MOMENTS})

        stored_name = self._stored_names()
        self.state, weights, moments = runtime.together(read)
        runtime.together(check)

        def value(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
            if kind == PARAMETER:
                return weights.read(stored_name[name], start, stop)
            return moments.read(f"{kind}.{name}", start, stop)

        self.backend.load_state(value, self.state.step)
        self.state.backend, self.state.world_size = self.config.backend, self.world.size
        self.state.total_steps, self.state.data = self.total_steps, self.train_data.fingerprint
        runtime.on_main(self.world, self._repair_links)

    def _start_from(self, checkpoint: Path) -> None:
        """The LoRA weights of --init_from, with moments and schedule as at any start."""
        weights, stored_name = runtime.together(lambda: self._weights_of(checkpoint)), self._stored_names()
        self.backend.load_state(
            lambda kind, name, start, stop: (
                weights.read(stored_name[name], start, stop) if kind == PARAMETER else torch.zeros(stop - start)
            ),
            step=0,
        )

    def _weights_of(self, checkpoint: Path) -> TensorReader:
        """A checkpoint's trained weights, which must be those of this model."""
        weights, stored_name = TensorReader(checkpoint, self._weights_stem), self._stored_names()
        weights.check({stored_name[name]: shape for name, shape in self._shapes().items()})
        return weights

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.backend.shape(parameter) for name, parameter in trainable(self.full_model).items()}

    @property
    def _weights_stem(self) -> str:
        return ADAPTER if self.config.lora_rank else MODEL

    def _repair_links(self) -> None:
        """The links that an ended run may not have moved any more, after its last checkpoint was complete."""
        complete = {path.name: path for path in self.folder.all()}
        latest = self.folder.path(self.state.step)
        best = self.folder.path(self.state.best_step) if self.state.best_step is not None else None
        for name, checkpoint in (("latest", latest), ("best", best)):
            if checkpoint is not None and checkpoint.name in complete:
                guard_disk(partial(self.folder.point, name, checkpoint), checkpoint)

    def _stored_names(self) -> dict[str, str]:
        """Parameter name -> its name in a checkpoint's weights (PEFT leaves the adapter's name out)."""
        names = [name for name, p in self.full_model.named_parameters() if p.requires_grad]
        if self.config.lora_rank:
            return {name: name.replace(".default", "") for name in names}
        return {name: name for name in names}

    def _open_output(self) -> None:
        config = self.config
        self.tracker: Tracker | None = None

        def open_tracker() -> None:
            if self.world.is_main and not config.dry_run:
                history = read_history(self.resume_from) if self.resume_from else ""
                self.tracker = Tracker(
                    self.folder.root,
                    config.logger,
                    project=config.project_name,
                    name=config.experiment_name or self.folder.root.resolve().name,
                    config=asdict(config) | {"dtype": self.dtype_name},
                    total_steps=self.total_steps,
                    first_step=self.state.step,
                    history=history,
                )

        runtime.together(open_tracker)
        self._print_start()

    def _print_start(self) -> None:
        config, data = self.config, self.train_data
        steps = self.global_batches.first_step(1)
        sizes = [(math.prod(self.backend.shape(p)), p.requires_grad) for p in self.full_model.parameters()]
        ranks = "1 rank" if self.world.size == 1 else f"{self.world.size} ranks"
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        lines = [
            f"model    {config.model}, {total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained "
            f"({trained / total:.1%}), {self.dtype_name}",
            f"data     {len(data)} rows, {data.counts.tokens} tokens, {data.counts.targets} targets"
            + (f"; {data.counts.losses()}" if data.counts.losses() else ""),
            f"batch    {config.train_batch_size} rows: {ranks}, micro-batches of at most {self.layout.token_budget} "
            f"tokens; {steps} steps in the first epoch, {self.total_steps} in all",
            f"fold     {self._fold_text()}",
            f"backend  {config.backend} on {self.device.type}, {torch.get_num_threads()} threads a rank",
            f"output   {config.output_dir}",
            *memory_lines(self.prediction, self.room, self.remedies),
            time_line(self.step_seconds, steps, self.total_steps - self.state.step),
        ]
        if self.val_data is not None:
            lost = self.val_data.counts.losses()
            validation = f"val      {len(self.val_data)} rows, {self.val_data.counts.targets} targets"
            split = f", {config.val_fraction:g} of the rows by whole dialogues" if config.val_fraction else ""
            lines.insert(2, validation + split + (f"; {lost}" if lost else ""))
        if self.leak_text:
            lines.insert(3, f"leaks    {self.leak_text}")
        if self.resume_from is not None:
            ahead = (
                f"goes on at step {self.state.step + 1}" if self.state.step < self.total_steps else "has all its steps"
            )
            lines.append(f"resumed  {self.resume_from}, {ahead}")
        for line in lines:
            self._say(line)
        if self.world.is_main and (told := disk_warning(config, trained, self.total_steps, steps, self.folder.root)):
            warn(told)

    def _fold_text(self) -> str:
        if not self.layout.fold:
            text = "off: rows are shuffled one by one, each is computed by itself"
        elif self.layout.trees:
            text = "rows of a dialogue meet in a batch, what they have in common is computed once"
        else:
            text = f"only rows that continue each other, because {self.why_no_trees}"
        if self.checkpointed_layers:
            text += f"; {self.checkpointed_layers} layers recompute their activations"
        return text

    # Running

    def train(self) -> None:
        """Every step that is left, with its evaluations and checkpoints; or up to a stop. Or a dry run."""
        try:
            with out_of_memory(self.config, lambda: self.remedies):
                if self.config.dry_run:
                    self._dry_run()
                else:
                    self._train()
        finally:
            self.folder.unlock()

    def _dry_run(self) -> None:
        """One forward and backward pass of the longest micro-batch; no weight changes, nothing but a report is written.

        Raises:
            UserError: the run would not fit into memory, or something that it needs does not work.
        """
        predicted = self.prediction
        runtime.together(lambda: refuse(predicted, self.room, self.remedies))
        plan, place, _ = preflight.longest_micro_batch(
            self.train_micro_batches, self.train_data.lengths, self.global_batches
        )
        batch = self.train_micro_batches.make(plan.parts[self.world.rank][place]).to(self.device)
        runtime.seed_step(self.config.seed, self.state.step, self.world.rank)
        self.backend.model.train()
        started = time.perf_counter()
        loss = summed_loss(self.backend.model, self.head, batch)
        self.backend.backward(loss / plan.targets, last_micro_batch=True)
        value = loss.item()
        seconds = time.perf_counter() - started
        self._refuse_non_finite(runtime.sum_over_ranks([value], self.device)[0], "the loss of the longest micro-batch")
        peaks = runtime.gather_objects(runtime.peak_memory_gib(self.device) * preflight.GIB)
        tokens = sum(runtime.gather_objects(batch.input_ids.numel()))
        steps = self.global_batches.first_step(1)
        # Of what is computed at once, the share of the whole plan's operations.
        flops = plan.flops * tokens / max(1, plan.tokens)
        step_seconds = self.step_flops / flops * seconds
        report = DryRun(predicted, max(peaks), self.room, step_seconds, steps, self.total_steps)
        runtime.on_main(self.world, lambda: report.write(self.folder.root))
        for line in report.lines():
            self._say(line)
        self.backend.close()

    def _train(self) -> None:
        command = launch_command(without=("resume", "stop_after_steps"))  # while its launcher lives
        with runtime.StopSignals() as stop:
            self.liveness.on_orphaned = stop.orphaned
            try:
                stopped = self._take_steps(stop)
            except (UserError, runtime.PeerFailedError):  # on all ranks at the same place
                with suppress(Exception):
                    self.checkpointer.finish()  # what is in flight is still good
                raise
            runtime.together(self.checkpointer.finish)
        if self.state.step == self.total_steps and not self.state.validation_due:
            self._say_end()
        else:
            why = stopped or f"--stop_after_steps {self.config.stop_after_steps}"
            self._say(f"stopped by {why} after step {self.state.step}; to go on: {command}")
        if self.tracker is not None:
            self.tracker.close()
        self.backend.close()

    def _take_steps(self, stop: runtime.StopSignals) -> str | None:
        """Returns what asked the run to stop before its end, if anything did."""
        config = self.config
        end = min(self.total_steps, config.stop_after_steps or self.total_steps)
        stopped = None
        if self.state.validation_due and self.val_data is not None:  # the run was stopped before it
            self._validate()
            # The checkpoint is there already. Written again, it could be lost by a kill in between.
            if self._is_best():
                runtime.on_main(self.world, self._repair_links)
        elif config.validate_before_training and self.state.step == 0 and self.val_data is not None:
            self._validate()
        while self.state.step < end and not stopped:
            stopped, save_by_time = self._step(stop)
            save = self.state.step == self.total_steps or self._is_due(config.save_steps)
            evaluate = self.val_data is not None and config.eval_steps != 0
            if evaluate and (save or self._is_due(config.eval_steps)):
                if stopped:
                    self.state.validation_due = True  # whoever stops a run does not wait for that long
                else:
                    self._validate()
            if save or stopped or save_by_time or self.state.step == end:
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
        config, step = self.config, self.state.step
        started = time.perf_counter()
        runtime.seed_step(config.seed, step, self.world.rank)
        plan = self.train_micro_batches.plan(self.global_batches[step])
        parts = plan.parts[self.world.rank]
        data_seconds = time.perf_counter() - started
        self.backend.model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, part in enumerate(parts):
            before = time.perf_counter()
            batch = self.train_micro_batches.make(part).to(self.device)
            data_seconds += time.perf_counter() - before
            loss = summed_loss(self.backend.model, self.head, batch)
            self.backend.backward(loss / plan.targets, last_micro_batch=index == len(parts) - 1)
            loss_sum += loss.detach()
        reasons = [float(stop.received == reason) for reason in stop.REASONS]
        waited = time.monotonic() - self._last_save
        save_by_time = self.world.is_main and config.save_seconds is not None and waited >= config.save_seconds
        failed = float(self._log_error is not None or self.checkpointer.has_failed)
        values = [loss_sum.item(), failed, float(save_by_time), *reasons]
        total, failed, by_time, *reasons = runtime.sum_over_ranks(values, self.device)
        if failed:
            self._raise_background_error()
        self._refuse_non_finite(total, f"the loss of step {step + 1}")
        rate = self.backend.learning_rate()
        norm = self.backend.step()
        self._refuse_non_finite(norm, f"the gradient norm of step {step + 1}")
        self.state.step = step + 1
        self.state.epoch = self.global_batches.epochs_after(self.state.step)
        self.state.position = self.global_batches.position(self.state.step)
        self.state.validation_due = False
        seconds = time.perf_counter() - started
        metrics = {
            "train/loss": total / plan.targets,
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
            "train/save_seconds": self.checkpointer.blocked_seconds,
            "train/step_seconds": seconds,
            "memory": runtime.peak_memory_gib(self.device),
        }
        self._log("step", metrics)
        self.checkpointer.blocked_seconds = 0.0
        asked = [reason for reason, count in zip(stop.REASONS, reasons, strict=True) if count]
        return asked[0] if asked else None, by_time > 0

    def _refuse_non_finite(self, value: float, what: str) -> None:
        """The value is the same on all ranks, so all of them stop here."""
        if math.isfinite(value):
            return

        def refuse() -> None:
            latest = self.folder.latest()
            if self.state.step == 0:
                remedy = f"no weight has changed yet, so look at those of --model {self.config.model}"
            else:
                remedy = "try a lower --lr in another --output_dir"
            raise UserError(
                f"{what} is {value}; the run has stopped, {f'{latest} is valid' if latest else 'nothing was saved'}; "
                + remedy
                + (", or --dtype float32" if self.dtype_name != "float32" else "")
            )

        runtime.together(refuse)

    def _validate(self) -> None:
        assert self.val_micro_batches is not None
        self.backend.model.eval()
        loss = mean_loss(self.backend.model, self.head, self.val_micro_batches, self.world, self.device)
        self._refuse_non_finite(loss, f"the validation loss after step {self.state.step}")
        self.state.val_loss = loss
        self.state.validation_due = False
        self._log("evaluation", loss_metrics(loss))
        self._evaluated_step = self.state.step

    def _log(self, kind: str, metrics: dict[str, Any]) -> None:
        """Rank 0 writes. Its failure, such as a full disk, ends all ranks at the next step, save or end."""
        if self.tracker is None or self._log_error is not None:
            return
        values = {"step": self.state.step, "epoch": round(self.state.epoch, 6)} | metrics
        try:
            getattr(self.tracker, kind)(values)
        except UserError as error:
            self._log_error = error

    def _raise_background_error(self) -> None:
        """End all ranks where the log, or a checkpoint in the background, could not be written on one of them."""

        def check() -> None:
            if self._log_error is not None:
                raise self._log_error
            if self.checkpointer.has_failed:
                self.checkpointer.finish()

        runtime.together(check)

    # Saving

    def _is_best(self) -> bool:
        """Whether the validation loss of this step, if it has one, is the lowest so far; then it is noted."""
        state = self.state
        better = state.val_loss is not None and (state.best_val_loss is None or state.val_loss < state.best_val_loss)
        if better:
            state.best_step, state.best_val_loss = state.step, state.val_loss
        return better

    def _save(self) -> None:
        """A checkpoint of this step; every rank takes part."""
        self._raise_background_error()
        state = self.state
        if getattr(self, "_evaluated_step", None) != state.step:
            state.val_loss = None
        better = self._is_best()
        packages = ("torch", "transformers", "peft", self.backend.library)
        state.versions = {"dsft": dsft.__version__} | {name: version(name) for name in packages}
        slices: dict[str, list[tuple[str, StateSlice]]] = {self._weights_stem: [], OPTIMIZER: []}
        stored_name = self._stored_names()
        for part in self.backend.state():
            if part.kind == PARAMETER:
                slices[self._weights_stem].append((stored_name[part.name], part))
            else:
                slices[OPTIMIZER].append((f"{part.kind}.{part.name}", part))
        small_files = self._small_files if self.world.is_main else {}
        length = self.tracker.length if self.tracker is not None else 0
        metrics = (self.folder.root / METRICS, length)
        snapshot = Snapshot(replace(state), slices, small_files, metrics, better)
        runtime.together(lambda: self.checkpointer.save(snapshot))  # whose ranks agree on errors among themselves
        self._last_save = time.monotonic()

    def _say(self, line: str) -> None:
        if self.tracker is not None:
            self.tracker.say(line)
        elif self.config.dry_run and self.world.is_main:
            print(line, flush=True)

    def _say_end(self) -> None:
        best = self.folder.best()
        if best is not None:
            self._say(f"best     {best.name}, val/loss {self.state.best_val_loss:.6f}")
        if self.config.lora_rank:
            self._say(f"merge    python -m dsft.merge --checkpoint {self.config.output_dir}")


def warn(line: str) -> None:
    """Tell the user of something that does not stop the run."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
