"""Metrics and messages of a run: metrics.jsonl, the console, wandb, tensorboard. Rank 0 only."""

import json
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsft.checkpointing.folder import METRICS
from dsft.checkpointing.state import TrainerState
from dsft.config import TrainConfig
from dsft.config.train import VAL_LOSS
from dsft.errors import UserError
from dsft.files import guard_disk, write_text

WANDB_ID = ".wandb_id"


class Console:
    """Messages of a run that logs no metrics: a dry run, or a rank other than 0."""

    error: UserError | None = None
    """Why metrics.jsonl can no longer be written; the run has to end."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl so far."""
        return 0

    def say(self, line: str) -> None:
        """One line on standard output."""
        if self._enabled:
            print(line, flush=True)

    def step(self, metrics: dict[str, Any]) -> None:
        """Log a training step's metrics."""

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """Log an evaluation's metrics."""

    def close(self) -> None:
        """Flush and close everything."""


class Tracker(Console):
    """Logs one line per step and evaluation. wandb and tensorboard never stop a run.

    Neither does metrics.jsonl at once: what refuses a line is kept in `error`, which ends all ranks together.
    """

    def __init__(self, config: TrainConfig, output_dir: Path, dtype: str, state: TrainerState, history: str) -> None:
        """`state` is where the run starts or resumes, `history` its lines up to there.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        super().__init__(enabled="console" in config.logger)
        self._path = output_dir / METRICS
        guard_disk(lambda: write_text(self._path, history), self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        quiet = None if self._enabled else True  # None: no bar where the output is not a terminal
        self._bar = tqdm(total=state.total_steps, initial=state.step, unit=" steps", disable=quiet, dynamic_ncols=True)
        self._wandb = _start_wandb(config, output_dir, dtype) if "wandb" in config.logger else None
        self._board = _start_tensorboard(output_dir) if "tensorboard" in config.logger else None

    def say(self, line: str) -> None:
        """One line on standard output, above the bar."""
        if self._enabled:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def step(self, metrics: dict[str, Any]) -> None:
        """See Console."""
        self._bar.update()
        self._bar.set_postfix_str(f"loss {metrics['train/loss']:.4f}, lr {metrics['train/lr']:.2e}")
        self._log(metrics)

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """See Console."""
        losses = [f"{name} {loss:.6f}" for name, loss in metrics.items() if name.startswith(VAL_LOSS)]
        self.say(f"step {metrics['step']}: {', '.join(losses)}, val/perplexity {metrics['val/perplexity']:.4f}")
        self._log(metrics)

    @property
    def metrics_bytes(self) -> int:
        """See Console."""
        return self._file.tell()

    def close(self) -> None:
        """See Console."""
        self._bar.close()
        self._file.close()
        if self._board is not None:
            _shielded("tensorboard", self._board.close)
        if self._wandb is not None:
            _shielded("wandb", self._wandb.finish)

    def _log(self, metrics: dict[str, Any]) -> None:
        def write() -> None:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()

        if self.error is not None:
            return
        try:
            guard_disk(write, self._path)
        except UserError as error:
            self.error = error
            return
        values = {key: value for key, value in metrics.items() if key != "step"}
        if self._wandb is not None:
            self._wandb = _shielded("wandb", lambda: (self._wandb.log(values, step=metrics["step"]), self._wandb)[1])
        if self._board is not None:
            self._board = _shielded("tensorboard", lambda: _add_scalars(self._board, values, metrics["step"]))


def warn(line: str) -> None:
    """Tell the user of something that does not stop the run."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _shielded(library: str, work: Any) -> Any:
    """The result of `work`, or None with a line on standard error: tracking must not stop training."""
    try:
        return work()
    except Exception as error:
        warn(f"{library} is off: {' '.join(str(error).split())[:200]}")
        return None


def _start_wandb(config: TrainConfig, output_dir: Path, dtype: str) -> Any:
    def start() -> Any:
        import wandb

        stored = output_dir / WANDB_ID
        run_id = stored.read_text(encoding="utf-8") if stored.is_file() else uuid.uuid4().hex[:8]
        settings = wandb.Settings(silent=True, init_timeout=60)
        run = wandb.init(
            project=config.project_name,
            name=config.experiment_name or output_dir.resolve().name,
            config=asdict(config) | {"dtype": dtype},
            dir=output_dir,
            id=run_id,
            resume="allow",
            settings=settings,
        )
        write_text(stored, run_id)
        return run

    return _shielded("wandb", start)


def _start_tensorboard(output_dir: Path) -> Any:
    def start() -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(output_dir / "tensorboard"))

    return _shielded("tensorboard", start)


def _add_scalars(board: Any, values: dict[str, Any], step: int) -> Any:
    for key, value in values.items():
        board.add_scalar(key, value, step)
    return board
