"""FrozenLake against gymnasium's own game rebuilt from the text, an exhaustive search, and exact counting of slips."""

import time
from collections import Counter
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.envs import frozen_lake
from dsft.envs.base import ACTIONS
from dsft.envs.expert_data import play_expert
from dsft.envs.frozen_lake import FrozenLake, from_flags
from dsft.errors import UserError
from tests.helpers import outputs_elsewhere

NUMBERS = {"Left": 0, "Down": 1, "Right": 2, "Up": 3}
TILES = {"P": "S", "_": "F", "O": "H", "G": "G"}
action_lists = st.lists(st.sampled_from(ACTIONS), max_size=40)
seeds = st.integers(0, 2**40)
sizes = st.integers(2, 7)


def property_test(max_examples):
    return settings(deadline=None, database=None, max_examples=max_examples)


def lake(size=4, p=0.8, is_slippery=False, max_steps=100, max_depth=100):
    return FrozenLake(size, p, is_slippery, max_steps=max_steps, max_depth=max_depth)


def gymnasium_lake(first_text, is_slippery):
    """gymnasium's game on the lake of a first observation."""
    desc = ["".join(TILES[symbol] for symbol in line.split(" ")) for line in first_text.split("\n")]
    return gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=is_slippery, max_episode_steps=1000)


def text_of(game, state):
    """The observation that belongs to a state of gymnasium's game."""
    rows = [[{"S": "_", "F": "_", "H": "O", "G": "G"}[t.decode()] for t in row] for row in game.unwrapped.desc]
    row, column = divmod(state, len(rows))
    rows[row][column] = {"_": "P", "O": "X", "G": "√"}[rows[row][column]]
    return "\n".join(" ".join(row) for row in rows)


def fewest_moves(game, state):
    """The length of a shortest way to the goal by following every action of gymnasium's table at once."""
    goal = len(game.unwrapped.P) - 1
    reached, moves = {state}, 0
    while goal not in reached:
        further = {nxt for s in reached for a in range(4) for _, nxt, _, _ in game.unwrapped.P[s][a]} | reached
        assert further != reached, "no way"
        reached, moves = further, moves + 1
    return moves


def slips(game):
    """int [states, 4 actions, 3 equally likely next states]; gymnasium's table keeps the player in holes and goal."""
    table = game.unwrapped.P
    rows = [[[nxt for _, nxt, _, _ in table[s][a]] for a in range(4)] for s in range(len(table))]
    assert {round(chance, 9) for s in table for a in range(4) for chance, *_ in table[s][a]} <= {1, round(1 / 3, 9)}
    return np.array([[nxt if len(nxt) == 3 else nxt * 3 for nxt in row] for row in rows])


# The game


@pytest.mark.parametrize("is_slippery", [False, True])
@property_test(60)
@given(size=sizes, p=st.sampled_from([0.6, 0.8, 1.0]), seed=seeds, actions=action_lists)
def test_text_and_dynamics_are_gymnasiums(is_slippery, size, p, seed, actions):
    env = lake(size, p, is_slippery)
    first = env.reset(seed)
    game = gymnasium_lake(first, is_slippery)
    state, _ = game.reset(seed=seed)
    assert first == text_of(game, state)
    assert (env.solved, env.lost, env.over) == (False, False, False)
    for action in actions:
        env.step(action)
        state, reward, terminated, _, _ = game.step(NUMBERS[action])
        assert env.observation() == text_of(game, state)
        assert env.solved == (reward == 1)
        assert env.lost == (terminated and reward == 0)
        assert env.over == terminated
        if terminated:
            assert env.expert_plan() == []
            return


def played(env, seed, actions):
    env.reset(seed)
    for action in actions:
        env.step(action)
    return env.observation()


LAKE_OF_SEED_2 = """\
P _ _ _
_ _ _ O
_ O O _
_ _ _ G"""


def test_the_lake_of_a_seed_is_the_same_in_every_version():
    assert lake().reset(2) == lake(is_slippery=True).reset(2) == LAKE_OF_SEED_2


def test_the_marks_of_the_end():
    assert played(lake(), 2, ["Down", "Right", "Down"]) == LAKE_OF_SEED_2.replace("P", "_").replace("_ O O", "_ X O")
    assert played(lake(), 2, ["Down"] * 3 + ["Right"] * 3) == LAKE_OF_SEED_2.replace("P", "_").replace("G", "√")


def test_an_episode_is_over_after_max_steps():
    env = lake(max_steps=6)
    env.reset(1)
    for _ in range(6):
        assert not env.over
        env.step("Up")
    assert env.over
    assert (env.solved, env.lost) == (False, False)
    assert env.expert_plan() == []


def test_slips_are_even_whatever_the_lake():
    # Lake and slips come from one seed. From one stream, a hole right of the start would tell the first slip.
    env, counts = lake(p=0.7, is_slippery=True), {"_": Counter(), "O": Counter()}
    for seed in range(1500):
        right_of_start = env.reset(seed)[2]
        env.step("Up")
        here = env.observation()
        counts[right_of_start]["Left or Up" if here[0] == "P" else "Right"] += 1
    for count in counts.values():
        assert count.total() > 300
        assert 0.26 < count["Right"] / count.total() < 0.41


# The expert, not slippery


@property_test(120)
@given(size=sizes, p=st.sampled_from([0.6, 0.7, 0.8, 1.0]), seed=seeds, actions=action_lists)
def test_the_plan_is_a_shortest_one_from_the_start_and_from_anywhere(size, p, seed, actions):
    env = lake(size, p)
    game = gymnasium_lake(env.reset(seed), False)
    state, _ = game.reset(seed=seed)
    assert len(env.expert_plan()) == env.optimal_length == fewest_moves(game, state) >= 2 * (size - 1)
    for action in actions:
        if not env.over:
            env.step(action)
            state, *_ = game.step(NUMBERS[action])
    if not env.over:
        plan = env.expert_plan()
        assert len(plan) == fewest_moves(game, state)
        for action in plan:
            assert not env.solved
            _, reward, *_ = game.step(NUMBERS[action])
            env.step(action)
        assert reward == 1
        assert env.solved


@property_test(30)
@given(size=st.integers(3, 6), extra=st.integers(0, 6), seed=seeds)
def test_no_level_needs_more_than_max_depth(size, extra, seed):
    depth = 2 * (size - 1) + extra
    for env in (lake(size, 0.6, max_depth=depth), lake(size, 0.6, max_steps=depth)):
        env.reset(seed)
        assert env.optimal_length <= depth
        assert len(env.expert_plan()) == env.optimal_length


def test_longer_plans_than_the_least_are_met():
    env = lake(7, 0.6)
    assert len({env.optimal_length for seed in range(100) if env.reset(seed)}) > 2


def test_a_plan_longer_than_max_depth_is_none():
    for max_depth, length in [(9, 9), (6, 0)]:
        env = lake(max_depth=max_depth)
        assert env.reset(2) == LAKE_OF_SEED_2
        for _ in range(3):
            env.step("Right")
        assert not env.over
        assert len(env.expert_plan()) == length


# The expert, slippery


@pytest.mark.slow
def test_the_expert_succeeds_as_often_as_the_best_possible_player():
    env = lake(is_slippery=True)
    solved, tables = [], []
    for seed in range(2000):
        first = env.reset(seed)
        tables.append(slips(gymnasium_lake(first, True)))
        episode = play_expert(env, seed)
        assert episode.states[0] == first
        solved.append(episode.solved)
    following = np.array(tables).reshape(2000, -1)
    value = np.zeros((2000, 16))
    value[:, -1] = 1  # chance of the goal with no step left: only there
    for _ in range(100):
        value = np.take_along_axis(value, following, axis=1).reshape(2000, 16, 4, 3).mean(axis=3).max(axis=2)
    assert abs(np.mean(solved) - value[:, 0].mean()) < 0.02


@pytest.mark.parametrize(("size", "p", "max_steps"), [(3, 0.8, 7), (4, 0.8, 100), (4, 0.7, 25), (5, 0.8, 60)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_choice_is_as_good_as_the_best_one(size, p, max_steps, seed):
    """Counted exactly: of the 3^k ways in which k moves may slip, how many lead to the goal."""
    env = lake(size, p, is_slippery=True, max_steps=max_steps)
    game = gymnasium_lake(env.reset(seed), True)
    following = slips(game).tolist()
    best = by_expert = [0] * (size * size - 1) + [1]
    for left in range(1, max_steps + 1):
        chosen = []
        for state in range(size * size):
            env.steps, env._lake.s = max_steps - left, state
            plan = env.expert_plan()
            assert len(plan) == (0 if env.over else 1)
            chosen.append(NUMBERS[plan[0]] if plan else 0)
        best = [max(sum(best[nxt] for nxt in slip) for slip in by_action) for by_action in following]
        by_expert = [sum(by_expert[nxt] for nxt in following[s][a]) for s, a in enumerate(chosen)]
        assert all((b - e) / 3**left <= 1e-4 for b, e in zip(best, by_expert, strict=True))
    assert best[0] > 0


def test_of_equally_sure_ways_the_shorter_is_taken():
    env = lake(4, 1.0, is_slippery=True, max_steps=1000)  # without holes every way is sure in the end
    env.reset(0)
    assert env.expert_plan()[0] in ("Right", "Down")
    assert np.mean([len(play_expert(env, seed).actions) for seed in range(100)]) < 40


# Seeds, names, settings


def test_the_same_seed_gives_the_same_lake_in_another_process():
    code = (
        "import sys\n"
        "from dsft.envs.frozen_lake import FrozenLake\n"
        "env = FrozenLake(8, 0.7, True, max_steps=100, max_depth=100)\n"
        "for seed in [0, 1, 100000, 2**40]:\n"
        "    print(env.reset(seed).encode().hex(), env.level_id, env.expert_plan()[0])\n"
        "    env.step('Down'); print(env.level_id)\n"
        "assert 'torch' not in sys.modules and 'dsft.config' not in sys.modules\n"
    )
    env, here = lake(8, 0.7, True), []
    for seed in [0, 1, 100000, 2**40]:
        here.append(f"{env.reset(seed).encode().hex()} {env.level_id} {env.expert_plan()[0]}\n")
        env.step("Down")
        here.append(f"{env.level_id}\n")
    assert outputs_elsewhere(code) == {"".join(here)}


def test_a_used_environment_makes_the_same_level_and_the_same_slips_as_a_new_one():
    used = lake(is_slippery=True)
    play_expert(used, 7)
    assert play_expert(used, 3) == play_expert(lake(is_slippery=True), 3)


def test_level_ids_differ_exactly_where_lakes_do():
    env = lake(3, 0.7)
    lakes = {env.reset(seed): env.level_id for seed in range(300)}
    assert len(set(lakes.values())) == len(lakes) > 30
    assert all(env.reset(seed) in lakes and env.level_id == lakes[env.reset(seed)] for seed in range(300))
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in lakes.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 1}, "--size must be from 2 to 100, got 1"),
        ({"size": 101}, "--size must be from 2 to 100, got 101"),
        ({"p": 0}, "--p must be above 0 and at most 1, got 0"),
        ({"p": 2}, "--p must be above 0 and at most 1, got 2"),
        ({"p": float("nan")}, "--p must be above 0 and at most 1, got nan"),
        (
            {"size": 8, "max_depth": 13},
            "--max_depth and --max_steps must be 14 or more to cross a lake of --size 8, got 13 and 100",
        ),
        (
            {"size": 8, "max_steps": 5},
            "--max_depth and --max_steps must be 14 or more to cross a lake of --size 8, got 100 and 5",
        ),
        ({"size": 0, "p": -1}, "--size must be from 2 to 100, got 0\n--p must be above 0 and at most 1, got -1"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(UserError) as caught:
        lake(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(("size", "p"), [(4, 1e-9), (30, 0.3), (100, 0.05)])
def test_where_no_lake_can_be_crossed_one_line_says_so_in_seconds(size, p):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        lake(size, p, max_steps=1000, max_depth=1000).reset(5)
    assert time.monotonic() - start < 5
    assert str(caught.value) == (
        f"1000 lakes of --size {size} with --p {p:g} (seed 5): none can be crossed in 1000 moves; "
        "raise --p, or lower --size"
    )


def test_where_every_way_is_too_long_the_remedy_is_more_moves(monkeypatch):
    monkeypatch.setattr(frozen_lake, "ATTEMPTS", 20)
    env = lake(12, 0.62, max_depth=22)
    messages = []
    for seed in range(40):
        try:
            env.reset(seed)
        except UserError as error:
            messages.append(str(error))
    assert any("none can be crossed in 22 moves; raise --max_depth and --max_steps" in text for text in messages)


def test_flags_become_settings():
    env = from_flags(
        SimpleNamespace(env="frozenlake", size=5, p=0.9, is_slippery=True, max_steps=90, max_depth=80, dim_x=6)
    )
    assert (env.size, env.p, env.is_slippery, env.max_steps, env.max_depth) == (5, 0.9, True, 90, 80)


def test_rules_name_the_symbols_and_slips_only_where_there_are_any():
    for words in ("You are P ", "the goal G.", "_ is ice", "O is a hole"):
        assert words in FrozenLake.rules
    assert "answer" not in lake(is_slippery=True).rules.lower()
    assert "slippery" in lake(is_slippery=True).rules
    assert "slippery" not in lake().rules
