"""What a run tells: metrics.jsonl, the console, wandb, tensorboard. Rank 0 only."""

import json
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsft.checkpointing.folder import METRICS
from dsft.files import guard_disk, write_text

WANDB_ID = ".wandb_id"


class Tracker:
    """Writes one line a step and one an evaluation. wandb and tensorboard never stop a run."""

    def __init__(
        self,
        output_dir: Path,
        loggers: Sequence[str],
        *,
        project: str,
        name: str,
        config: dict[str, Any],
        total_steps: int,
        first_step: int,
        history: str,
    ) -> None:
        """`first_step` is the last finished step of a resumed run, `history` its lines up to there."""
        self._path = output_dir / METRICS
        guard_disk(lambda: write_text(self._path, history), self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        quiet = True if "console" not in loggers else None  # None: no bar where the output is no terminal
        self._console = "console" in loggers
        self._bar = tqdm(total=total_steps, initial=first_step, unit=" steps", disable=quiet, dynamic_ncols=True)
        self._wandb = _start_wandb(output_dir, project, name, config) if "wandb" in loggers else None
        self._board = _start_tensorboard(output_dir) if "tensorboard" in loggers else None

    def step(self, metrics: dict[str, Any]) -> None:
        """A training step's metrics.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        self._bar.update()
        self._bar.set_postfix_str(f"loss {metrics['train/loss']:.4f}, lr {metrics['train/lr']:.2e}")
        self._log(metrics)

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """An evaluation's metrics; see step."""
        loss, perplexity = metrics["val/loss"], metrics["val/perplexity"]
        self.say(f"step {metrics['step']}: val/loss {loss:.6f}, val/perplexity {perplexity:.4f}")
        self._log(metrics)

    def say(self, line: str) -> None:
        """One line on the console, above the bar."""
        if self._console:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    @property
    def length(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self._file.tell()

    def close(self) -> None:
        """Flush and close everything."""
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

        guard_disk(write, self._path)
        values = {key: value for key, value in metrics.items() if key != "step"}
        if self._wandb is not None:
            self._wandb = _shielded("wandb", lambda: (self._wandb.log(values, step=metrics["step"]), self._wandb)[1])
        if self._board is not None:
            self._board = _shielded("tensorboard", lambda: _add_scalars(self._board, values, metrics["step"]))


def _shielded(library: str, work: Any) -> Any:
    """The result of `work`, or None with a line on standard error: tracking must not stop training."""
    try:
        return work()
    except Exception as error:
        print(f"warning: {library} is off: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return None


def _start_wandb(output_dir: Path, project: str, name: str, config: dict[str, Any]) -> Any:
    def start() -> Any:
        import wandb

        stored = output_dir / WANDB_ID
        run_id = stored.read_text(encoding="utf-8") if stored.is_file() else uuid.uuid4().hex[:8]
        settings = wandb.Settings(silent=True, init_timeout=60)
        run = wandb.init(
            project=project, name=name, config=config, dir=output_dir, id=run_id, resume="allow", settings=settings
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
