"""Writes an expert's episodes as parquet: several processes search, rows are written in the order of the seeds."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from dsft.config import GenerateConfig
from dsft.envs import make_environment
from dsft.envs.base import SEEDS_WITHOUT_NEW_LEVEL, Environment
from dsft.envs.conversation import Conversation, format_answer, instruction
from dsft.errors import UserError
from dsft.files import guard_disk, sync, write_text
from dsft.processes import HeldInterrupt, parallel

SEEDS_AT_ONCE = 8  # per message of a process
ROWS_AT_ONCE = 2048  # per row group
REPORT = "generate.json"


@dataclass(frozen=True)
class Episode:
    """One level as the expert played it."""

    seed: int
    level_id: str
    optimal_length: int
    states: list[str]
    """The position before each action."""
    actions: list[str]
    solved: bool


@dataclass
class Report:
    """What was generated. The counts are written to generate.json with the flags."""

    output_dir: str
    flags: dict[str, Any]
    levels: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    moves: int = 0
    optimal_moves: int = 0
    episodes_played: int = 0
    episodes_solved: int = 0
    repeated_levels: int = 0

    def lines(self) -> list[str]:
        """For the console."""
        kept, rate = sum(self.levels.values()), self.episodes_solved / self.episodes_played
        return [
            *(f"{s:<8} {n} levels, {self.rows[s]} rows: {self.output_dir}/{s}.parquet" for s, n in self.levels.items()),
            f"expert   solved {rate:.1%} of {self.episodes_played} episodes, {self.moves / kept:.2f} moves per level "
            f"(shortest {self.optimal_moves / kept:.2f}); {self.repeated_levels} repeated levels skipped",
        ]


def generate(config: GenerateConfig) -> Report:
    """Write train.parquet, test.parquet and generate.json.

    Raises:
        UserError: impossible settings, files that exist, too few different levels, a full disk.
    """
    environment = make_environment(config)  # refuses impossible sizes before any process starts
    folder = Path(config.output_dir)
    splits = {name: size for name, size in (("test", config.test_size), ("train", config.train_size)) if size}
    existing = [name for name in ("train.parquet", "test.parquet", REPORT) if (folder / name).exists()]
    if existing:
        raise UserError(f"{folder / existing[0]} exists; delete it, or choose another --output_dir")
    guard_disk(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
    flags = {k: v for k, v in asdict(config).items() if k not in ("config", "debug", "output_dir", "num_processes")}
    report = Report(config.output_dir, flags)
    unfinished = {split: folder / f".{split}.parquet.tmp" for split in splits}
    with HeldInterrupt() as interrupt:
        try:
            with (
                _searching(config, interrupt) as episodes,
                tqdm(total=sum(splits.values()), desc="levels", unit="level", disable=None) as bar,
            ):
                fresh = _different_levels(episodes, report, config, bar)
                for split, size in splits.items():
                    rows = _rows_of_split(config, instruction(environment), split, islice(fresh, size), report)
                    guard_disk(partial(_write, unfinished[split], config, rows), folder)
            for split, path in unfinished.items():
                guard_disk(partial(path.replace, folder / f"{split}.parquet"), folder)
            counts = {key: value for key, value in asdict(report).items() if key != "output_dir"}
            guard_disk(lambda: write_text(folder / REPORT, json.dumps(counts, indent=2) + "\n"), folder)
        finally:
            for split in ("test", "train"):  # also what a killed run with other sizes left
                (folder / f".{split}.parquet.tmp").unlink(missing_ok=True)
    return report


def play_expert(environment: Environment, seed: int) -> Episode:
    """The level of a seed, played by the expert until the episode is over."""
    environment.reset(seed)
    level_id, states, actions = environment.level_id, [], []
    plan: list[str] = []
    while not environment.over and (plan := plan or environment.expert_plan()):
        states.append(environment.observation())
        actions.append(plan.pop(0))
        environment.step(actions[-1])
    return Episode(seed, level_id, environment.optimal_length, states, actions, environment.solved)


@contextmanager
def _searching(config: GenerateConfig, interrupt: HeldInterrupt) -> Iterator[Iterator[Episode]]:
    """The expert's episodes on the seeds from config.seed on, in order and without end, until the block is left."""
    processes = config.num_processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield _played_here(config, interrupt)
        return
    lost = "a search process was killed, possibly for lack of memory; lower --num_processes"
    # fork is safe here: neither torch nor Arrow has started threads.
    method: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"
    with parallel(partial(_play_chunks, config), processes, lost, method=method, interrupt=interrupt) as chunks:
        yield chain.from_iterable(chunks)


def _played_here(config: GenerateConfig, interrupt: HeldInterrupt) -> Iterator[Episode]:
    environment = make_environment(config)
    for seed in count(config.seed):
        with interrupt.let_through():
            episode = play_expert(environment, seed)
        yield episode


def _play_chunks(config: GenerateConfig, number: int, processes: int) -> Iterator[list[Episode]]:
    """Every n-th chunk of seeds, without end."""
    environment = make_environment(config)
    for first in count(config.seed + number * SEEDS_AT_ONCE, processes * SEEDS_AT_ONCE):
        yield [play_expert(environment, seed) for seed in range(first, first + SEEDS_AT_ONCE)]


def _different_levels(
    episodes: Iterator[Episode], report: Report, config: GenerateConfig, bar: "tqdm[Any]"
) -> Iterator[Episode]:
    """Solved episodes of levels that have not been seen before; counts the others."""
    seen: set[str] = set()
    wanted, last = config.train_size + config.test_size, config.seed
    for episode in episodes:
        report.episodes_played += 1
        report.episodes_solved += episode.solved
        if episode.solved and episode.level_id in seen:
            report.repeated_levels += 1
        elif episode.solved:
            seen.add(episode.level_id)
            last = episode.seed
            bar.update()
            yield episode
        if episode.seed - last >= SEEDS_WITHOUT_NEW_LEVEL:
            raise UserError(
                f"only {len(seen)} different levels were solved in {report.episodes_played} episodes, {wanted} are "
                f"wanted; lower --train_size or --test_size, or make the levels of --env {config.env} larger"
            )


def _rows_of_split(
    config: GenerateConfig, system: str, split: str, episodes: Iterator[Episode], report: Report
) -> Iterator[dict[str, Any]]:
    """The rows of the episodes; counts both."""
    report.levels[split] = report.rows[split] = 0
    for index, episode in enumerate(episodes):
        report.levels[split] += 1
        report.moves += len(episode.actions)
        report.optimal_moves += episode.optimal_length
        for row in _rows(config, system, split, index, episode):
            report.rows[split] += 1
            yield row


def _rows(config: GenerateConfig, system: str, split: str, index: int, episode: Episode) -> Iterator[dict[str, Any]]:
    answers = [format_answer(action) for action in episode.actions]
    whole = Conversation(system, episode.states, answers)
    for turn in range(len(answers)) if config.rows == "turns" else [0]:
        so_far = Conversation(system, episode.states[: turn + 1], answers[:turn])
        answer = {"response": answers[turn]} if config.rows == "turns" else {"messages": whole.messages()}
        yield {
            "data_source": config.env,
            "prompt": so_far.prompt(config.style, config.history_turns),
            **answer,
            "ability": "planning",
            "reward_model": {"style": "rule", "ground_truth": {"plan": episode.actions[turn:]}},
            "extra_info": {"split": split, "index": index, "seed": episode.seed, "turn": turn}
            | {"optimal_length": episode.optimal_length, "level": episode.level_id},
        }


def _write(path: Path, config: GenerateConfig, rows: Iterator[dict[str, Any]]) -> None:
    """Stream rows to a parquet file."""
    import pyarrow as pa  # only now that the processes have been forked
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    prompt = messages if config.style == "messages" else pa.string()
    text = [("response", pa.string())] if config.rows == "turns" else [("messages", messages)]
    extra = [("split", pa.string()), *((n, pa.int64()) for n in ("index", "seed", "turn", "optimal_length"))]
    reward = pa.struct({"style": pa.string(), "ground_truth": pa.struct({"plan": pa.list_(pa.string())})})
    columns = [("data_source", pa.string()), ("prompt", prompt), *text, ("ability", pa.string())]
    columns += [("reward_model", reward), ("extra_info", pa.struct([*extra, ("level", pa.string())]))]
    schema = pa.schema(columns)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(group, schema))
    sync(path)
