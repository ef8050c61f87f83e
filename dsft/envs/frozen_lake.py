"""FrozenLake: gymnasium's game as text. Expert: the shortest path or, on slippery ice, the optimal policy."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from dsft.envs.base import MOVES, Environment
from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.config import EnvironmentFlags

ORDER = ("Left", "Down", "Right", "Up")
"""gymnasium's order of the actions."""
ATTEMPTS = 1000
DISCOUNT = 1 - 1e-6
"""Of the value iteration: among policies that reach the goal equally often, it prefers the shorter way."""


def from_flags(flags: "EnvironmentFlags") -> "FrozenLake":
    """The lake that the flags describe."""
    return FrozenLake(flags.size, flags.p, flags.is_slippery, max_steps=flags.max_steps, max_depth=flags.max_depth)


class FrozenLake(Environment):
    """gymnasium's FrozenLake-v1 on random maps: start top left, goal bottom right, holes between."""

    rules = (
        "You are P on a frozen lake and must reach the goal G. _ is ice, O is a hole: whoever steps into it has lost. "
        "Up, Down, Left and Right move you one tile in the picture; the edge of the lake stops you."
    )
    slippery_rules = (
        " The ice is slippery: only one move in three goes where you want, the others go to either side of that "
        "direction, so keep away from holes."
    )

    def __init__(self, size: int, p: float, is_slippery: bool, *, max_steps: int, max_depth: int) -> None:
        """The settings are those of EnvironmentFlags; UserError if they allow no level."""
        super().__init__(max_steps=max_steps, max_depth=max_depth)
        problems = []
        if not 2 <= size <= 100:
            problems.append(f"--size must be from 2 to 100, got {size}")
        if not 0 < p <= 1:
            problems.append(f"--p must be above 0 and at most 1, got {p}")
        if 2 <= size <= 100 and self.max_depth < 2 * (size - 1):
            problems.append(
                f"--max_depth and --max_steps must be {2 * (size - 1)} or more to cross a lake of --size {size}, "
                f"got {max_depth} and {max_steps}"
            )
        if problems:
            raise UserError("\n".join(problems))
        self.size, self.p, self.is_slippery = size, p, is_slippery
        if is_slippery:
            self.rules = self.rules + self.slippery_rules

    def _make_level(self, seed: int) -> int:
        # Not default_rng(seed): gymnasium draws the slips from that stream, which would correlate them with the holes.
        random = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        too_long = False
        for _ in range(ATTEMPTS):
            holes = random.random((self.size, self.size)) >= self.p
            holes[0, 0] = holes[-1, -1] = False
            self._holes = holes.tolist()
            length = len(_shortest_path(self._holes, (0, 0)))
            if 0 < length <= self.max_depth:
                break
            too_long = too_long or length > 0
        else:
            remedy = "raise --max_depth and --max_steps" if too_long else "raise --p"
            raise UserError(
                f"{ATTEMPTS} lakes of --size {self.size} with --p {self.p:g} (seed {seed}): none can be crossed in "
                f"{self.max_depth} moves; {remedy}, or lower --size"
            )
        tiles = np.where(holes, "H", "F")
        tiles[0, 0], tiles[-1, -1] = "S", "G"
        self._lake = FrozenLakeEnv(desc=["".join(row) for row in tiles], is_slippery=self.is_slippery)
        self._lake.reset(seed=seed)
        self._policy: np.ndarray | None = None
        return length

    def _move(self, action: str) -> None:
        self._lake.step(ORDER.index(action))

    @property
    def _position(self) -> tuple[int, int]:
        return divmod(int(self._lake.s), self.size)

    @property
    def solved(self) -> bool:
        """Whether the player stands on the goal."""
        return self._position == (self.size - 1, self.size - 1)

    @property
    def lost(self) -> bool:
        """Whether the player has fallen into a hole."""
        row, column = self._position
        return self._holes[row][column]

    def observation(self) -> str:
        """The lake; X is a player in a hole, √ one on the goal."""
        symbols = [["O" if hole else "_" for hole in row] for row in self._holes]
        symbols[-1][-1] = "G"
        row, column = self._position
        symbols[row][column] = "X" if self.lost else "√" if self.solved else "P"
        return "\n".join(" ".join(row) for row in symbols)

    def expert_plan(self) -> list[str]:
        """The shortest path; on slippery ice the best action for the steps that are left."""
        if self.over:
            return []
        if not self.is_slippery:
            path = _shortest_path(self._holes, self._position)
            return path if len(path) <= self.max_depth else []
        if self._policy is None:
            self._policy = _optimal_policy(self._lake, self.max_steps)
        return [ORDER[self._policy[self.max_steps - self.steps, self._lake.s]]]


def _shortest_path(holes: list[list[bool]], start: tuple[int, int]) -> list[str]:
    """Breadth-first search from `start` to the last tile; empty where there is no way."""
    size = len(holes)
    paths: dict[tuple[int, int], list[str]] = {start: []}
    queue = deque([start])
    while queue and (size - 1, size - 1) not in paths:
        here = queue.popleft()
        for action, (down, right) in MOVES.items():
            row, column = here[0] + down, here[1] + right
            if 0 <= row < size and 0 <= column < size and not holes[row][column] and (row, column) not in paths:
                paths[row, column] = [*paths[here], action]
                queue.append((row, column))
    return paths.get((size - 1, size - 1), [])


def _optimal_policy(lake: FrozenLakeEnv, horizon: int) -> np.ndarray:
    """The action most likely to reach the goal, int64 [steps left, state], by backward induction over the steps left.

    Puterman, Markov Decision Processes, 1994, section 4.5.
    """
    states, actions = len(lake.P), len(ORDER)
    outcomes = max(len(o) for by_action in lake.P.values() for o in by_action.values())
    weight = np.zeros((states, actions, outcomes))
    following = np.zeros((states, actions, outcomes), np.int64)
    reward = np.zeros((states, actions))
    for state, by_action in lake.P.items():
        for action, results in by_action.items():
            for index, (chance, next_state, gain, done) in enumerate(results):
                weight[state, action, index] = chance * DISCOUNT * (not done)
                following[state, action, index] = next_state
                reward[state, action] += chance * gain
    value = np.zeros(states)
    policy = np.zeros((horizon + 1, states), np.int64)
    for left in range(1, horizon + 1):
        gain = reward + (weight * value[following]).sum(axis=2)
        policy[left] = gain.argmax(axis=1)
        value = gain.max(axis=1)
    return policy
