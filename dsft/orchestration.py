"""The pipeline: each step a process, resumed where an earlier start ended.

A step is done when pipeline.json says so. A step that was killed is run again: training resumes from its latest
checkpoint, the others start over. No shell is involved, and a step ends when the pipeline does.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from filelock import lock_descriptor
from tqdm import tqdm

from dsft.checkpointing.folder import CheckpointFolder
from dsft.checkpointing.state import read_state
from dsft.config import GenerateConfig, MergeConfig, PipelineConfig, ReportConfig, TrainConfig, ValidateConfig
from dsft.config.games import BASE, PLAYERS, SCRIPTED_PLAYERS, TUNED
from dsft.config.pipeline import SHARED, STEPS
from dsft.config.values import as_words, build
from dsft.envs import make_environment
from dsft.errors import UserError
from dsft.files import guard_disk, write_text
from dsft.processes import HeldInterrupt, end_with_parent

STATE, LOCK = "pipeline.json", ".pipeline.lock"
PUBLISH = "publish"  # the last step, because the model card contains the results of validation
Progress = Callable[[], tuple[int, int] | None]  # (steps done, total steps), if known
WAIT_FOR_OTHER = 60  # seconds that a step of a killed pipeline may take to end


class StepFailedError(UserError):
    """A step failed; the pipeline exits with its status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Pipeline:
    """generate -> train -> merge the best -> validate, in one folder."""

    def __init__(self, config: PipelineConfig) -> None:
        """Raises UserError for flags that a step's command would refuse."""
        make_environment(config)  # refuses impossible sizes before any step starts
        self.config = config
        self.root = Path(config.output_dir)
        self.data, self.run_folder = self.root / "data", self.root / "train"
        self.merged, self.validation, self.logs = self.root / "merged", self.root / "validate", self.root / "logs"
        self.generate = self._build("generate", GenerateConfig, {"output_dir": self.data})
        self.train = self._build("train", TrainConfig, self._training())
        self.merge = self._build("merge", MergeConfig, {"checkpoint": self.run_folder, "output": self.merged})
        self.validate = {player: self._validation(player) for player in PLAYERS}
        if self.merge.push_to_hub is not None and not self.train.lora_rank:
            raise UserError(
                f"--merge.push_to_hub {self.merge.push_to_hub}: full fine-tuning (--train.lora_rank 0) merges nothing; "
                "remove the flag, or train with LoRA"
            )
        self._interrupt = HeldInterrupt(signal.SIGTERM)

    def _build(self, step: str, config_class: Any, own: dict[str, Any]) -> Any:
        """A step's config: flags shared by all steps, the step's own section, and what the pipeline sets."""
        names = {f.name for f in fields(config_class)}
        shared = {name: getattr(self.config, name) for name in names & SHARED}
        own = {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}
        try:
            return build(config_class, shared | getattr(self.config, step) | own)
        except UserError as error:
            raise UserError("\n".join(f"--{step}: {line}" for line in str(error).splitlines())) from error

    def _training(self) -> dict[str, Any]:
        episodes = self.generate.rows == "episodes"
        return {
            "backend": self.config.backend,
            "train_files": [str(self.data / "train.parquet")],
            "val_files": [str(self.data / "test.parquet")] if self.generate.test_size else None,
            "messages_key": "messages" if episodes else None,
            "output_dir": self.run_folder,
        }

    def _validation(self, player: str) -> ValidateConfig:
        """Each player meets the same levels, which neither training nor the choice of the checkpoint has seen."""
        model = {BASE: self.config.model, TUNED: str(self._tuned_model())}.get(player, player)
        own = {
            "model": model,
            "with_thinking": self.train.with_thinking,
            "exclude_levels": [str(self.data)],
            "output": self.validation / f"{player.replace(' ', '_')}.json",
        }
        return self._build("validate", ValidateConfig, own)

    def _tuned_model(self) -> Path:
        """The merged model, or for full fine-tuning the best checkpoint itself."""
        return self.merged if self.train.lora_rank else self.run_folder / "best"

    # Running

    def run(self) -> list[str]:
        """Run the remaining steps, write the report, and return lines for the console, its table last.

        Raises:
            UserError: flags that differ from an earlier start, a folder in use, or a failed step.
        """
        guard_disk(lambda: self.logs.mkdir(parents=True, exist_ok=True), self.logs)
        with self._locked() as lock, self._interrupt:
            self._lock = lock
            self._read_state()
            self._step("generate", lambda: self._run("generate", "generate", self.generate))
            self._step("train", self._train)
            self._step("merge", self._merge)
            self._step("validate", self._validate)
            lines = self._report()
            if self.merge.push_to_hub is not None:
                self._step(PUBLISH, self._publish)
            return lines

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """One pipeline at a time. Its steps inherit the descriptor and with it the lock, so that a second start waits
        for a step of a killed pipeline; a FileLock would not let them.
        """
        descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            give_up = time.monotonic() + WAIT_FOR_OTHER
            if not lock_descriptor(descriptor, blocking=False):
                print(f"waiting for a step of an earlier start that is still running in {self.root}", flush=True)
                while not lock_descriptor(descriptor, blocking=False):
                    if time.monotonic() > give_up:
                        raise UserError(f"{self.root} is in use by another pipeline; wait for it, or choose another")
                    time.sleep(0.5)
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_state(self) -> None:
        """Read which steps were started and done; refuse flags that differ from those of a done step."""
        path = self.root / STATE
        self._steps: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self._steps = {step: {"flags": dict(v["flags"]), "done": bool(v["done"])} for step, v in stored.items()}
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path} is damaged ({error}); delete {self.root} and start again") from error
        forced = STEPS.index(self.config.force) if self.config.force else len(STEPS)
        for step in STEPS[:forced]:
            before, now = self._steps.get(step), self._flags(step)
            if before is not None and before["done"] and before["flags"] != now:
                old = before["flags"]
                changed = [f"{name} was {old.get(name)}, is {now[name]}" for name in now if old.get(name) != now[name]]
                raise UserError(
                    f"{self.root}: {step} was done with other flags: {'; '.join(changed)}; use the same flags, "
                    f"--force {step}, or another --output_dir"
                )
        for step in (*STEPS[forced:], PUBLISH) if self.config.force else ():
            self._steps.pop(step, None)
        self._clear(STEPS[forced:])
        self._write_state()

    def _flags(self, step: str) -> dict[str, Any]:
        """The flags that a step's results depend on, as JSON stores them."""
        configs = {"generate": self.generate, "train": self.train, "merge": self.merge, PUBLISH: self.merge}
        config = configs.get(step) or self.validate[TUNED]
        values = {k: v for k, v in asdict(config).items() if k not in ("debug", "config", "num_processes")}
        if step == "merge":
            values["select"] = self.config.select
        if step == "validate":
            values["base_model"] = self.config.model
        return dict(json.loads(json.dumps(values)))

    def _write_state(self) -> None:
        text = json.dumps(self._steps, indent=2) + "\n"
        guard_disk(lambda: write_text(self.root / STATE, text), self.root / STATE)

    def _clear(self, steps: tuple[str, ...]) -> None:
        """Delete the results of steps."""
        made = {
            "generate": [self.data],
            "train": [self.run_folder],
            "merge": [self.merged, self.root / "select"],
            "validate": [self.validation, self.root / "report.html", self.root / "report.md"],
        }
        for step in steps:
            for path in made[step]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _step(self, step: str, work: Callable[[], None]) -> None:
        begun, flags = self._steps.get(step), self._flags(step)
        if begun is not None and begun["done"]:
            print(f"{step:<8} done before", flush=True)
            return
        # Training resumes, or refuses to; validation keeps the players that have played with the same flags; the others
        # start over.
        if step in ("generate", "merge") or (step == "validate" and begun is not None and begun["flags"] != flags):
            self._clear((step,))
        self._steps[step] = {"flags": flags, "done": False}
        self._write_state()
        started = time.monotonic()
        work()
        self._steps[step]["done"] = True
        self._write_state()
        print(f"{step:<8} done in {time.monotonic() - started:.0f} s", flush=True)

    def _train(self) -> None:
        self._run("train", "train", self.train, self.config.nproc, self._training_progress)
        checkpoints = CheckpointFolder(self.run_folder)
        latest = checkpoints.latest()
        state = read_state(latest) if latest else None
        if state is None or state.step < state.total_steps:
            raise UserError(
                f"training was stopped after step {state.step if state else 0}; rerun the same command to resume"
            )

    def _merge(self) -> None:
        """Choose a checkpoint and merge it; with full fine-tuning the checkpoint is the model."""
        checkpoints = CheckpointFolder(self.run_folder)
        best = self._best_player(checkpoints) if self.config.select == "success_rate" else checkpoints.best()
        best = best or checkpoints.latest()
        assert best is not None
        if self.train.lora_rank:
            later = {"push_to_hub": None, "hub_name": self.merge.push_to_hub or self.merge.hub_name}
            config = MergeConfig(**asdict(self.merge) | {"checkpoint": str(best)} | later)
            self._run("merge", "merge", config)
        else:
            checkpoints.point("best", best)

    def _best_player(self, checkpoints: CheckpointFolder) -> Path:
        """The checkpoint that solves most levels of test.parquet; ties go to fewer moves, then to the earlier one."""
        folder = self.root / "select"
        results = []
        for checkpoint in checkpoints.all():
            values = asdict(self.validate[BASE]) | {"adapter" if self.train.lora_rank else "model": str(checkpoint)}
            values |= {"levels": str(self.data / "test.parquet"), "exclude_levels": None}
            values |= {"output": str(folder / f"{checkpoint.name}.json")}
            values["episodes"] = min(values["episodes"], self.generate.test_size)
            self._run(f"select-{checkpoint.name}", "validate", ValidateConfig(**values), self.config.nproc)
            report = json.loads((folder / f"{checkpoint.name}.json").read_text(encoding="utf-8"))
            over = report["moves_over_optimum"]
            results.append((-report["success_rate"], math.inf if over is None else over, checkpoint.name, checkpoint))
        return min(results)[-1]

    def _validate(self) -> None:
        for player, config in self.validate.items():
            if not Path(config.output).is_file():  # written whole or not at all
                ranks = 1 if config.model in SCRIPTED_PLAYERS else self.config.nproc
                self._run(f"validate-{player.replace(' ', '-')}", "validate", config, ranks)

    def _report(self) -> list[str]:
        from dsft.export.model_card import add_results
        from dsft.reporting.eval_reports import find_eval_reports, game_lines
        from dsft.reporting.report import write_report
        from dsft.reporting.runs import read_runs

        folder = [str(self.root)]
        reports = find_eval_reports(read_runs(folder), [])
        if self.train.lora_rank:
            guard_disk(lambda: add_results(self.merged, reports), self.merged)
        written = write_report(ReportConfig(runs=folder))
        return [*(f"report   {path}" for path in written), *game_lines(reports)]

    def _publish(self) -> None:
        from dsft.export.hub import push

        assert self.merge.push_to_hub is not None
        with self._interrupt.let_through():
            print(f"pushed   {push(self.merged, self.merge.push_to_hub, private=self.merge.hub_private)}", flush=True)

    def _run(self, name: str, command: str, config: Any, ranks: int = 1, progress: Progress = lambda: None) -> None:
        """Run one command, its output in a log. Raises StepFailedError if it fails."""
        log = self.logs / f"{name}.log"
        print(f"{name:<8} running, log {log}", flush=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        with open(log, "ab") as output:
            before = output.tell()  # the end of what earlier starts wrote
            child = subprocess.Popen(
                [sys.executable, *torchrun, "-m", f"dsft.{command}", *as_words(config)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                pass_fds=[self._lock],
                start_new_session=True,  # Ctrl-C reaches only the pipeline, which ends its step
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
            try:
                with self._interrupt.let_through():
                    status = _wait(child, progress)
            except BaseException:
                child.send_signal(signal.SIGTERM)  # training saves a checkpoint and exits
                try:
                    with self._interrupt.let_through(another=True):  # ends the wait
                        child.wait(WAIT_FOR_OTHER)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                raise
        if status != 0:
            text = log.read_bytes()[before:].decode("utf-8", errors="replace")
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            reason = f": {errors[-1].removeprefix('error: ')}" if errors else ""
            code = status if status > 0 else 128 - status
            raise StepFailedError(f"{name} failed with status {code}{reason}; see {log}", code)

    def _training_progress(self) -> tuple[int, int] | None:
        """(steps done, total steps), from metrics.jsonl."""
        try:
            rows = json.loads((self.data / "generate.json").read_text(encoding="utf-8"))["rows"]["train"]
            lines = (self.run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            done = json.loads(lines[-1])["step"]
        except (OSError, ValueError, KeyError, IndexError):
            return None
        rows = min(rows, self.train.max_train_rows or rows)
        epochs = self.train.total_epochs * math.ceil(rows / self.train.train_batch_size)  # may be a few more
        return done, self.train.total_training_steps or epochs


def _wait(child: "subprocess.Popen[bytes]", progress: Progress) -> int:
    """Wait for a process, with a progress bar if the progress is known and this is a terminal."""
    bar: tqdm[Any] | None = None
    try:
        while True:
            try:
                return child.wait(timeout=1)
            except subprocess.TimeoutExpired:
                known = progress() if sys.stderr.isatty() else None
                if known is not None:
                    bar = bar or tqdm(total=known[1], initial=known[0], desc="train", unit="step")
                    bar.update(known[0] - bar.n)
    finally:
        if bar is not None:
            bar.close()
