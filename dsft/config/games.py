"""Flags of dsft.generate and dsft.validate: environments, prompts, expert data, playing."""

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dsft.config.flags import CommonFlags, ModelFlags, RowFlags, flag

OWN_FLAGS = {"sokoban": ("dim_x", "dim_y", "num_boxes", "search_depth"), "frozenlake": ("size", "p", "is_slippery")}
SCRIPTED_PLAYERS = ("expert", "random")
BASE, TUNED = "base model", "fine-tuned model"
PLAYERS = (BASE, TUNED, *SCRIPTED_PLAYERS)
"""Who plays in a pipeline, in the order in which reports show them."""
ONLY_GAMES = (
    "levels", "exclude_levels", "max_turns", "max_steps", "max_depth", "transcripts", "style", "history_turns",
)  # fmt: skip
ONLY_DIALOGUES = tuple(f.name for f in fields(RowFlags) if f.name not in ("with_thinking", "template_arguments"))


def changed_flags(config: Any, names: Iterable[str]) -> str:
    """Those of the flags whose value is not the default, as typed."""
    defaults = {f.name: f.default for f in fields(config)}
    return ", ".join(f"--{name}" for name in names if getattr(config, name) != defaults[name])


@dataclass(kw_only=True)
class EnvironmentFlags:
    """Which game, and how hard."""

    env: Literal["sokoban", "frozenlake"] | None = flag(None, section="Environment")
    """The game."""
    max_steps: int = flag(100, must_be="1 or more")
    """Maximum moves of an episode."""
    max_depth: int = flag(100, must_be="1 or more")
    """Maximum length of a plan; every level can be solved in this many moves."""
    dim_x: int = flag(6)
    """Sokoban: width of the room, walls included."""
    dim_y: int = flag(6)
    """Sokoban: height of the room, walls included."""
    num_boxes: int = flag(1)
    """Sokoban: boxes, 1 to 4."""
    search_depth: int = flag(100)
    """Sokoban: moves of reverse play that make a level; more move the boxes further."""
    size: int = flag(4)
    """FrozenLake: width and height of the lake."""
    p: float = flag(0.8)
    """FrozenLake: probability that a tile is frozen rather than a hole."""
    is_slippery: bool = flag(False)
    """FrozenLake: two of three moves slip to either side."""

    def environment_problems(self, *, required: bool) -> Iterator[str]:
        """What is wrong with these flags; the environment itself checks its sizes."""
        if required and not self.env:
            yield "--env is required: sokoban or frozenlake"
            return
        for game, names in OWN_FLAGS.items():
            if self.env != game and (changed := changed_flags(self, names)):
                got = f"--env {self.env}" if self.env else "no --env"
                yield f"{changed} belongs to --env {game}, got {got}; drop one of them"


@dataclass(kw_only=True)
class PromptFlags:
    """How a position and its history become a prompt. Evaluate a model as it was trained."""

    style: Literal["messages", "chatml", "plain"] = flag("messages", section="Prompt")
    """A prompt is a list of {role, content}, a string in ChatML, or a plain string."""
    history_turns: int | None = flag(None, must_be="0 or more")
    """Keep only the last N moves in a prompt; all by default, 0 for the current position only."""


@dataclass(kw_only=True)
class GenerateConfig(PromptFlags, EnvironmentFlags, CommonFlags):
    """Expert data by search: solved episodes of a game as parquet rows for training."""

    rows: Literal["turns", "episodes"] = flag("turns", section="Rows")
    """turns: a row per move, its history in the prompt; episodes: a row per conversation (--messages_key messages)."""
    train_size: int = flag(1000, must_be="1 or more")
    """Levels in train.parquet, each solved once."""
    test_size: int = flag(100, must_be="0 or more")
    """Levels in test.parquet; none of them is in train.parquet."""
    seed: int = flag(100000, must_be="0 or more")
    """Seed of the first level; later levels take the following seeds, test before train."""
    num_processes: int | None = flag(None, must_be="1 or more")
    """Processes that search; one per core by default. The files do not depend on it."""
    output_dir: str = flag(required=True, section="Output")
    """Folder of train.parquet, test.parquet and generate.json. The files must not exist."""

    def problems(self) -> Iterator[str]:
        yield from self.environment_problems(required=True)
        if self.rows == "episodes" and self.style != "messages":
            yield f"--rows episodes needs --style messages, got {self.style}"
        if self.rows == "episodes" and self.history_turns is not None:
            yield "--rows episodes keeps the whole history; drop history_turns"
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            yield f"output_dir {self.output_dir} is a file; name a folder"


@dataclass(kw_only=True)
class ValidateConfig(PromptFlags, EnvironmentFlags, RowFlags, ModelFlags, CommonFlags):
    """Evaluate a model by playing a game (--env), or by its loss and answers on dialogues (--data)."""

    model: str = flag(required=True, section="Model")
    """As in training; or a player without a model: expert (the search), random (uniformly random actions)."""
    adapter: str | None = flag(None, section="Validation")
    """LoRA adapter: a run's folder (its best checkpoint) or a checkpoint folder."""
    data: str | None = flag(None)
    """Dialogues, instead of --env: a file, a glob, or a folder, as for --train_files of dsft.train."""
    episodes: int = flag(100, must_be="1 or more")
    """Levels to play, or dialogue rows to answer."""
    seed: int = flag(0, must_be="0 or more")
    """Seed of the first level; later levels take the following seeds. Also the seed of sampling."""
    levels: str | None = flag(None)
    """Play the levels of this parquet file of dsft.generate, instead of those from --seed on."""
    exclude_levels: list[str] | None = flag(None)
    """Skip the levels of these parquet files of dsft.generate: a file, a list, a glob, or a folder."""
    max_turns: int | None = flag(None, must_be="1 or more")
    """Maximum answers in an episode, valid or not; --max_steps by default."""
    batch_size: int = flag(16, must_be="1 or more")
    """Episodes or rows per batch on one rank; changes memory and speed."""
    temperature: float = flag(0.0, must_be="0 or more")
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: int = flag(512, must_be="1 or more")
    """Maximum tokens of an answer."""
    engine: Literal["transformers", "vllm"] = flag("transformers")
    """Generation engine; vllm must be installed separately."""
    transcripts: int = flag(2, must_be="0 or more")
    """Conversations in the report: this many of solved and of failed episodes each."""
    output: str = flag("report.json", section="Output")
    """The report; all episodes or rows go to the same name with .jsonl. Overwritten."""

    def problems(self) -> Iterator[str]:
        yield from self.environment_problems(required=False)
        if (self.env is None) == (self.data is None):
            yield "give either --env (sokoban or frozenlake) or --data (a file of dialogues)"
        if self.model in SCRIPTED_PLAYERS and self.data is not None and self.env is None:
            yield f"--model {self.model} plays games only; name --env"
        if self.model in SCRIPTED_PLAYERS and self.adapter is not None:
            yield f"--model {self.model} has no weights; drop --adapter"
        if self.data is not None and self.messages_key is not None:
            yield "--data needs prompt and response columns; it cannot be combined with messages_key"
        yield from self.row_problems()
        unread = ONLY_DIALOGUES if self.env else ONLY_GAMES if self.data else ()
        if changed := changed_flags(self, unread):
            yield f"{changed} belongs to {'--data' if self.env else '--env'}; drop one of them"
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            yield "--engine vllm needs the package vllm; install it, or drop the flag"
        if Path(self.output).is_dir() or not self.output.endswith(".json"):
            yield f"output must be a .json file, got {self.output}"
