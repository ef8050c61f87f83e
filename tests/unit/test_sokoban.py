"""Sokoban against a second simulator and an exhaustive search, both of which know the text alone."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsft.envs import sokoban
from dsft.envs.sokoban import Sokoban, from_flags
from dsft.errors import UserError
from tests.helpers import outputs_elsewhere

DEFAULTS = {"dim_x": 6, "dim_y": 6, "num_boxes": 1, "search_depth": 100, "max_steps": 100, "max_depth": 100}
DELTAS = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
SHAPES = [(5, 5), (6, 5), (5, 7), (6, 6), (7, 7)]
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**40)
action_lists = st.lists(st.sampled_from(list(DELTAS)), max_size=60)


def property_test(max_examples):
    return settings(deadline=None, database=None, max_examples=max_examples)


def game(**changes):
    return Sokoban(**{**DEFAULTS, **changes})


def load(env, text):
    """Put a game into the position of an observation, of any size and number of boxes, as its start."""
    rows = [line.split() for line in text.split("\n")]

    def cells(wanted):
        return sum(1 << i for i, symbol in enumerate(text.split()) if symbol in wanted)

    env._place(len(rows[0]), len(rows), cells("_OXP√S"), cells("O√S"), cells("X√"), cells("PS"))
    env.steps = 0
    env.optimal_length = len(env.expert_plan())


class Simulator:
    """The rules, on sets of (row, column)."""

    def __init__(self, text):
        rows = [line.split(" ") for line in text.split("\n")]
        self.height, self.width = len(rows), len(rows[0])
        assert {len(row) for row in rows} == {self.width}
        where = {symbol: set() for symbol in "#_OXP√S"}
        for r, row in enumerate(rows):
            for c, symbol in enumerate(row):
                where[symbol].add((r, c))
        self.walls = frozenset(where["#"])
        self.targets = frozenset(where["O"] | where["√"] | where["S"])
        self.boxes = frozenset(where["X"] | where["√"])
        [self.player] = where["P"] | where["S"]

    def after(self, player, boxes, action):
        """Player and boxes after an action."""
        dr, dc = DELTAS[action]
        ahead = (player[0] + dr, player[1] + dc)
        if ahead in self.walls:
            return player, boxes
        if ahead in boxes:
            beyond = (ahead[0] + dr, ahead[1] + dc)
            if beyond in self.walls or beyond in boxes:
                return player, boxes
            boxes = boxes - {ahead} | {beyond}
        return ahead, boxes

    def step(self, action):
        self.player, self.boxes = self.after(self.player, self.boxes, action)

    @property
    def solved(self):
        return self.boxes == self.targets

    def legal(self):
        here = self.player, self.boxes
        return [action for action in DELTAS if self.after(*here, action) != here]

    def text(self):
        def symbol(cell):
            if cell in self.walls:
                return "#"
            on_target = cell in self.targets
            if cell == self.player:
                return "S" if on_target else "P"
            if cell in self.boxes:
                return "√" if on_target else "X"
            return "O" if on_target else "_"

        return "\n".join(" ".join(symbol((r, c)) for c in range(self.width)) for r in range(self.height))


def fewest_moves(text):
    """The length of a shortest plan by looking at every position there is; None where no plan exists."""
    world = Simulator(text)
    layer = {(world.player, world.boxes)}
    seen = set(layer)
    moves = 0
    while layer:
        if any(boxes == world.targets for _, boxes in layer):
            return moves
        layer = {world.after(player, boxes, action) for player, boxes in layer for action in DELTAS} - seen
        seen |= layer
        moves += 1
    return None


def assert_replays(text, plan):
    world = Simulator(text)
    for action in plan:
        assert not world.solved
        assert action in world.legal()
        world.step(action)
    assert world.solved


@pytest.mark.parametrize("num_boxes", [1, 2])
@pytest.mark.parametrize(("dim_x", "dim_y"), SHAPES)
def test_every_plan_solves_its_level_in_the_fewest_moves(dim_x, dim_y, num_boxes):
    env = game(dim_x=dim_x, dim_y=dim_y, num_boxes=num_boxes)
    for seed in range(50):
        text = env.reset(seed)
        assert text == env.observation() == Simulator(text).text()
        assert [len(line.split(" ")) for line in text.split("\n")] == [dim_x] * dim_y
        world = Simulator(text)
        assert len(world.boxes) == len(world.targets) == num_boxes
        plan = env.expert_plan()
        assert_replays(text, plan)
        assert env.optimal_length == len(plan) == fewest_moves(text) > 0


@pytest.mark.parametrize(
    ("dim_x", "dim_y", "num_boxes"), [(10, 10, 3), (8, 6, 4), (6, 8, 4), (5, 5, 4), (12, 5, 3), (5, 12, 2), (12, 11, 4)]
)
def test_larger_levels_solve_and_replay(dim_x, dim_y, num_boxes):
    env = game(dim_x=dim_x, dim_y=dim_y, num_boxes=num_boxes)
    for seed in range(30):
        text = env.reset(seed)
        plan = env.expert_plan()
        assert_replays(text, plan)
        assert 0 < len(plan) == env.optimal_length <= 100


def test_a_few_larger_levels_have_shortest_plans():
    env = game(dim_x=8, dim_y=7, num_boxes=3)
    for seed in range(6):
        text = env.reset(seed)
        assert len(env.expert_plan()) == fewest_moves(text)


@property_test(120)
@given(shapes, st.integers(1, 3), seeds, action_lists)
def test_the_text_agrees_with_the_second_simulator_after_every_action(shape, num_boxes, seed, actions):
    env = game(dim_x=shape[0], dim_y=shape[1], num_boxes=num_boxes)
    world = Simulator(env.reset(seed))
    for action in actions:
        if env.over:
            break
        env.step(action)
        world.step(action)
        assert env.observation() == world.text()
        assert env.solved == world.solved
        assert not env.lost


@property_test(400)
@given(shapes, st.integers(1, 3), seeds, action_lists)
def test_off_the_plan_the_plan_is_still_shortest_or_empty_where_there_is_none(shape, num_boxes, seed, actions):
    env = game(dim_x=shape[0], dim_y=shape[1], num_boxes=min(num_boxes, 2 if shape == (7, 7) else 3))
    env.reset(seed)
    for action in actions:
        if not env.over:
            env.step(action)
    text, plan = env.observation(), env.expert_plan()
    fewest = fewest_moves(text)
    assert len(plan) == (fewest or 0)
    if fewest is not None:
        assert_replays(text, plan)


def test_both_outcomes_are_met_off_the_plan():
    env = game(num_boxes=3)
    outcomes = Counter()
    for seed in range(40):
        env.reset(seed)
        for n in range(12):
            if not env.over:
                legal = Simulator(env.observation()).legal()
                env.step(legal[(seed + n * n) % len(legal)])
        fewest = fewest_moves(env.observation())
        assert len(env.expert_plan()) == (fewest or 0)
        outcomes[fewest is None] += 1
    assert min(outcomes[True], outcomes[False]) >= 5


@property_test(60)
@given(shapes, st.integers(1, 4), seeds, st.integers(1, 200))
@example((5, 5), 4, 0, 1)
def test_no_level_is_solved_already_and_all_are_within_max_depth(shape, num_boxes, seed, search_depth):
    env = game(dim_x=shape[0], dim_y=shape[1], num_boxes=num_boxes, search_depth=search_depth, max_depth=9)
    env.reset(seed)
    assert not env.solved
    assert not env.over
    assert 1 <= env.optimal_length <= 9


def test_hardly_any_level_starts_with_a_box_on_its_target():
    env = game(dim_x=10, dim_y=10, num_boxes=3)
    assert sum("√" in env.reset(seed) for seed in range(100)) <= 15
    env = game()
    assert not any("√" in env.reset(seed) for seed in range(100))


def test_levels_differ_and_larger_rooms_have_walls_inside():
    env = game(dim_x=10, dim_y=10, num_boxes=3)
    levels = [env.reset(seed) for seed in range(100)]
    assert len(set(levels)) == 100
    assert all(10 <= level.count("#") - 36 <= 32 for level in levels)


def test_the_same_seed_gives_the_same_level_and_plan_in_another_process():
    code = (
        "import sys\n"
        "from dsft.envs.sokoban import Sokoban\n"
        "env = Sokoban(dim_x=9, dim_y=8, num_boxes=3, search_depth=100, max_steps=100, max_depth=100)\n"
        "for seed in [0, 1, 100000, 2**40]:\n"
        "    print(env.reset(seed).encode().hex(), *env.expert_plan())\n"
        "assert 'torch' not in sys.modules and 'dsft.config' not in sys.modules\n"
    )
    env = game(dim_x=9, dim_y=8, num_boxes=3)
    here = "".join(
        f"{env.reset(seed).encode().hex()} {' '.join(env.expert_plan())}\n" for seed in [0, 1, 100000, 2**40]
    )
    assert outputs_elsewhere(code) == {here}


def test_a_used_environment_makes_the_same_level_as_a_new_one():
    used = game(num_boxes=2)
    used.reset(7)
    for action in used.expert_plan():
        used.step(action)
    assert used.reset(3) == game(num_boxes=2).reset(3)
    assert used.steps == 0


LEVEL_OF_SEED_0 = """\
# # # # # #
# _ P _ _ #
# O X _ _ #
# _ # _ _ #
# _ _ _ _ #
# # # # # #"""

LEVEL_OF_SEED_100000 = """\
# # # # # # # # # #
# _ _ _ # # # # # #
# _ # # _ _ _ # # #
# _ _ _ _ # # # # #
# # _ _ _ _ # _ _ #
# # # _ _ _ O _ O #
# _ _ # _ _ X # # #
# _ _ _ _ _ _ X P #
# _ _ _ _ _ O X _ #
# # # # # # # # # #"""


def test_the_level_of_a_seed_is_the_same_in_every_version():
    env = game()
    assert env.reset(0) == LEVEL_OF_SEED_0
    assert env.expert_plan() == ["Right", "Down", "Left"]
    assert game(dim_x=10, dim_y=10, num_boxes=3).reset(100000) == LEVEL_OF_SEED_100000


CORRIDOR = """\
# # # # # # #
# P _ X _ O #
# # # # # # #"""

TURN = """\
# # # # # #
# _ _ _ O #
# _ X _ _ #
# P _ _ _ #
# _ _ _ _ #
# # # # # #"""

SWAP = """\
# # # # # # #
# P _ _ _ _ #
# _ X X _ O #
# _ _ _ _ O #
# # # # # # #"""


@pytest.mark.parametrize(
    ("text", "length"),
    # TURN: below the box, push up, around it, push right twice.
    [(CORRIDOR, 3), (TURN, 6), (SWAP, 11)],
)
def test_known_levels(text, length):
    env = game()
    load(env, text)
    assert env.observation() == text
    assert env.optimal_length == length == len(env.expert_plan()) == fewest_moves(text)
    assert_replays(text, env.expert_plan())


@pytest.mark.parametrize(
    "text",
    [
        "# # # # #\n# X _ _ #\n# _ P O #\n# _ _ _ #\n# # # # #",  # in a corner
        "# # # # # #\n# _ X _ _ #\n# _ P _ _ #\n# _ O _ _ #\n# # # # # #",  # along a wall
        "# # # # # #\n# _ _ _ _ #\n# _ X X _ #\n# _ √ X P #\n# O _ O O #\n# # # # # #",  # a block of four
        "# # # # # #\n# _ # P _ #\n# X # O _ #\n# _ # _ _ #\n# # # # # #",  # out of the player's reach
    ],
)
def test_where_no_plan_exists_there_is_none(text):
    env = game()
    load(env, text)
    assert fewest_moves(text) is None
    assert env.expert_plan() == []
    assert env.optimal_length == 0
    assert not env.over


def test_a_plan_longer_than_max_depth_is_none():
    for max_depth, length in [(3, 3), (2, 0)]:
        env = game(max_depth=max_depth)
        load(env, CORRIDOR)
        assert len(env.expert_plan()) == length


def test_after_a_plan_too_long_a_move_brings_one_within_reach():
    env = game(max_depth=2)
    load(env, CORRIDOR)
    env.step("Right")
    assert env.expert_plan() == ["Right", "Right"]


def test_making_and_following_a_plan_solves_the_level_once(monkeypatch):
    calls = []
    solve = sokoban.shortest_plan
    monkeypatch.setattr(sokoban, "shortest_plan", lambda *args: calls.append(args) or solve(*args))
    env = game()
    env.reset(5)
    plan = env.expert_plan()
    for n, action in enumerate(plan):
        assert env.expert_plan() == plan[n:]
        env.step(action)
    assert env.solved
    assert env.over
    assert env.expert_plan() == []
    assert len(calls) == 1


def test_a_plan_handed_out_is_the_callers_own():
    env = game()
    load(env, CORRIDOR)
    env.expert_plan().clear()
    assert len(env.expert_plan()) == 3


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("# # # # #\n# P _ _ #\n# O X _ #\n# _ _ _ #\n# # # # #", "Up"),
        ("# # # # #\n# _ _ _ #\n# O P X #\n# _ _ _ #\n# # # # #", "Right"),
        ("# # # # # #\n# _ _ _ _ #\n# P X X _ #\n# O O _ _ #\n# # # # # #", "Right"),
        ("# # # # # #\n# _ _ _ _ #\n# P √ X _ #\n# _ O _ _ #\n# # # # # #", "Right"),
    ],
    ids=["wall", "box before a wall", "box before a box", "box on a target before a box"],
)
def test_a_blocked_move_changes_nothing_but_steps(text, action):
    env = game()
    load(env, text)
    plan = env.expert_plan()
    env.step(action)
    assert env.observation() == text
    assert env.steps == 1
    assert env.expert_plan() == plan


def test_an_episode_is_over_after_max_steps():
    env = game(max_steps=3)
    load(env, TURN)
    for _ in range(3):
        assert not env.over
        env.step("Left")
    assert env.over
    assert not env.solved
    env.reset(0)
    assert not env.over


def test_level_ids_tell_positions_apart():
    env = game()
    env.reset(0)
    first = env.level_id
    env.step(env.expert_plan()[0])
    assert env.level_id != first
    env.reset(0)
    assert env.level_id == first


@property_test(40)
@given(shapes, st.integers(1, 4), seeds, action_lists)
def test_a_loaded_position_is_the_position(shape, num_boxes, seed, actions):
    env = game(dim_x=shape[0], dim_y=shape[1], num_boxes=num_boxes)
    env.reset(seed)
    for action in actions:
        if not env.over:
            env.step(action)
    other = game()
    load(other, env.observation())
    assert other.observation() == env.observation()
    assert other.steps == 0
    assert other.expert_plan() == env.expert_plan() or len(other.expert_plan()) == len(env.expert_plan())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim_x": 3}, "--dim_x must be 5 or more, got 3"),
        ({"dim_y": 4}, "--dim_y must be 5 or more, got 4"),
        ({"num_boxes": 0}, "--num_boxes must be 1 to 4, got 0"),
        ({"num_boxes": 5}, "--num_boxes must be 1 to 4, got 5"),
        ({"search_depth": 0}, "--search_depth must be 1 or more, got 0"),
        ({"max_depth": 0}, "--max_depth must be 1 or more, got 0"),
        ({"max_steps": 0}, "--max_steps must be 1 or more, got 0"),
        ({"dim_x": -1, "num_boxes": 9}, "--dim_x must be 5 or more, got -1\n--num_boxes must be 1 to 4, got 9"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(UserError) as caught:
        game(**changes)
    assert str(caught.value) == message


def test_where_max_depth_leaves_no_level_one_line_says_so(monkeypatch):
    # In 200 attempts a level of one move turns up on any board.
    monkeypatch.setattr(sokoban, "ATTEMPTS", 2)
    env = game(dim_x=10, dim_y=10, max_depth=1)
    with pytest.raises(UserError) as caught:
        [env.reset(seed) for seed in range(100)]
    message = str(caught.value)
    assert "\n" not in message
    assert "none of 2 levels tried has a plan of length 1 or less; raise --max_depth" in message


def test_giving_up_takes_seconds(monkeypatch):
    monkeypatch.setattr(sokoban, "shortest_plan", lambda *args: None)
    start = time.monotonic()
    with pytest.raises(UserError, match="none of 200 levels"):
        game(dim_x=10, dim_y=10, num_boxes=4, max_depth=1).reset(0)
    assert time.monotonic() - start < 5


def test_max_depth_of_one_is_met_within_seconds():
    env = game(dim_x=10, dim_y=10, num_boxes=3, max_depth=1)
    start = time.monotonic()
    env.reset(0)
    assert env.optimal_length == 1
    assert time.monotonic() - start < 5


def test_no_level_takes_long_to_make_and_solve():
    env = game(dim_x=10, dim_y=10, num_boxes=3)
    for seed in range(500):
        start = time.monotonic()
        env.reset(seed)
        assert time.monotonic() - start < 2


def test_flags_become_settings():
    env = from_flags(
        SimpleNamespace(**{**DEFAULTS, "dim_x": 7, "num_boxes": 2, "max_steps": 90, "max_depth": 80, "env": "sokoban"})
    )
    assert len(env.reset(1).split("\n")[0].split(" ")) == 7
    assert (env.dim_x, env.dim_y, env.num_boxes, env.search_depth) == (7, 6, 2, 100)
    assert (env.max_steps, env.max_depth) == (90, 80)


def test_rules_name_every_symbol_and_no_answer_format():
    for symbol in "#_OXP√S":
        assert f"{symbol} " in Sokoban.rules
    assert "answer" not in Sokoban.rules.lower()
