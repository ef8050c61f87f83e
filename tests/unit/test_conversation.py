"""A game as a conversation: which answers count, what a prompt holds, and that all styles say the same."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.readers import Cell
from dsft.envs.base import ACTIONS
from dsft.envs.conversation import Conversation, format_answer, instruction, parse_answer
from dsft.envs.frozen_lake import FrozenLake
from dsft.envs.sokoban import Sokoban

PROPERTY = settings(deadline=None, database=None, max_examples=100)
CELL = Cell("rows.parquet", 0)
GAMES = [
    FrozenLake(4, 0.8, False, max_steps=100, max_depth=100),
    FrozenLake(5, 0.8, True, max_steps=100, max_depth=100),
    Sokoban(dim_x=6, dim_y=6, num_boxes=1, search_depth=100, max_steps=100, max_depth=100),
]
actions = st.sampled_from(ACTIONS)
space = st.text(" \n\t\r", max_size=3)
untagged = st.text(st.characters(exclude_characters="<", codec="utf-8"), max_size=30)
history = st.one_of(st.none(), st.integers(0, 12))


# Answers


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<answer>Up</answer>", "Up"),
        ("<ANSWER>down</Answer>", "Down"),
        ("<answer>\n LEFT\t</answer>", "Left"),
        ("<think>Left is a hole, so I go\nright.</think>\n<answer>Right</answer>", "Right"),
        ("<think>not <answer></think><answer>Up</answer>", None),
        ("I go up. <answer>Up</answer> That is best.", "Up"),
        ("", None),
        ("Up", None),
        ("<answer></answer>", None),
        ("<answer>Up", None),
        ("Up</answer>", None),
        ("</answer>Up<answer>", None),
        ("<answer>Jump</answer>", None),
        ("<answer>Up.</answer>", None),
        ("<answer>Up Up</answer>", None),
        ("<answer>Up, Down</answer>", None),
        ("<answer>U p</answer>", None),
        ("<answer>Up</answer><answer>Up</answer>", None),
        ("<answer>Up</answer> or <answer>Down</answer>", None),
        ("<answer>Up</answer><answer>Jump</answer>", None),
        ("<answer><answer>Up</answer></answer>", None),
        ("<answers>Up</answers>", None),
    ],
)
def test_an_answer_is_exactly_one_action_in_exactly_one_answer(text, action):
    assert parse_answer(text) == action


def mixed_case(text):
    return st.tuples(*(st.sampled_from([c.lower(), c.upper()]) for c in text)).map("".join)


@PROPERTY
@given(st.data(), actions, untagged, untagged, space, space)
def test_case_white_space_and_the_words_around_do_not_matter(data, action, before, after, left, right):
    written, start, end = (data.draw(mixed_case(text)) for text in (action, "<answer>", "</answer>"))
    assert parse_answer(f"{before}{start}{left}{written}{right}{end}{after}") == action


@PROPERTY
@given(untagged)
def test_nothing_but_an_action_is_one(text):
    expected = text.strip().lower().capitalize()
    assert parse_answer(f"<answer>{text}</answer>") == (expected if expected in ACTIONS else None)
    assert parse_answer(text) is None


@PROPERTY
@given(st.lists(st.sampled_from(["<answer>", "</answer>", "Up", "left", " ", "\n", "<think>", "Jump"]), max_size=9))
def test_no_text_has_an_action_without_its_one_answer(pieces):
    text = "".join(pieces)
    found = re.findall(r"<answer>\s*(Up|left)\s*</answer>", text)
    if parse_answer(text) is not None:
        assert [parse_answer(text)] == [word.capitalize() for word in found]
    elif len(found) == 1:  # then a second start or end stands beside it
        assert pieces.count("<answer>") + pieces.count("</answer>") > 2


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_written_is_read_back(action):
    assert parse_answer(format_answer(action)) == action


# Conversations


@pytest.mark.parametrize("game", GAMES, ids=["lake", "slippery", "sokoban"])
def test_the_instruction_holds_the_rules_and_every_answer_as_it_is_read(game):
    text = instruction(game)
    assert text.startswith(game.rules + "\n")
    last = text.splitlines()[-1]
    assert re.findall("<answer>.*?</answer>", last) == [format_answer(action) for action in ACTIONS]


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("history_turns", "turns"),
    [
        (None, [user("s0"), assistant("a0"), user("s1"), assistant("a1"), user("s2")]),
        (0, [user("s2")]),
        (1, [user("s1"), assistant("a1"), user("s2")]),
        (2, [user("s0"), assistant("a0"), user("s1"), assistant("a1"), user("s2")]),
        (9, [user("s0"), assistant("a0"), user("s1"), assistant("a1"), user("s2")]),
    ],
)
def test_history_turns_keeps_the_last_answers_and_always_the_instruction(history_turns, turns):
    conversation = Conversation("rules", ["s0", "s1", "s2"], ["a0", "a1"])
    assert conversation.messages(history_turns) == [system("rules"), *turns]
    assert conversation.prompt("messages", history_turns) == [system("rules"), *turns]


@pytest.mark.parametrize("history_turns", [None, 0, 1])
def test_before_the_first_answer_there_is_no_history(history_turns):
    assert Conversation("rules", ["s0"]).messages(history_turns) == [system("rules"), user("s0")]


def test_a_whole_conversation_ends_with_its_last_answer():
    whole = Conversation("rules", ["s0", "s1"], ["a0", "a1"]).messages()
    assert whole == [system("rules"), user("s0"), assistant("a0"), user("s1"), assistant("a1")]


def test_the_strings_of_the_two_other_styles():
    conversation = Conversation("rules", ["s0", "s1"], ["a0"])
    assert conversation.prompt("plain") == "rules\n\ns0\n\na0\n\ns1"
    assert conversation.prompt("plain", 0) == "rules\n\ns1"
    assert conversation.prompt("chatml") == (
        "<|im_start|>system\nrules<|im_end|>\n"
        "<|im_start|>user\ns0<|im_end|>\n"
        "<|im_start|>assistant\na0<|im_end|>\n"
        "<|im_start|>user\ns1<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert conversation.prompt("chatml", 0) == (
        "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\ns1<|im_end|>\n<|im_start|>assistant\n"
    )


@st.composite
def played(draw):
    """A conversation of real positions, with the player to move."""
    game = draw(st.sampled_from(GAMES))
    conversation = Conversation(instruction(game), [game.reset(draw(st.integers(0, 10**6)))])
    for action in draw(st.lists(actions, max_size=10)):
        if game.over:
            break
        conversation.answers.append(format_answer(action))
        game.step(action)
        conversation.states.append(game.observation())
    return conversation


@st.composite
def of_any_text(draw):
    words = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: "<|" not in text)
    answers = draw(st.lists(words, max_size=4))
    states = draw(st.lists(words, min_size=len(answers) + 1, max_size=len(answers) + 1))
    return Conversation(draw(words), states, answers)


@PROPERTY
@given(st.one_of(played(), of_any_text()), history, actions)
def test_chatml_and_messages_are_the_same_tokens_to_train_on(tokenizer, conversation, history_turns, action):
    chat_format = ChatFormat(tokenizer)
    rows = [
        chat_format.prompt_and_response(conversation.prompt(style, history_turns), format_answer(action), CELL)
        for style in ("messages", "chatml")
    ]
    [messages, chatml] = [(row.tokens.tolist(), row.is_target.tolist()) for [row] in chat_format.tokenize(rows)]
    assert chatml == messages


@PROPERTY
@given(played(), history)
def test_a_prompt_ends_in_the_present_position_and_its_history_in_order(conversation, history_turns):
    messages = conversation.prompt("messages", history_turns)
    kept = len(conversation.answers) if history_turns is None else min(history_turns, len(conversation.answers))
    assert len(messages) == 2 * kept + 2
    assert messages[0] == system(conversation.system)
    assert messages[-1] == user(conversation.states[-1])
    assert [m["content"] for m in messages if m["role"] == "user"] == conversation.states[-kept - 1 :]
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert said == conversation.answers[len(conversation.answers) - kept :]
    assert conversation.prompt("plain", history_turns) == "\n\n".join(m["content"] for m in messages)


@PROPERTY
@given(played())
def test_making_a_prompt_changes_nothing(conversation):
    states, answers = list(conversation.states), list(conversation.answers)
    whole = conversation.messages()
    conversation.messages(1).append(user("more"))
    conversation.prompt("messages", 0)[0]["content"] = "other"
    assert (conversation.states, conversation.answers, conversation.messages()) == (states, answers, whole)
