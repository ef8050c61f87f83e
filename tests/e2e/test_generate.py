"""dsft.generate as typed: what the files say, replayed by other simulators; the same bytes again; stops; wrong use."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium
import psutil
import pyarrow.parquet as pq
import pytest

from dsft.config.flags import RowFlags
from dsft.dataset.tokens import load_dataset
from tests.helpers import ROOT, Done, flags, hear_interrupts, run

COMMAND = [sys.executable, "-m", "dsft.generate"]
GAMES = {
    "lake": {"env": "frozenlake", "size": 5, "train_size": 12, "test_size": 4},
    "slippery": {"env": "frozenlake", "is_slippery": True, "train_size": 12, "test_size": 4},
    "sokoban": {"env": "sokoban", "dim_x": 7, "num_boxes": 2, "train_size": 12, "test_size": 4},
}
COLUMNS = {
    "turns": ["data_source", "prompt", "response", "ability", "reward_model", "extra_info"],
    "episodes": ["data_source", "prompt", "messages", "ability", "reward_model", "extra_info"],
}
FILES = ["generate.json", "test.parquet", "train.parquet"]
BIG = {"train_size": 100000, "test_size": 20, "num_processes": 2}
SECONDS = 10


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that a command line makes; the same words run once."""
    folders: dict[str, Path] = {}

    def make(**values: Any) -> Path:
        words = {"num_processes": 1} | values
        key = json.dumps(words, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("made") / "out"
            done = run([*COMMAND, *flags(**words, output_dir=folders[key])])
            assert done.status == 0, done.err
            assert "Traceback" not in done.err
            assert names(folders[key]) == FILES
        return folders[key]

    return make


# What the rows say, by their text alone


def conversation(prompt: Any) -> list[tuple[str, str]]:
    """Role and content of the turns of a prompt in one of the two styles that keep roles."""
    if isinstance(prompt, str):
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", prompt, re.DOTALL)
        rebuilt = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        assert rebuilt + "<|im_start|>assistant\n" == prompt
        return turns
    return [(turn["role"], turn["content"]) for turn in prompt]


def action_of(response: str) -> str:
    [action] = re.fullmatch(r"<answer>(Up|Down|Left|Right)</answer>", response).groups()
    return action


def trajectories(folder: Path, split: str, position=lambda prompt: conversation(prompt)[-1][1]):
    """(rows, positions, actions) of each level of a file with a row a turn, in the file's order."""
    levels = defaultdict(list)
    for row in rows_of(folder, split):
        levels[row["extra_info"]["index"]].append(row)
    assert list(levels) == list(range(len(levels)))
    for rows in levels.values():
        assert [row["extra_info"]["turn"] for row in rows] == list(range(len(rows)))
        yield rows, [position(row["prompt"]) for row in rows], [action_of(row["response"]) for row in rows]


def first_positions(folder: Path, split: str) -> list[str]:
    return [positions[0] for _, positions, _ in trajectories(folder, split)]


DELTAS = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
LEAVE, BOX_LEAVES, ENTER, BOX_ENTERS = (
    {"P": "_", "S": "O"},
    {"X": "_", "√": "O"},
    {"_": "P", "O": "S"},
    {"_": "X", "O": "√"},
)


def sokoban(position: str, seed: int):
    """Yields the position, and after each action that is sent, the next one and whether it is solved."""
    board = {(r, c): s for r, row in enumerate(position.split("\n")) for c, s in enumerate(row.split(" "))}
    action = yield position, False
    while True:
        [(r, c)] = [cell for cell, symbol in board.items() if symbol in LEAVE]
        (dr, dc), here = DELTAS[action], (r, c)
        ahead, behind = (r + dr, c + dc), (r + 2 * dr, c + 2 * dc)
        if board[ahead] in BOX_LEAVES and board[behind] in BOX_ENTERS:
            board[ahead], board[behind] = BOX_LEAVES[board[ahead]], BOX_ENTERS[board[behind]]
        if board[ahead] in ENTER:
            board[here], board[ahead] = LEAVE[board[here]], ENTER[board[ahead]]
        width = max(c for _, c in board) + 1
        symbols = list(board.values())
        text = "\n".join(" ".join(symbols[i : i + width]) for i in range(0, len(symbols), width))
        action = yield text, "X" not in symbols


def frozen_lake(position: str, seed: int, is_slippery: bool = False):
    """The same by gymnasium."""
    number = {"Left": 0, "Down": 1, "Right": 2, "Up": 3}
    ground = position.replace("P", "_").split()
    desc = position.translate(str.maketrans("P_O", "SFH", " ")).split("\n")
    game = gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=is_slippery)
    game.reset(seed=seed)
    action = yield position, False
    while True:
        state, reward, *_ = game.step(number[action])
        tiles = list(ground)
        tiles[state] = {"_": "P", "O": "X", "G": "√"}[tiles[state]]
        rows = [tiles[i : i + len(desc)] for i in range(0, len(tiles), len(desc))]
        action = yield "\n".join(" ".join(row) for row in rows), reward == 1


def simulator(game: str, position: str, seed: int):
    if game == "sokoban":
        return sokoban(position, seed)
    return frozen_lake(position, seed, is_slippery=game == "slippery")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("game", GAMES)
def test_every_trajectory_replays_to_solved_in_another_simulator(made, game, split):
    folder = made(**GAMES[game])
    levels = 0
    for rows, positions, actions in trajectories(folder, split):
        levels += 1
        world = simulator(game, positions[0], rows[0]["extra_info"]["seed"])
        now, solved = next(world)
        history: list[tuple[str, str]] = []
        for turn, (row, position, action) in enumerate(zip(rows, positions, actions, strict=True)):
            assert not solved
            assert position == now
            [(role, rules), *turns] = conversation(row["prompt"])
            assert role == "system"
            assert all(f"<answer>{a}</answer>" in rules for a in DELTAS)
            assert turns == [*history, ("user", now)]
            assert row["reward_model"]["ground_truth"]["plan"] == actions[turn:]
            history += [("user", now), ("assistant", row["response"])]
            now, solved = world.send(action)
        assert solved
        optimum = {row["extra_info"]["optimal_length"] for row in rows}
        assert game == "slippery" or optimum == {len(actions)}
        assert max(optimum) <= len(actions)
    assert levels == GAMES[game][f"{split}_size"]


@pytest.mark.parametrize("game", GAMES)
def test_the_columns_and_the_report(made, game):
    folder = made(**GAMES[game])
    report = json.loads((folder / "generate.json").read_text())
    moves = 0
    for split in ("train", "test"):
        rows = rows_of(folder, split)
        assert pq.read_schema(folder / f"{split}.parquet").names == COLUMNS["turns"]
        for row in rows:
            assert row["data_source"] == GAMES[game]["env"]
            assert row["ability"] == "planning"
            assert row["reward_model"]["style"] == "rule"
            assert row["extra_info"]["split"] == split
            assert set(row["extra_info"]) == {"split", "index", "seed", "turn", "optimal_length", "level"}
        assert report["levels"][split] == GAMES[game][f"{split}_size"]
        assert report["rows"][split] == len(rows)
        moves += len(rows)
    assert report["moves"] == moves
    assert report["episodes_played"] >= report["episodes_solved"] >= 16 + report["repeated_levels"]
    assert {name: report["flags"][name] for name in GAMES[game]} == GAMES[game]


@pytest.mark.parametrize("game", GAMES)
def test_no_level_occurs_twice_and_none_in_both_files(made, game):
    folder = made(**GAMES[game])
    texts = [text for split in ("train", "test") for text in first_positions(folder, split)]
    assert len(set(texts)) == len(texts) == 16
    infos = [row["extra_info"] for split in ("train", "test") for row in rows_of(folder, split)]
    assert len({info["level"] for info in infos}) == len({info["seed"] for info in infos}) == 16


# The same words, the same bytes


@pytest.mark.parametrize("game", GAMES)
def test_the_files_do_not_depend_on_the_number_of_processes(made, game):
    one, two = made(**GAMES[game]), made(**GAMES[game], num_processes=2)
    assert one != two
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.slow
def test_another_seed_makes_other_levels(made):
    words = GAMES["lake"] | {"train_size": 4}
    one, other = made(**words), made(**words, seed=5)
    for name in FILES:
        assert (one / name).read_bytes() != (other / name).read_bytes(), name
    assert not set(first_positions(one, "train")) & set(first_positions(other, "train"))
    assert rows_of(other, "test")[0]["extra_info"]["seed"] == 5


@pytest.mark.parametrize("game", ["lake", "sokoban"])
def test_the_test_file_does_not_depend_on_train_size_and_train_goes_on_where_it_ended(made, game):
    whole, fewer = made(**GAMES[game]), made(**GAMES[game] | {"train_size": 4})
    assert (whole / "test.parquet").read_bytes() == (fewer / "test.parquet").read_bytes()
    assert first_positions(whole, "train")[:4] == first_positions(fewer, "train")
    assert len(first_positions(fewer, "train")) == 4


def test_without_test_levels_there_is_no_test_file(tmp_path):
    done = run([*COMMAND, *flags(env="frozenlake", train_size=3, test_size=0, output_dir=tmp_path / "out")])
    assert done.status == 0
    assert names(tmp_path / "out") == ["generate.json", "train.parquet"]
    assert re.search(r"^train +3 levels, 18 rows: ", done.out, re.MULTILINE)
    assert "test.parquet" not in done.out


# Rows, styles, history: what training reads


@pytest.fixture
def load(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))

    def load(file: Path, **options: Any) -> list[tuple[list[int], list[bool]]]:
        data = load_dataset([str(file)], "train_files", tokenizer, RowFlags(max_length=10**5, **options))
        return [(tokens.tolist(), mask.tolist()) for tokens, mask in (data[i] for i in range(len(data)))]

    return load


def targets(tokenizer, row) -> str:
    return tokenizer.decode([token for token, is_target in zip(*row, strict=True) if is_target])


@pytest.mark.slow
@pytest.mark.parametrize("game", ["lake", "sokoban"])
def test_training_reads_turns_and_episodes_alike(made, load, tokenizer, game):
    turns, episodes = made(**GAMES[game]), made(**GAMES[game], rows="episodes")
    by_turn, by_episode = load(turns / "train.parquet"), load(episodes / "train.parquet", messages_key="messages")
    rows, whole = rows_of(turns, "train"), rows_of(episodes, "train")
    assert list(whole[0]) == COLUMNS["episodes"]
    assert len(whole) == len(by_episode) == 12
    for row, tokens in zip(rows, by_turn, strict=True):
        assert targets(tokenizer, tokens) == row["response"] + "<|im_end|>"
    lasts = [tokens for row, tokens in zip(rows, by_turn, strict=True) if len(plan(row)) == 1]
    for row, tokens, last in zip(whole, by_episode, lasts, strict=True):
        assert tokens[0] == last[0]  # the last turn's prompt and answer are the conversation
        assert targets(tokenizer, tokens) == "".join(f"<answer>{action}</answer><|im_end|>" for action in plan(row))
        [*asked, (role, answer)] = conversation(row["messages"])
        assert (role, action_of(answer)) == ("assistant", plan(row)[-1])
        assert conversation(row["prompt"]) == asked[:2]


def plan(row: dict[str, Any]) -> list[str]:
    return row["reward_model"]["ground_truth"]["plan"]


@pytest.mark.slow
@pytest.mark.parametrize("game", ["lake", "sokoban"])
def test_chatml_and_messages_train_the_same_tokens(made, load, game):
    messages, chatml = made(**GAMES[game]), made(**GAMES[game], style="chatml")
    assert load(chatml / "train.parquet") == load(messages / "train.parquet")
    pairs = zip(rows_of(messages, "test"), rows_of(chatml, "test"), strict=True)
    for one, other in pairs:
        assert conversation(one["prompt"]) == conversation(other["prompt"])
        assert {k: v for k, v in one.items() if k != "prompt"} == {k: v for k, v in other.items() if k != "prompt"}


def test_plain_is_the_same_without_roles_and_training_reads_it(made, load, tokenizer):
    messages, plain = made(**GAMES["lake"]), made(**GAMES["lake"], style="plain")
    rows = rows_of(plain, "train")
    expected = ["\n\n".join(text for _, text in conversation(row["prompt"])) for row in rows_of(messages, "train")]
    assert [row["prompt"] for row in rows] == expected
    for row, tokens in zip(rows, load(plain / "train.parquet"), strict=True):
        assert f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n" in tokenizer.decode(tokens[0])
        assert targets(tokenizer, tokens) == row["response"] + "<|im_end|>"


@pytest.mark.parametrize("history_turns", [0, 2])
def test_history_turns_keeps_the_last_moves_alone(made, history_turns):
    whole, cut = made(**GAMES["lake"]), made(**GAMES["lake"], history_turns=history_turns)
    for one, other in zip(rows_of(whole, "train"), rows_of(cut, "train"), strict=True):
        [system, *turns] = conversation(one["prompt"])
        assert conversation(other["prompt"]) == [system, *turns[-2 * history_turns - 1 :]]
        assert one["response"] == other["response"]


# Ends before its time


def big_run(folder: Path, game: str) -> psutil.Popen:
    """A command that would take minutes, in the midst of writing train.parquet with two processes searching."""
    own = {"env": "frozenlake", "size": 8} if game == "lake" else {"env": "sokoban"}
    process = psutil.Popen(
        [*COMMAND, *flags(**own, **BIG, output_dir=folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    unfinished = folder / ".train.parquet.tmp"
    started = time.monotonic()
    while not (unfinished.is_file() and unfinished.stat().st_size > 1000):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 30
        time.sleep(0.02)
    return process


def ended(process: psutil.Popen, children: list[psutil.Process]) -> Done:
    """What the run said, after it and its children have ended."""
    sent = time.monotonic()
    try:
        out, err = process.communicate(timeout=SECONDS)
        _, alive = psutil.wait_procs(children, timeout=5)
        alive = [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        assert not alive
    finally:
        for left in [process, *children]:
            if left.is_running():
                left.kill()
    return Done(process.returncode, out, err, time.monotonic() - sent)


@pytest.mark.parametrize("game", ["lake", "sokoban"])
def test_control_c_leaves_nothing(tmp_path, game):
    process = big_run(tmp_path, game)
    children = process.children(recursive=True)
    assert len(children) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    done = ended(process, children)
    assert done.status == 130
    assert done.err.strip().splitlines()[-1] == "stopped"
    assert "Traceback" not in done.err
    assert names(tmp_path) == []


@pytest.mark.slow
def test_control_c_at_any_moment_ends_it_and_leaves_nothing(tmp_path):
    """Often, in one process: at random instants from the start of the searching processes on."""
    code = (
        "import multiprocessing, os, random, signal, sys\n"
        "from dsft.config import GenerateConfig\n"
        "from dsft.envs import frozen_lake\n"
        "from dsft.envs.expert_data import generate\n"
        "signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))\n"
        "big = dict(env='frozenlake', train_size=100000, test_size=20, num_processes=2)\n"
        "for number in range(50):\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.1))\n"
        "        generate(GenerateConfig(**big, output_dir=sys.argv[1]))\n"
        "    except KeyboardInterrupt:\n"
        "        assert multiprocessing.active_children() == []\n"
        "        assert os.listdir(sys.argv[1]) == [], number\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts,
    ) as process:  # fmt: skip
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_an_interrupt_of_the_parent_alone_does_the_same(tmp_path):
    process = big_run(tmp_path, "lake")
    children = process.children(recursive=True)
    process.send_signal(signal.SIGINT)
    done = ended(process, children)
    assert (done.status, done.err.strip().splitlines()[-1]) == (130, "stopped")
    assert names(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_finished_file_and_no_process_and_can_be_started_again(tmp_path, number):
    process = big_run(tmp_path, "lake")
    children = process.children(recursive=True)
    process.send_signal(number)
    assert ended(process, children).status != 0
    assert not [name for name in names(tmp_path) if name in FILES]
    done = run([*COMMAND, *flags(env="frozenlake", train_size=3, test_size=2, output_dir=tmp_path)])
    assert done.status == 0, done.err
    assert names(tmp_path) == FILES


def test_what_a_searching_process_refuses_is_told_as_in_one_process(tmp_path):
    """Here the ninth seed makes no lake; it is told where the seeds in order come to it."""
    words = {"env": "frozenlake", "size": 6, "p": 0.3, "train_size": 20, "test_size": 0}
    told = [run([*COMMAND, *flags(**words, num_processes=n, output_dir=tmp_path)]) for n in (1, 2)]
    assert [done.status for done in told] == [1, 1]
    assert told[0].errors == told[1].errors != []
    assert "(seed 100008): none can be crossed" in told[0].errors[0]
    assert names(tmp_path) == []


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_searching_process_ends_the_run_with_one_line(tmp_path, which):
    process = big_run(tmp_path, "lake")
    children = process.children(recursive=True)
    children[which].kill()
    done = ended(process, children)
    assert done.status == 1
    assert done.errors == ["error: a search process was killed, possibly for lack of memory; lower --num_processes"]
    assert "Traceback" not in done.err
    assert names(tmp_path) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_levels(tmp_path):
    code = (
        "import resource, sys\n"
        "from dsft.config import GenerateConfig\n"
        "from dsft.envs.expert_data import generate\n"
        "generate(GenerateConfig(env='frozenlake', size=8, train_size=int(sys.argv[1]), test_size=0,\n"
        "                        num_processes=1, output_dir=sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    peaks = [float(run([sys.executable, "-c", code, n, tmp_path / str(n)]).out) for n in (1000, 2500)]
    assert peaks[1] - peaks[0] < 20  # MiB; the rows of 1500 levels would take 160


# Wrong use


def refused(done: Done, *parts: str, lines: int = 1) -> None:
    """One clear line for the user, and nothing else, in seconds."""
    assert done.status == 1, done.out
    assert done.err.splitlines() == done.errors
    assert len(done.errors) == lines, done.err
    for part in parts:
        assert part in done.err
    assert done.seconds < SECONDS


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["--env is required: sokoban or frozenlake"]),
        ("--env chess", ["env: expected one of sokoban, frozenlake, got 'chess'"]),
        ("--env sokobann", ["env: expected one of sokoban, frozenlake, got 'sokobann'"]),
        ("--env sokoban --dimx 7", ["unknown flag --dimx (did you mean 'dim_x'?)"]),
        ("--env sokoban --dim_x 4", ["--dim_x must be 5 or more, got 4"]),
        ("--env sokoban --num_boxes 9", ["--num_boxes must be 1 to 4, got 9"]),
        ("--env sokoban --size 5", ["--size belongs to --env frozenlake, got --env sokoban"]),
        ("--env frozenlake --num_boxes 2", ["--num_boxes belongs to --env sokoban, got --env frozenlake"]),
        ("--env frozenlake --size 1", ["--size must be from 2 to 100, got 1"]),
        ("--env frozenlake --size four", ["size: expected int, got 'four'"]),
        ("--env frozenlake --p 0", ["--p must be above 0 and at most 1, got 0"]),
        ("--env frozenlake --p 2", ["--p must be above 0 and at most 1, got 2"]),
        ("--env frozenlake --p 0.01 --size 8", ["none can be crossed", "raise --p, or lower --size"]),
        ("--env frozenlake --size 8 --max_depth 13", ["--max_depth and --max_steps must be 14 or more", "got 13 and"]),
        ("--env frozenlake --max_depth 0", ["max_depth must be 1 or more, got 0"]),
        ("--env frozenlake --train_size 0", ["train_size must be 1 or more, got 0"]),
        ("--env frozenlake --train_size -5", ["train_size must be 1 or more, got -5"]),
        ("--env frozenlake --test_size -1", ["test_size must be 0 or more, got -1"]),
        ("--env frozenlake --seed -1", ["seed must be 0 or more, got -1"]),
        ("--env frozenlake --num_processes 0", ["num_processes must be 1 or more, got 0"]),
        ("--env frozenlake --history_turns -1", ["history_turns must be 0 or more, got -1"]),
        ("--env frozenlake --style html", ["style: expected one of messages, chatml, plain, got 'html'"]),
        ("--env frozenlake --rows episodes --style plain", ["--rows episodes needs --style messages, got plain"]),
        ("--env frozenlake --rows episodes --history_turns 1", ["--rows episodes keeps the whole history"]),
        (
            "--env frozenlake --size 2 --train_size 50",
            ["only 3 different levels were solved in 2", "150 are wanted", "lower --train_size or --test_size"],
        ),
    ],
)
def test_wrong_flags(tmp_path, words, parts):
    refused(run([*COMMAND, *words.split(), "--output_dir", tmp_path]), *parts)
    assert names(tmp_path) == []


def test_several_wrong_flags_are_told_at_once(tmp_path):
    words = flags(env="frozenlake", train_size=0, history_turns=-1, output_dir=tmp_path / "out")
    refused(run([*COMMAND, *words]), "train_size must be", "history_turns must be", lines=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FILES)
def test_what_exists_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    refused(
        run([*COMMAND, *flags(env="frozenlake", train_size=2, output_dir=tmp_path)]),
        f"{tmp_path / name} exists; delete it, or choose another --output_dir",
    )
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run([*COMMAND, *flags(env="frozenlake", train_size=2, test_size=1, output_dir=tmp_path)]).status == 0
    assert names(tmp_path) == sorted([*FILES, "notes.txt"])


def test_a_folder_that_cannot_be_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    words = [*COMMAND, *flags(env="frozenlake", train_size=2)]
    refused(run(words), "--output_dir is required: ")
    refused(run([*words, "--output_dir", file]), f"output_dir {file} is a file; name a folder")
    refused(run([*words, "--output_dir", file / "below"]), f"cannot write {file / 'below'}", "choose another folder")
    assert names(tmp_path) == ["file"]
    assert file.read_text() == "mine"


def test_a_file_that_cannot_be_written_to_its_end(tmp_path):
    command = " ".join([*COMMAND, *flags(env="frozenlake", size=8, train_size=400, output_dir=tmp_path / "out")])
    refused(run(["bash", "-c", f"ulimit -f 10; exec {command}"]), f"cannot write {tmp_path / 'out'}", "File too large")
    assert names(tmp_path / "out") == []


# Start


def test_help_is_fast_and_imports_nothing_large():
    done = [run([sys.executable, "-X", "importtime", *COMMAND[1:], "--help"]) for _ in range(3)]
    assert min(d.seconds for d in done) < 0.5
    assert done[0].status == 0
    for flag in ("env", "train_size", "history_turns", "output_dir", "is_slippery", "num_boxes"):
        assert f"--{flag}  (" in done[0].out
    assert not imported(done[0]) & {"torch", "transformers", "numpy", "pyarrow", "gymnasium"}


def test_generating_does_not_import_torch(tmp_path):
    words = flags(env="sokoban", train_size=2, test_size=1, num_processes=2, output_dir=tmp_path)
    done = run([sys.executable, "-X", "importtime", *COMMAND[1:], *words])
    assert done.status == 0
    assert names(tmp_path) == FILES
    assert "pyarrow" in imported(done)
    assert not imported(done) & {"torch", "transformers"}


def imported(done: Done) -> set[str]:
    """The packages that a process started with -X importtime has imported."""
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.err.splitlines() if "|" in line}
