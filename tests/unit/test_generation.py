"""Answers of a model: how far its positions reach, and drawing."""

import pytest
import torch

from dsft.config import GenerateConfig, ValidateConfig
from dsft.envs.expert_data import generate
from dsft.errors import UserError
from dsft.validation.evaluate import validate
from dsft.validation.generation import load_generator
from tests.helpers import SAMPLE_VAL

POSITIONS = 2048  # of the tiny model


def generator(tiny_model, **values):
    config = ValidateConfig(model=str(tiny_model), env="frozenlake", dtype="float32", **values)
    return load_generator(config, torch.device("cpu"))


@pytest.mark.parametrize("max_new_tokens", [1, 8])
def test_prompt_and_answer_may_fill_the_models_positions_and_no_more(tiny_model, max_new_tokens):
    answer = generator(tiny_model, max_new_tokens=max_new_tokens)
    assert answer.model.config.max_position_embeddings == POSITIONS
    fits = POSITIONS - max_new_tokens
    assert len(answer([[5] * fits, [5] * 3])) == 2
    with pytest.raises(UserError) as caught:
        answer([[5] * 3, [5] * (fits + 1)])
    assert str(caught.value) == (
        f"a prompt has {fits + 1} tokens, which with --max_new_tokens {max_new_tokens} is more than the model's "
        "2048 positions; lower it, --history_turns, --max_turns or --max_length"
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["game", "dialogues"])
def test_a_temperature_draws_by_the_seed(tiny_model, tmp_path, what):
    values = {"model": str(tiny_model), "dtype": "float32", "episodes": 3, "max_new_tokens": 8}
    if what == "game":
        levels = {"env": "frozenlake", "levels": made_levels(tmp_path), "max_turns": 2}
    else:
        levels = {"data": str(SAMPLE_VAL), "max_length": 512, "truncation": "left"}

    def answers(**more) -> str:
        validate(ValidateConfig(**values, **levels, **more, output=str(tmp_path / "r.json")))
        return (tmp_path / "r.jsonl").read_text(encoding="utf-8")

    greedy, drawn = answers(), answers(temperature=1.0)
    assert answers(seed=1) == greedy
    assert answers(temperature=1.0) == drawn != greedy
    assert answers(temperature=1.0, seed=1) not in (drawn, greedy)
    assert answers(temperature=1e-4) == greedy


def made_levels(folder) -> str:
    generate(GenerateConfig(env="frozenlake", train_size=3, test_size=0, num_processes=1, output_dir=str(folder)))
    return str(folder / "train.parquet")
