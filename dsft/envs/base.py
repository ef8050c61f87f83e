"""The base class of environments: one level at a time, made from a seed, shown as text, with an expert. No torch."""

import hashlib
from abc import ABC, abstractmethod

ACTIONS = ("Up", "Down", "Left", "Right")
MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
"""(rows, columns) that each action moves the player by."""
SEEDS_WITHOUT_NEW_LEVEL = 2000
"""After this many seeds in a row without a new level, there are hardly any more."""


class Environment(ABC):
    """One game. `reset` makes a level from a seed; the same seed gives the same level on every machine."""

    rules: str
    """The game, its symbols and its goal: the instruction to the model."""

    def __init__(self, *, max_steps: int, max_depth: int) -> None:
        """Args:
        max_steps: actions after which an episode is over, solved or not.
        max_depth: the most moves that a shortest plan may have; at most max_steps.
        """
        self.max_steps = max_steps
        self.max_depth = min(max_depth, max_steps)
        self.steps = 0
        self.optimal_length = 0
        """The fewest moves that solve the level from its start."""

    def reset(self, seed: int) -> str:
        """Make the level of a seed (0 or more) and return the first observation.

        Raises:
            UserError: the settings allow no level, or hardly any.
        """
        self.steps = 0
        self.optimal_length = self._make_level(seed)
        return self.observation()

    def step(self, action: str) -> None:
        """Take one of ACTIONS; a blocked one counts as a step and changes nothing."""
        assert not self.over, "the episode is over"
        self.steps += 1
        self._move(action)

    @property
    def over(self) -> bool:
        """Whether the episode has ended: solved, lost, or out of steps."""
        return self.solved or self.lost or self.steps >= self.max_steps

    @property
    def level_id(self) -> str:
        """A hash of the current position, 16 hexadecimal digits."""
        return hashlib.sha256(self.observation().encode()).hexdigest()[:16]

    @property
    def lost(self) -> bool:
        """Whether the level can no longer be solved, as far as the game says so."""
        return False

    @abstractmethod
    def _make_level(self, seed: int) -> int:
        """Set up the level of a seed and return its optimal length; see `reset`."""

    @abstractmethod
    def _move(self, action: str) -> None:
        """Change the position by one action."""

    @property
    @abstractmethod
    def solved(self) -> bool:
        """Whether the level is solved."""

    @abstractmethod
    def observation(self) -> str:
        """The position as text: one line per row, symbols separated by spaces."""

    @abstractmethod
    def expert_plan(self) -> list[str]:
        """A shortest plan from here; in a game of chance only the best action.

        Empty if the episode is over, or no plan of at most `max_depth` moves exists.
        """
