"""Playing games: the players' known success rates, invalid answers, levels, and batches against one by one."""

import json
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest

from dsft.config import ValidateConfig
from dsft.distributed.runtime import World
from dsft.envs import make_environment
from dsft.envs.base import ACTIONS
from dsft.envs.expert_data import play_expert
from dsft.errors import UserError
from dsft.validation.generation import load_generator
from dsft.validation.playing import (
    ModelPlayer,
    choose_levels,
    expert_answers,
    play,
    random_answers,
    summarize_episodes,
)
from dsft.validation.statistics import wilson_interval
from tests.helpers import write_parquet

ALONE = World(0, 1, 0, 1)


def config(**values) -> ValidateConfig:
    made = ValidateConfig(**{"model": "random", "env": "frozenlake", "episodes": 20} | values)
    made.check()
    return made


def played(player, **values):
    flags = config(**values)
    return play(flags, player, choose_levels(flags), ALONE)


@pytest.mark.parametrize(
    "game",
    [
        {"env": "frozenlake", "size": 6},
        {"env": "sokoban"},
        {"env": "sokoban", "dim_x": 7, "dim_y": 8, "num_boxes": 3},
    ],
)
def test_the_expert_solves_every_level_in_the_fewest_moves(game):
    outcomes = played(expert_answers, **game)
    assert summarize_episodes(outcomes, 0)["success_rate"] == 1
    assert summarize_episodes(outcomes, 0)["moves_over_optimum"] == 0
    assert all(outcome.turns == outcome.moves == outcome.optimal_length for outcome in outcomes)


def chance_of_random_success(environment, turns: int) -> float:
    """Exact: the distribution over positions after each random action, from gymnasium's table."""
    table = environment._lake.P
    where = Counter({environment._lake.s: 1.0})
    solved = 0.0
    for _ in range(turns):
        following: Counter = Counter()
        for state, mass in where.items():
            for action in range(4):
                for chance, next_state, reward, done in table[state][action]:
                    if not done:
                        following[next_state] += mass * chance / 4
                    solved += mass * chance / 4 * reward
        where = following
    return solved


@pytest.mark.slow
@pytest.mark.parametrize("slippery", [False, True])
def test_the_random_player_succeeds_as_often_as_computed(slippery):
    flags = config(episodes=800, size=5, is_slippery=slippery, max_turns=60, batch_size=500)
    levels = choose_levels(flags)
    chances = []
    for level in levels:
        environment = make_environment(flags)
        environment.reset(level.seed)
        chances.append(chance_of_random_success(environment, 60))
    rate = summarize_episodes(play(flags, partial(random_answers, seed=0), levels, ALONE), 0)["success_rate"]
    deviation = math.sqrt(sum(c * (1 - c) for c in chances)) / len(chances)
    assert abs(rate - np.mean(chances)) < 3.5 * deviation
    assert np.mean(chances) > 3.5 * deviation  # else zero would pass as well


def test_the_random_player_plays_the_same_whatever_the_batch_and_the_rank():
    flags = config(max_turns=30)
    levels = choose_levels(flags)
    whole = play(flags, partial(random_answers, seed=3), levels, ALONE)
    one_at_a_time, player = config(max_turns=30, batch_size=1), partial(random_answers, seed=3)
    parts = [o for rank in range(3) for o in play(one_at_a_time, player, levels, World(rank, 3, rank, 3))]
    assert sorted(whole, key=lambda o: o.episode) == sorted(parts, key=lambda o: o.episode)
    assert whole[0].messages != play(flags, partial(random_answers, seed=4), levels, ALONE)[0].messages


class Says:
    """A player that always says the same, or one thing after the other."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers

    def __call__(self, games):
        return [self.answers[len(game.conversation.answers) % len(self.answers)] for game in games]


def test_answers_out_of_form_are_counted_use_up_turns_and_move_nothing():
    outcomes = played(Says("Right", "<answer>Jump</answer>", "<answer>up</answer>"), max_turns=9)
    for outcome in outcomes:
        assert (outcome.turns, outcome.invalid_answers, outcome.moves, outcome.solved) == (9, 6, 3, False)
        users = [m["content"] for m in outcome.messages if m["role"] == "user"]
        assert users[1] == users[2] == f"That was no valid answer.\n{users[0]}"
        assert users[3] == users[0]  # up at the upper edge
    summary = summarize_episodes(outcomes, 2)
    assert summary["invalid_answer_rate"] == 6 / 9
    assert summary["moves_over_optimum"] is None
    assert [len(summary["transcripts"][kind]) for kind in ("solved", "failed")] == [0, 2]


def test_never_more_episodes_side_by_side_than_batch_size():
    together = []

    def random(games):
        together.append(len(games))
        return random_answers(games, seed=0)

    assert len(played(random, batch_size=3, episodes=10)) == 10
    assert max(together) == 3


def test_an_episode_ends_in_a_hole_on_the_goal_or_after_max_steps():
    outcomes = played(Says(*(f"<answer>{action}</answer>" for action in ("Right", "Down"))), episodes=40, max_steps=20)
    ends = Counter((o.solved, "X" in o.messages[-1]["content"], "√" in o.messages[-1]["content"]) for o in outcomes)
    assert set(ends) <= {(True, False, True), (False, True, False), (False, False, False)}
    assert len(ends) >= 2
    assert all(o.moves <= 20 for o in outcomes)


def test_levels_come_from_seeds_without_repeats_and_without_the_excluded(tmp_path):
    flags = config(episodes=30, size=3, p=0.7)
    levels = choose_levels(flags)
    assert len({level.level_id for level in levels}) == 30
    rows = [{"extra_info": {"seed": level.seed, "level": level.level_id}} for level in levels[:20] for _ in range(2)]
    file = str(write_parquet(tmp_path / "levels.parquet", rows))
    others = choose_levels(config(episodes=20, size=3, p=0.7, exclude_levels=[file]))
    assert not {level.level_id for level in others} & {level.level_id for level in levels[:20]}
    assert choose_levels(config(episodes=20, size=3, p=0.7, levels=file)) == levels[:20]
    with pytest.raises(UserError, match=r"has 20 levels to play, --episodes is 21; lower it$"):
        choose_levels(config(episodes=21, size=3, p=0.7, levels=file))
    with pytest.raises(UserError, match=r"^only \d+ different levels were found that are not excluded"):
        choose_levels(config(episodes=200, size=3, exclude_levels=[file]))


def test_a_file_of_other_levels_than_the_flags_make_is_refused(tmp_path):
    made = choose_levels(config(episodes=1, size=5))
    rows = [{"extra_info": {"seed": made[0].seed, "level": made[0].level_id}}]
    flags = config(episodes=1, size=6, levels=str(write_parquet(tmp_path / "levels.parquet", rows)))
    with pytest.raises(UserError, match=r"seed 0 gives another level than the file's; use the flags of dsft.generate"):
        play(flags, expert_answers, choose_levels(flags), ALONE)
    rows = [{"extra_info": {"index": 3}}]
    flags = config(episodes=1, levels=str(write_parquet(tmp_path / "medical.parquet", rows)))
    with pytest.raises(UserError, match=r"medical.parquet, row 0: extra_info has no level and seed"):
        choose_levels(flags)


@pytest.mark.parametrize("history_turns", [None, 0, 2])
def test_a_batch_of_episodes_and_the_same_one_by_one_give_the_same_moves(tiny_model, history_turns):
    """Random weights answer out of form, so an answer's text is compared, and its letters choose a move."""
    import torch

    flags = {"model": str(tiny_model), "dtype": "float32", "max_new_tokens": 6, "max_turns": 5, "episodes": 7}
    flags |= {"history_turns": history_turns, "size": 6}

    class Wandering(ModelPlayer):
        def __call__(self, games):
            answers = super().__call__(games)
            for game, answer in zip(games, answers, strict=True):
                self.texts[game.number, len(game.conversation.answers)] = answer
            return [f"{answer}<answer>{ACTIONS[len(answer) % 4]}</answer>" for answer in answers]

    told = []
    for batch_size in (7, 1, 3):
        chosen = config(**flags, batch_size=batch_size)
        player = Wandering(load_generator(chosen, torch.device("cpu")), chosen)
        player.texts = {}
        outcomes = play(chosen, player, choose_levels(chosen), ALONE)
        told.append((sorted(outcomes, key=lambda o: o.episode), player.texts))
    assert told[0] == told[1] == told[2]
    assert len(set(told[0][1].values())) > 5  # the prompts do make a difference


def test_prompts_are_the_tokens_that_training_sees(tiny_model, tokenizer, tmp_path):
    """A row that dsft.generate writes, and the prompt that dsft.validate makes at that position."""
    from dsft.config import GenerateConfig
    from dsft.config.flags import RowFlags
    from dsft.dataset.tokens import load_dataset
    from dsft.envs.expert_data import generate

    for style, history in (("messages", None), ("chatml", 1), ("plain", 0)):
        folder = tmp_path / style
        made = {"env": "frozenlake", "style": style, "history_turns": history}
        generate(GenerateConfig(**made, output_dir=str(folder), train_size=3, test_size=1, num_processes=1))
        rows = load_dataset([str(folder / "train.parquet")], "train_files", tokenizer, RowFlags())
        trained = [tokens[: list(mask).index(True)].tolist() for tokens, mask in (rows[i] for i in range(len(rows)))]
        seen = []

        class Recorder:
            def __init__(self) -> None:
                self.tokenizer = tokenizer

            def __call__(self, prompts, seen=seen):
                seen.extend(prompts)
                return [""] * len(prompts)

        flags = config(**made, model="m", levels=str(folder / "train.parquet"), episodes=3, batch_size=1)
        player, expert = ModelPlayer(Recorder(), flags), expert_answers

        def both(games, player=player, expert=expert):
            player(games)
            return expert(games)

        play(flags, both, choose_levels(flags), ALONE)
        assert seen == trained


def test_the_wilson_interval():
    assert wilson_interval(0, 0) == (0, 1)
    low, high = wilson_interval(8, 10)  # Wilson's interval by hand: 0.4902 to 0.9433
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0, 50)[0] == 0
    assert wilson_interval(50, 50)[1] == 1


def test_expert_episodes_say_what_the_player_would_see():
    flags = config(env="sokoban")
    episode = play_expert(make_environment(flags), 5)
    outcome = play(flags, expert_answers, [level for level in choose_levels(flags) if level.seed == 5], ALONE)[0]
    assert [m["content"] for m in outcome.messages if m["role"] == "user"][:-1] == episode.states
    assert json.loads(json.dumps(outcome.messages))[2]["content"] == f"<answer>{episode.actions[0]}</answer>"
