"""Plays many episodes of a game side by side, with a model, the expert or at random."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dsft.config import ValidateConfig
from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.readers import Cell, find_files, read_columns
from dsft.distributed.runtime import World
from dsft.envs import make_environment
from dsft.envs.base import ACTIONS, SEEDS_WITHOUT_NEW_LEVEL, Environment
from dsft.envs.conversation import NOT_UNDERSTOOD, Conversation, format_answer, instruction, parse_answer
from dsft.errors import UserError
from dsft.validation.generation import Generator
from dsft.validation.statistics import wilson_interval


class Level(NamedTuple):
    """A level to play."""

    seed: int
    level_id: str


@dataclass
class Game:
    """One episode in progress."""

    number: int
    environment: Environment
    conversation: Conversation
    level: Level
    invalid: int = 0


@dataclass(frozen=True)
class Outcome:
    """One finished episode: a line of the .jsonl file."""

    episode: int
    seed: int
    level: str
    solved: bool
    moves: int
    optimal_length: int
    turns: int
    invalid_answers: int
    messages: list[dict[str, str]]


Player = Callable[[Sequence[Game]], list[str]]
"""Gives an answer for each of the games."""


def expert_answers(games: Sequence[Game]) -> list[str]:
    """The first action of the best plan: the upper bound."""
    return [format_answer(game.environment.expert_plan()[0]) for game in games]


def random_answers(games: Sequence[Game], *, seed: int) -> list[str]:
    """Uniformly random actions, which depend on (seed, episode) only: the lower bound."""
    streams = [np.random.default_rng([seed, game.number, len(game.conversation.answers)]) for game in games]
    return [format_answer(ACTIONS[stream.integers(len(ACTIONS))]) for stream in streams]


class ModelPlayer:
    """A model that reads the conversation so far, tokenized as in training."""

    def __init__(self, generator: Generator, config: ValidateConfig) -> None:
        self._generator = generator
        self._config = config
        self._format = ChatFormat.of(generator.tokenizer, config)

    def __call__(self, games: Sequence[Game]) -> list[str]:
        """The model's answers."""
        prompts = []
        for game in games:
            prompt = game.conversation.prompt(self._config.style, self._config.history_turns)
            cell = Cell(f"the level of seed {game.level.seed}", len(game.conversation.answers))
            prompts.append(self._format.prompt(prompt, cell).tolist())
        return self._generator(prompts)


def choose_levels(config: ValidateConfig) -> list[Level]:
    """The levels of a file, or of the seeds from config.seed on; without repetitions and excluded levels.

    Raises:
        UserError: files without levels, or too few levels.
    """
    excluded = {
        level.level_id for name in config.exclude_levels or () for level in _read_levels(name, "exclude_levels")
    }
    if config.levels is not None:
        levels = [level for level in _read_levels(config.levels, "levels") if level.level_id not in excluded]
        if len(levels) < config.episodes:
            raise UserError(
                f"--levels {config.levels} has {len(levels)} levels to play, --episodes is {config.episodes}; lower it"
            )
        return levels[: config.episodes]
    environment, levels, last, seed = make_environment(config), [], config.seed, config.seed
    while len(levels) < config.episodes:
        environment.reset(seed)
        if environment.level_id not in excluded:
            excluded.add(environment.level_id)
            levels.append(Level(seed, environment.level_id))
            last = seed
        if seed - last >= SEEDS_WITHOUT_NEW_LEVEL:
            raise UserError(
                f"only {len(levels)} different levels were found that are not excluded, --episodes is "
                f"{config.episodes}; lower it, or make the levels of --env {config.env} larger"
            )
        seed += 1
    return levels


def _read_levels(name: str, flag: str) -> list[Level]:
    """The levels of generated parquet files, in their order."""
    found: dict[str, Level] = {}
    for rows in read_columns(find_files([name], flag), ["extra_info"], [flag], None):
        for cell, (info,) in rows:
            if not isinstance(info, dict) or not isinstance(info.get("level"), str) or "seed" not in info:
                raise UserError(f"{cell}: extra_info has no level and seed; name files of dsft.generate with --{flag}")
            found.setdefault(info["level"], Level(info["seed"], info["level"]))
    return list(found.values())


def play(config: ValidateConfig, player: Player, levels: Sequence[Level], world: World) -> list[Outcome]:
    """Play this rank's share of the levels, batch_size of them at a time.

    Raises:
        UserError: a level differs from what its seed gives with these flags.
    """
    share = list(enumerate(levels))[world.rank :: world.size]
    waiting = iter(share)
    games: list[Game] = []
    outcomes: list[Outcome] = []
    with tqdm(total=len(share), desc="episodes", unit="episode", disable=None if world.is_main else True) as bar:
        while len(outcomes) < len(share):
            games += [_start(config, *new) for new in islice(waiting, config.batch_size - len(games))]
            for game, answer in zip(list(games), player(games), strict=True):
                _take(game, answer)
                if game.environment.over or len(game.conversation.answers) >= (config.max_turns or config.max_steps):
                    games.remove(game)
                    outcomes.append(_outcome(game))
                    bar.update()
    return outcomes


def _start(config: ValidateConfig, number: int, level: Level) -> Game:
    environment = make_environment(config)
    state = environment.reset(level.seed)
    if level.level_id != environment.level_id:
        raise UserError(
            f"--levels {config.levels}: with these flags seed {level.seed} gives another level than the file's; "
            "use the flags of dsft.generate (see generate.json)"
        )
    return Game(number, environment, Conversation(instruction(environment), [state]), level)


def _take(game: Game, answer: str) -> None:
    """Apply one answer; an invalid one moves nothing."""
    game.conversation.answers.append(answer)
    action = parse_answer(answer)
    if action is None:
        game.invalid += 1
        game.conversation.states.append(f"{NOT_UNDERSTOOD}\n{game.environment.observation()}")
    else:
        game.environment.step(action)
        game.conversation.states.append(game.environment.observation())


def _outcome(game: Game) -> Outcome:
    environment = game.environment
    return Outcome(
        episode=game.number,
        seed=game.level.seed,
        level=game.level.level_id,
        solved=environment.solved,
        moves=environment.steps,
        optimal_length=environment.optimal_length,
        turns=len(game.conversation.answers),
        invalid_answers=game.invalid,
        messages=game.conversation.messages(),
    )


def summarize_episodes(outcomes: Sequence[Outcome], transcripts: int) -> dict[str, Any]:
    """Success rate with its 95 % interval, moves over the optimum, invalid answers, and a few conversations."""
    solved = [outcome for outcome in outcomes if outcome.solved]
    failed = [outcome for outcome in outcomes if not outcome.solved]
    turns = sum(outcome.turns for outcome in outcomes)
    extra = [outcome.moves - outcome.optimal_length for outcome in solved]
    return {
        "episodes": len(outcomes),
        "solved": len(solved),
        "success_rate": len(solved) / len(outcomes),
        "success_interval": list(wilson_interval(len(solved), len(outcomes))),
        "moves_over_optimum": sum(extra) / len(extra) if extra else None,
        "turns": turns,
        "invalid_answer_rate": sum(outcome.invalid_answers for outcome in outcomes) / turns,
        "transcripts": {
            "solved": [asdict(outcome) for outcome in solved[:transcripts]],
            "failed": [asdict(outcome) for outcome in failed[:transcripts]],
        },
    }
