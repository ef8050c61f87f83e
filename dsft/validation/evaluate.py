"""One evaluation: ranks, player or model, the report and the file of all episodes or rows."""

import json
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dsft
from dsft.config import ValidateConfig
from dsft.distributed import runtime
from dsft.distributed.rendezvous import start_process_group
from dsft.files import guard_disk, write_text
from dsft.validation import playing
from dsft.validation.generation import load_generator

Results = tuple[dict[str, Any], list[dict[str, Any]]]
"""A summary, and a dict for each episode or row that it summarizes."""
NOT_SETTINGS = ("config", "debug", "output", "transcripts")


def validate(config: ValidateConfig) -> list[str]:
    """Evaluate a model, write the report, and return lines for the console: on rank 0, none on the others.

    Raises:
        UserError: bad input, or a disk that refuses the report.
    """
    if not config.debug:
        runtime.silence_libraries()
    world = runtime.World.from_environment()
    runtime.set_threads(world)
    device = runtime.pick_device(world)
    if world.size > 1:
        start_process_group(device)
    runtime.seed_everything(config.seed)
    started = time.perf_counter()
    summary, rows = _evaluate_game(config, world, device) if config.env else _evaluate_dialogues(config, world, device)
    seconds = time.perf_counter() - started
    return runtime.together(lambda: _write(config, summary, rows, seconds) if world.is_main else [])


def _evaluate_game(config: ValidateConfig, world: runtime.World, device: torch.device) -> Results:
    def prepare() -> tuple[list[playing.Level], playing.Player]:
        at_random = partial(playing.random_answers, seed=config.seed)
        players: dict[str, playing.Player] = {"expert": playing.expert_answers, "random": at_random}
        levels = playing.choose_levels(config)
        return levels, players.get(config.model) or playing.ModelPlayer(load_generator(config, device), config)

    levels, player = runtime.together(prepare)
    gathered = runtime.gather_objects(playing.play(config, player, levels, world))
    outcomes = sorted((outcome for part in gathered for outcome in part), key=lambda outcome: outcome.episode)
    return playing.summarize_episodes(outcomes, config.transcripts), [asdict(outcome) for outcome in outcomes]


def _evaluate_dialogues(config: ValidateConfig, world: runtime.World, device: torch.device) -> Results:
    from dsft.validation.dialogues import evaluate_dialogues

    generator = runtime.together(lambda: load_generator(config, device))
    return evaluate_dialogues(config, generator, world)


def _write(config: ValidateConfig, summary: dict[str, Any], rows: list[dict[str, Any]], seconds: float) -> list[str]:
    """The report and the file of all episodes or rows."""
    report = {
        "model": config.model,
        "adapter": config.adapter,
        **summary,
        "settings": {key: value for key, value in asdict(config).items() if key not in NOT_SETTINGS},
        "seconds": round(seconds, 2),
        "versions": {"dsft": dsft.__version__} | {name: version(name) for name in ("torch", "transformers")},
    }
    output = Path(config.output)
    guard_disk(lambda: output.parent.mkdir(parents=True, exist_ok=True), output.parent)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    guard_disk(lambda: write_text(output.with_suffix(".jsonl"), lines), output)
    guard_disk(lambda: write_text(output, json.dumps(report, indent=2, ensure_ascii=False) + "\n"), output)
    return [*(_game_lines(summary) if config.env else _dialogue_lines(summary)), f"report   {output}"]


def _share(summary: dict[str, Any], name: str) -> str:
    low, high = summary[f"{name}_interval"]
    return f"{summary[f'{name}_rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"


def _game_lines(summary: dict[str, Any]) -> list[str]:
    over = summary["moves_over_optimum"]
    return [
        f"solved   {summary['solved']} of {summary['episodes']} levels: {_share(summary, 'success')}",
        f"moves    {'no level was solved' if over is None else f'{over:.2f} over the optimum on solved levels'}",
        f"answers  {summary['turns']}, {summary['invalid_answer_rate']:.1%} of them invalid",
    ]


def _dialogue_lines(summary: dict[str, Any]) -> list[str]:
    """One line per figure; a share with its interval."""
    shown = {}
    for key, value in summary.items():
        if key.endswith("_rate") and value is not None:
            shown[key] = _share(summary, key.removesuffix("_rate"))
        elif not key.endswith("_interval"):
            shown[key] = f"{value:.6f}" if isinstance(value, float) else str(value)
    return [f"{key:<24} {text}" for key, text in shown.items()]
