"""Sokoban: levels made by reverse play from a solved room, solved by a search for the fewest moves."""

import random
from typing import TYPE_CHECKING

from dsft.envs.base import ACTIONS, Environment
from dsft.envs.sokoban_solver import reachable, shifts, shortest_plan
from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.config import EnvironmentFlags

SYMBOLS = "#_OXP√S"
WALL, FLOOR, TARGET, BOX, PLAYER, BOX_ON_TARGET, PLAYER_ON_TARGET = tuple(SYMBOLS)

SMALLEST, MOST_BOXES = 5, 4
ATTEMPTS = 200
PATIENCE = 4
"""Attempts after which a level may start with one more box on a target."""
LONGEST_PULL = 4
ARMS = 0.6
"""Probability that a new floor cell touches only one other: more corridors and pillars, less of an open hall."""


def from_flags(flags: "EnvironmentFlags") -> "Sokoban":
    """The game with the settings of the command line."""
    names = ("dim_x", "dim_y", "num_boxes", "search_depth", "max_steps", "max_depth")
    return Sokoban(**{name: getattr(flags, name) for name in names})


class Sokoban(Environment):
    """A room with boxes that the player pushes onto targets.

    A set of cells is an integer: bit `row * width + column`.
    """

    rules = (
        "You play Sokoban. You see a room from above, a line per row, and walk one cell at a time: up, down, left or "
        "right.\n"
        "Symbols: # wall, _ empty floor, O target, X box, P you, √ box on a target, S you on a target.\n"
        "Walking into a box pushes it one cell further. You cannot pull a box. Nothing happens if you walk into a "
        "wall, or if a wall or another box is behind the box you push.\n"
        "Goal: every box on a target. A box pushed into a corner without a target is stuck, so plan ahead."
    )

    def __init__(
        self, *, dim_x: int, dim_y: int, num_boxes: int, search_depth: int, max_steps: int, max_depth: int
    ) -> None:
        """The settings are those of EnvironmentFlags; UserError if one is out of bounds."""
        super().__init__(max_steps=max_steps, max_depth=max_depth)
        bounds = [("dim_x", dim_x, SMALLEST), ("dim_y", dim_y, SMALLEST), ("search_depth", search_depth, 1)]
        bounds += [("max_steps", max_steps, 1), ("max_depth", max_depth, 1)]
        problems = [f"--{flag} must be {least} or more, got {given}" for flag, given, least in bounds if given < least]
        if not 1 <= num_boxes <= MOST_BOXES:
            problems.append(f"--num_boxes must be 1 to {MOST_BOXES}, got {num_boxes}")
        if problems:
            raise UserError("\n".join(problems))
        self.dim_x, self.dim_y = dim_x, dim_y
        self.num_boxes = num_boxes
        self.search_depth = search_depth

    def _place(self, width: int, height: int, floor: int, targets: int, boxes: int, player: int) -> None:
        self._width, self._height = width, height
        self._floor, self._targets, self._boxes, self._player = floor, targets, boxes, player
        self._shifts = dict(zip(ACTIONS, shifts(width), strict=True))
        self._plan: list[str] | None = None

    def _make_level(self, seed: int) -> int:
        for attempt in range(ATTEMPTS):
            rng = random.Random(f"{seed} {attempt}")
            level = _draw_level(rng, self.dim_x, self.dim_y, self.num_boxes, self.search_depth)
            if level is None:
                continue
            floor, targets, boxes, player = level
            if (boxes & targets).bit_count() > attempt // PATIENCE:
                continue
            plan = shortest_plan(self.dim_x, floor, targets, boxes, player, self.max_depth)
            if plan:
                self._place(self.dim_x, self.dim_y, floor, targets, boxes, player)
                self._plan = plan
                return len(plan)
        raise UserError(
            f"seed {seed}: none of {ATTEMPTS} levels tried has a plan of length {self.max_depth} or less; "
            "raise --max_depth (and --max_steps), or lower --search_depth, --num_boxes, --dim_x or --dim_y"
        )

    def _move(self, action: str) -> None:
        left, right = self._shifts[action]
        ahead = self._player << left >> right & self._floor
        if ahead & self._boxes:
            behind = ahead << left >> right & self._floor & ~self._boxes
            if not behind:
                return
            self._boxes ^= ahead | behind
        if ahead:
            self._player = ahead
            self._plan = self._plan[1:] if self._plan and self._plan[0] == action else None

    @property
    def solved(self) -> bool:
        """Whether every box is on a target."""
        return self._boxes == self._targets

    def observation(self) -> str:
        symbols = [WALL] * (self._width * self._height)
        for cells, symbol in (
            (self._floor, FLOOR),
            (self._targets, TARGET),
            (self._boxes, BOX),
            (self._boxes & self._targets, BOX_ON_TARGET),
            (self._player, PLAYER),
            (self._player & self._targets, PLAYER_ON_TARGET),
        ):
            while cells:
                symbols[(cells & -cells).bit_length() - 1] = symbol
                cells &= cells - 1
        rows = range(0, len(symbols), self._width)
        return "\n".join(" ".join(symbols[row : row + self._width]) for row in rows)

    def expert_plan(self) -> list[str]:
        if self._plan is None:
            plan = shortest_plan(self._width, self._floor, self._targets, self._boxes, self._player, self.max_depth)
            self._plan = plan or []
        return list(self._plan)


def _draw_level(
    rng: random.Random, width: int, height: int, num_boxes: int, search_depth: int
) -> tuple[int, int, int, int] | None:
    """Floor, targets, boxes and player of a solvable level, or None if the draw leaves nothing to play."""
    floor = _carve(rng, width, height, at_least=num_boxes + 2)
    # Only from these cells can a lone box be pulled away.
    leavable = 0
    for left, right in shifts(width):
        leavable |= floor & (floor >> left << right) & (floor >> 2 * left << 2 * right)
    if leavable.bit_count() < num_boxes:
        return None
    targets = 0
    for _ in range(num_boxes):
        targets |= _pick(rng, leavable & ~targets)
    played = _play_backwards(rng, width, floor, targets, search_depth)
    return played and (floor, targets, *played)


def _carve(rng: random.Random, width: int, height: int, at_least: int) -> int:
    """A connected floor, with more walls in a larger room."""
    inside = sum(((1 << width - 2) - 1 << 1) << row * width for row in range(1, height - 1))
    cells = inside.bit_count()
    least, most = (0.7, 1.0) if cells <= 25 else (0.55, 0.8)
    floor = _pick(rng, inside)
    for _ in range(max(at_least, round(cells * (least + (most - least) * rng.random()))) - 1):
        once = twice = 0
        for left, right in shifts(width):
            beside = floor << left >> right & inside & ~floor
            twice |= once & beside
            once |= beside
        single = once & ~twice
        floor |= _pick(rng, single if single and rng.random() < ARMS else once)
    return floor


def _play_backwards(rng: random.Random, width: int, floor: int, targets: int, depth: int) -> tuple[int, int] | None:
    """Boxes and player after about `depth` moves from the solved room: repeatedly a walk to a box and some pulls.

    Returns the last position with the most boxes off their targets; None if no box can be pulled.
    """
    boxes, player = targets, _pick(rng, floor & ~targets)
    best, most_off, moves = None, 1, 0
    while moves < depth:
        free = floor ^ boxes
        region = reachable(player, free, width)
        # Half of the draws favour boxes still on a target, so that every box moves.
        waiting = boxes & targets if rng.random() < 0.5 else 0
        pulls = _pulls(waiting, region, free, width) or _pulls(boxes, region, free, width)
        if not pulls:
            break
        places, left, right = pulls[int(rng.random() * len(pulls))]
        start, player = player, _pick(rng, places)
        while not start & player:
            start |= (start >> width | start << width | start >> 1 | start << 1) & free
            moves += 1
        for _ in range(1 + int(rng.random() * LONGEST_PULL)):
            ahead = player << left >> right
            if not ahead & free:
                break
            boxes ^= player ^ (player >> left << right)
            player = ahead
            moves += 1
        off = (boxes & ~targets).bit_count()
        if off >= most_off:
            best, most_off = (boxes, player), off
    if best is None:
        return None
    boxes, player = best
    return boxes, _pick(rng, reachable(player, floor ^ boxes, width))


def _pulls(boxes: int, region: int, free: int, width: int) -> list[tuple[int, int, int]]:
    """For each direction in which the player can pull a box: the cells to pull from, and the direction's shifts."""
    pulls = [(region & boxes << left >> right & free >> left << right, left, right) for left, right in shifts(width)]
    return [pull for pull in pulls if pull[0]]


def _pick(rng: random.Random, cells: int) -> int:
    """One of the cells, uniformly at random."""
    for _ in range(int(rng.random() * cells.bit_count())):
        cells &= cells - 1
    return cells & -cells
