"""Playing a game with a model, the expert or at random: many episodes side by side, and what came of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Level:
    """A level to play. `level_id` is known where it comes from a file."""

    seed: int
    level_id: str | None = None


@dataclass
class Game:
    """One episode while it is played."""

    number: int
    environment: Environment
    conversation: Conversation
    level: Level
    invalid: int = 0


@dataclass(frozen=True)
class Outcome:
    """One episode as it ended: a line of the JSONL file."""

    episode: int
    seed: int
    level: str
    solved: bool
    moves: int
    optimal_length: int
    turns: int
    invalid_answers: int
    messages: list[dict[str, str]]


class Player(Protocol):
    """Who gives the answers."""

    def __call__(self, games: Sequence[Game]) -> list[str]:
        """An answer for each of the games."""
        ...


class ExpertPlayer:
    """The search itself: the ceiling."""

    def __call__(self, games: Sequence[Game]) -> list[str]:
        """The first action of the best plan from each game's position."""
        return [format_answer(game.environment.expert_plan()[0]) for game in games]


class RandomPlayer:
    """Any of the four actions with equal probability: the floor. Depends on (seed, episode) alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, games: Sequence[Game]) -> list[str]:
        """A random action for each game."""
        draws = [
            np.random.default_rng([self._seed, game.number, len(game.conversation.answers)]).integers(len(ACTIONS))
            for game in games
        ]
        return [format_answer(ACTIONS[draw]) for draw in draws]


class ModelPlayer:
    """A model that reads the conversation so far and answers. Its prompts become tokens as they do in training."""

    def __init__(self, generator: Generator, config: ValidateConfig) -> None:
        self._generator = generator
        self._config = config
        self._format = ChatFormat(generator.tokenizer, with_thinking=config.with_thinking)

    def __call__(self, games: Sequence[Game]) -> list[str]:
        """The model's answers."""
        rows = []
        for game in games:
            prompt = game.conversation.prompt(self._config.style, self._config.history_turns)
            cell = Cell(f"the level of seed {game.level.seed}", len(game.conversation.answers))
            rows.append(self._format.prompt_and_response(prompt, "", cell)[:1])
        return self._generator([tokens.tolist() for tokens, _ in self._format.tokenize(rows)])


def choose_levels(config: ValidateConfig) -> list[Level]:
    """The levels to play: of a file, or of the seeds from config.seed on; no level twice, none that is excluded.

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
    environment, levels, seed, last = make_environment(config), [], config.seed, config.seed
    while len(levels) < config.episodes:
        environment.reset(seed)
        if environment.level_id not in excluded:
            excluded.add(environment.level_id)
            levels.append(Level(seed, environment.level_id))
            last = seed
        seed += 1
        if seed - last > SEEDS_WITHOUT_NEW_LEVEL:
            raise UserError(
                f"only {len(levels)} different levels were found that are not excluded, --episodes is "
                f"{config.episodes}; lower it, or let --env {config.env} be larger"
            )
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
    """Play this rank's share of the levels, batch_size of them side by side.

    Raises:
        UserError: a level that its seed does not make with these flags.
    """
    waiting = iter(list(enumerate(levels))[world.rank :: world.size])
    share = len(range(world.rank, len(levels), world.size))
    games: list[Game] = []
    outcomes: list[Outcome] = []
    with tqdm(total=share, desc="episodes", unit="episode", disable=None if world.is_main else True) as bar:
        while True:
            games += [_start(config, *new) for new in islice(waiting, config.batch_size - len(games))]
            if not games:
                return outcomes
            for game, answer in zip(games, player(games), strict=True):
                _take(game, answer)
            for game in games:
                if game.environment.over or len(game.conversation.answers) >= (config.max_turns or config.max_steps):
                    outcomes.append(_outcome(game))
                    bar.update()
            ended = {outcome.episode for outcome in outcomes}
            games = [game for game in games if game.number not in ended]


def _start(config: ValidateConfig, number: int, level: Level) -> Game:
    environment = make_environment(config)
    state = environment.reset(level.seed)
    if level.level_id not in (None, environment.level_id):
        raise UserError(
            f"--levels {config.levels}: with these flags seed {level.seed} makes another level than the file's; "
            "give the flags of dsft.generate (they stand in generate.json)"
        )
    return Game(number, environment, Conversation(instruction(environment), [state]), level)


def _take(game: Game, answer: str) -> None:
    """One answer, and the position that follows. An answer in another form moves nothing."""
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
        level=game.level.level_id or "",
        solved=environment.solved,
        moves=environment.steps,
        optimal_length=environment.optimal_length,
        turns=len(game.conversation.answers),
        invalid_answers=game.invalid,
        messages=game.conversation.messages(),
    )


def summarize(outcomes: Sequence[Outcome], transcripts: int) -> dict[str, Any]:
    """Success rate with its 95 % interval, moves over the optimum, invalid answers, and some whole conversations."""
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
