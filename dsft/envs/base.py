"""What every environment is: a level at a time, made from a seed, seen as text, with an expert. No torch here."""

import hashlib
from abc import ABC, abstractmethod

ACTIONS = ("Up", "Down", "Left", "Right")
MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
"""(rows, columns) that each action moves the player by."""
SEEDS_WITHOUT_NEW_LEVEL = 2000
"""So many seeds in a row that make only levels one has had: there are hardly any more."""


class Environment(ABC):
    """One game. `reset` makes a level from a seed, and the same seed gives the same level on every machine.

    A third game is one file with one subclass, its flags in `EnvironmentFlags`, and its name in `dsft.envs`.
    """

    rules: str
    """What the game is, which symbols stand for what, and how the game is won: the instruction to the model."""

    def __init__(self, *, max_steps: int, max_depth: int) -> None:
        """Args:
        max_steps: actions after which an episode is over, won or not.
        max_depth: the longest shortest plan, in moves, that a level may need; never more than max_steps.
        """
        self.max_steps = max_steps
        self.max_depth = min(max_depth, max_steps)
        self.steps = 0
        self.optimal_length = 0
        """The fewest moves that can solve the level as it was after `reset`."""

    def reset(self, seed: int) -> str:
        """Make the level of a seed (0 or more) and return the first observation.

        Raises:
            UserError: no such level is found; the settings leave none, or hardly any.
        """
        self.steps = 0
        self.optimal_length = self._make_level(seed)
        return self.observation()

    def step(self, action: str) -> None:
        """Take one of ACTIONS; a blocked one uses up a step and changes nothing."""
        assert not self.over, "the episode is over"
        self.steps += 1
        self._move(action)

    @property
    def over(self) -> bool:
        """Whether no action is possible any more: solved, lost, or out of steps."""
        return self.solved or self.lost or self.steps >= self.max_steps

    @property
    def level_id(self) -> str:
        """16 hexadecimal digits that differ wherever the present position differs in content."""
        return hashlib.sha256(self.observation().encode()).hexdigest()[:16]

    @property
    def lost(self) -> bool:
        """Whether the level can certainly not be solved any more, and the game says so."""
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
        """The position as text: a line per row, symbols separated by a space."""

    @abstractmethod
    def legal_actions(self) -> list[str]:
        """The actions that would change the position, in the order of ACTIONS."""

    @abstractmethod
    def expert_plan(self) -> list[str]:
        """The best actions from here on, as far as they can be known before looking again; not empty before the end.

        In a deterministic game a shortest plan, whole. In a game of chance the one best action.
        Where no plan of at most `max_depth` moves exists from here, an empty list.
        """
