"""Every command of README.md and docs/ is run, in a small form; those that cannot be run here are named, and why.

A command of dsft or of a script keeps its flags; model, files, folders and sizes become small ones. What stands before
it (torchrun, deepspeed) is read by the launcher's own parser. A command that nobody has a place for fails the test:
give it a small form in SMALL, the test that runs it in RUN_BY, or a reason in NOT_RUN.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from dsft import cli
from dsft.config import PipelineConfig, TrainConfig
from tests.helpers import BIN, ROOT, SAMPLE_TRAIN, SAMPLE_VAL, Done, run
from tests.hub import TOKEN, Hub

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = r"(python|torchrun|deepspeed|bash|dsft-\w+|git|pip|source|cd|sbatch|export|pytest|/usr/bin/time)\b"

# What replaces a command's own values; a function gets the value that stands there. None leaves the flag out.
# Names in braces: {model} a tiny model, {run} a LoRA run of it with rank 4, {other} another run, {out} a new folder.
# Under "" stand the words of no flag, with blanks between them.
TRAIN = {
    "model": "{model}",
    "train_files": lambda given: given if given == "data/sample_agents.jsonl" else str(SAMPLE_TRAIN),
    "val_files": lambda given: given and str(SAMPLE_VAL),
    "output_dir": "{out}",
    "init_from": lambda given: given and "{run}",
    "resume": None,
    "lora_rank": lambda given: "0" if given == "0" else "4",
    "lora_alpha": lambda given: given and "32",
    "train_batch_size": "4",
    "max_train_rows": "12",
    "max_val_rows": "2",
    "max_tokens_per_micro_batch": None,
    "total_epochs": None,
    "total_training_steps": "1",
    "dtype": lambda given: "float32" if given in (None, "D") else given,
}
VALIDATE = {
    "model": lambda given: given if given in ("expert", "random") else "{model}",
    "adapter": lambda given: given and "{run}",
    "data": lambda given: given and str(SAMPLE_VAL),
    "episodes": "1",
    "max_turns": "1",
    "max_new_tokens": "2",
    "output": "{out}/report.json",
}
PIPELINE = {
    "model": "{model}",
    "backend": "fsdp",
    "nproc": "1",
    "output_dir": "{out}",
    "generate.train_size": "4",
    "generate.test_size": "2",
    "train.total_training_steps": "1",
    "train.lora_rank": "4",
    "train.lr": "5e-4",
    "validate.episodes": "2",
    "validate.max_turns": "1",
    "validate.max_new_tokens": "2",
}
SMALL: dict[str, dict[str, Any]] = {
    "dsft.train": TRAIN,
    "dsft.preview": {name: TRAIN[name] for name in ("model", "train_files", "val_files")} | {"json": "{out}.json"},
    "dsft.report": {
        "": lambda given: re.sub(r"out/(?!zero3)\w+", "{run}", given).replace("out/zero3", "{other}"),
        "output": "{out}.html",
    },
    "dsft.pipeline": PIPELINE,
    "dsft.merge": {"checkpoint": "{run}", "output": "{out}/merged"},
    "dsft.checkpoint": {"": lambda given: re.sub(r"^out/\w+", "{run}", given).replace("000100", "000001")},
    "dsft.generate": {"output_dir": "{out}", "train_size": "3", "test_size": "2", "num_processes": "1"},
    "dsft.validate": VALIDATE,
}
SMALL |= {
    "scripts/bench_checkpoint.py": {
        "model": "{model}", "rows": "4", "steps": "4", "backends": "fsdp", "saves": "waiting",
    },
    "scripts/bench_generate.py": {"cases": "frozenlake 4x4$", "levels": "3,2", "repeats": "1"},
    "scripts/bench_gpu.py": {
        "cases": "turns", "arms": "dsft:fsdp:batch", "dialogues": "1", "turns": "2", "length": "120", "epochs": "1",
        "json": "{out}.json", "work_dir": "{out}",
    },
    "scripts/bench_kernels.py": {"tokens": "30"},
    "scripts/bench_memory.py": {"model": "{model}", "lengths": "100", "rows": "1"},
    "scripts/bench_prediction.py": {"model": "{model}", "cases": "fsdp:1:lora:float32:100", "json": "{out}.json"},
    "scripts/bench_preparation.py": {
        "train_files": str(SAMPLE_TRAIN), "max_rows": "9", "trees": ".", "json": "{out}.json",
    },
    "scripts/bench_throughput.py": {
        "model": "{model}", "train_files": str(SAMPLE_TRAIN), "rows": "4", "epochs": "1", "ranks": "1",
        "arms": "dsft:fsdp:batch", "dsft_tokens": None, "trl_micro_batch": "1", "json": "{out}.json",
        "work_dir": "{out}", "conversations": lambda given: given and "1",
    },
    "scripts/profile_step.py": TRAIN,
    "scripts/run_pipeline.sh": PIPELINE,
}  # fmt: skip
NOT_WITH = {"max_turns": "data", "max_val_rows": "val_fraction"}  # flags of a small form that another flag excludes

# Commands, by how they begin, that a test runs in its own way: the test or fixture, and what its code must name.
HERE = "tests/e2e/test_docs_commands.py"
RUN_BY = {
    "git clone ADDRESS dsft": (f"{HERE}::newcomer", "path_of_a_newcomer"),
    "cd dsft": (f"{HERE}::newcomer", "path_of_a_newcomer"),
    "bash scripts/quickstart.sh": (f"{HERE}::newcomer", "path_of_a_newcomer"),
    "source .venv/bin/activate": (f"{HERE}::newcomer", "source .venv/bin/activate"),
    "python -m dsft.pipeline": (f"{HERE}::test_a_script_runs_in_the_clone", "dsft.pipeline"),
    "cd out/": (f"{HERE}::test_checksums_are_checked_without_dsft", "sha256sum"),
    "sha256sum -c COMPLETE": (f"{HERE}::test_checksums_are_checked_without_dsft", "sha256sum"),
    "python scripts/make_docs.py": (f"{HERE}::test_generated_pages_are_up_to_date", "make_docs.py"),
    "bash scripts/finetune_lora_med.sh": (
        "tests/e2e/test_command_lines.py::test_medical_script_trains_merges_and_keeps_the_exit_status",
        "scripts/finetune_lora_med.sh",
    ),
    "python scripts/compare_backends.py": (
        "tests/distributed/test_backends_agree.py::test_compare_script_finds_the_arms_equal",
        "scripts/compare_backends.py",
    ),
    "python scripts/fault_drills.py": (
        "tests/distributed/test_fault_drills.py::test_some_drills",
        "scripts/fault_drills.py",
    ),
    "sbatch": (
        "tests/cluster/test_slurm.py::test_a_job_is_requeued_before_its_limit_and_ends_at_once_when_complete",
        "slurm_train.sbatch",
    ),
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": (
        "tests/cluster/test_hosts.py::test_a_host_that_dies_and_returns_by_elastic_torchrun",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    ),
    "python -m pytest -s tests/distributed/test_folding.py -k medical": (
        "tests/distributed/test_folding.py::test_the_medical_set_folds",
        "def test_the_medical_set_folds",
    ),
}
# Commands that are not run, by how they begin, and why.
NOT_RUN = {
    "bash scripts/test.sh": "would run all tests, this one too; its --help is run",
    "python scripts/bench_nodes.py": "starts two hosts, which needs root; tests/cluster does the same",
    "python scripts/bench_loading.py": "makes models of 0.1 B parameters and more",
}


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def code_blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the fenced blocks in bash, of indented ones that begin with a program, and of what stands within
    a sentence: there, a name without any flag is no command.
    """
    for found in re.finditer(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start()].count("\n") + 2, found[1]
    for found in re.finditer(r"(?<=\n\n)(?:    \S.*\n(?:     .*\n)*)+", text):
        if re.match(PROGRAMS, found[0].strip()):
            yield text[: found.start()].count("\n") + 1, found[0]
    for found in re.finditer(r"`((?:python -m dsft\.|python scripts/|bash scripts/)[^`\s]+ [^`\n]+)`", text):
        yield text[: found.start()].count("\n") + 1, found[1]


def split(text: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line of shell: without comments, what stands between && and |."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, "&&"]:
        if word in ("&&", "|", ";"):
            if words:
                yield tuple(words)
            words = []
        elif word != "…":
            words.append(word)


def shell_lines(block: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what a shell reads as one line, without comments."""
    line = 0
    for logical in re.sub(r"\\\n", "\0", block).splitlines():
        text = logical.replace("\0", " ").strip()
        if not text.startswith("#"):
            yield line, text
        line += 1 + logical.count("\0")


def commands_of(pages: list[Path]) -> list[Command]:
    """All of them, each once."""
    found: dict[tuple[str, ...], str] = {}
    for page in pages:
        for first, block in code_blocks(page.read_text(encoding="utf-8")):
            for line, text in shell_lines(block):
                for words in split(text):
                    found.setdefault(words, f"{page.name}:{first + line}")
    return [Command(place, words) for words, place in found.items()]


COMMANDS = commands_of(PAGES)


def parts(words: tuple[str, ...]) -> tuple[tuple[str, ...], str, tuple[str, ...]] | None:
    """(launcher and its options, module or script, flags) of a command of dsft, or of a script with a small form."""
    words = words[2:] if words[:2] == ("/usr/bin/time", "-v") else words
    for index, word in enumerate(words):
        if word == "dsft/train.py":
            return words[:index], "dsft.train", words[index + 1 :]
        if word == "-m" and words[index + 1].startswith("dsft."):
            return words[:index], words[index + 1], words[index + 2 :]
        if word.startswith("scripts/") and word in SMALL:
            return words[:index], word, words[index + 1 :]
    if words[0].startswith("dsft-"):
        return ("python",), words[0].replace("-", ".", 1), words[1:]
    return None


def flag_values(words: tuple[str, ...]) -> dict[str, str | None]:
    """Flag -> value, None for a switch; a word of no flag stands under ""."""
    values: dict[str, str | None] = {}
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else "--"
        if word.startswith("--"):
            values[word[2:]] = None if following.startswith("--") else following
        elif index == 0 or not words[index - 1].startswith("--"):
            values[""] = f"{values.get('') or ''} {word}".strip()
    return values


def small_form(module: str, flags: tuple[str, ...]) -> list[str]:
    """The words of a command with the small values of its table, names in braces still to be filled in."""
    given = flag_values(flags)
    changed: dict[str, str | None] = {}
    for name, value in SMALL[module].items():
        new = value(given.get(name)) if callable(value) else value
        if NOT_WITH.get(name) in given:
            new = None
        if new is not None or name in given:
            changed[name] = new
    kept = {name: value for name, value in given.items() if name not in changed}
    words = str(changed.get("", given.get("", ""))).split()
    kept |= {name: value for name, value in changed.items() if value is not None}
    for name, value in sorted(kept.items(), key=lambda item: item[0]):  # like forms of two commands are one test
        if name:
            words += [f"--{name}", *([] if value is None else [value])]
    return words


def read_launcher(words: tuple[str, ...], script: str) -> None:
    """The launcher's own parser takes its options; it exits where it does not. A shell's variables are numbers."""
    words = tuple("0" if word.startswith("$") else word for word in words)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*words[1:], script])
    elif words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parse_args([*words[1:], script])
    else:
        assert words in (("python",), (".venv/bin/python",), ("bash",), ()), words


def begins(command: Command, table: Iterable[str]) -> bool:
    return any(str(command).startswith(start) for start in table)


def small_commands() -> dict[str, tuple[str, list[str]]]:
    """What is run: its name -> (module or script, words); several commands of the pages may have one small form."""
    forms: dict[tuple[str, ...], str] = {}
    for command in COMMANDS:
        found = parts(command.words)
        if found and not begins(command, RUN_BY):
            words = small_form(found[1], found[2])
            forms.setdefault((found[1], *words), command.place)
    return {f"{place} {form[0]}": (form[0], list(form[1:])) for form, place in forms.items()}


RUN = small_commands()


def test_the_pages_have_commands_and_all_have_a_place():
    assert len(COMMANDS) > 30
    homeless = [f"{c.place}: {c}" for c in COMMANDS if not (parts(c.words) or begins(c, [*RUN_BY, *NOT_RUN]))]
    assert not homeless, "give them a small form in SMALL, a test in RUN_BY, or a reason in NOT_RUN:\n" + "\n".join(
        homeless
    )


def test_every_reason_not_to_run_a_command_is_still_needed():
    assert not [start for start in (*RUN_BY, *NOT_RUN) if not any(begins(command, [start]) for command in COMMANDS)]


@pytest.mark.parametrize("start", RUN_BY)
def test_the_test_that_runs_a_command_exists(start):
    place, names = RUN_BY[start]
    file, function = place.split("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    [found] = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert names in (ast.get_source_segment(source, found) or "")


def of_run(name: str) -> Any:
    """Slow unless it stands in the README and starts no script."""
    is_fast = name.startswith("README") and not RUN[name][0].startswith("scripts/")
    return name if is_fast else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", map(of_run, [name for name in RUN if not name.endswith(".sh")]))
def test_a_command_runs(name, commands, tiny_model, trained_runs, tmp_path):
    module, words = RUN[name]
    text = " ".join(words)
    places = {"model": tiny_model, "out": tmp_path / "out"}
    places |= {name: trained_runs.folder(kind) for name, kind in (("run", "lora"), ("other", "full")) if name in text}
    words = [word.format(**places) if re.search(r"\{(model|run|other|out)\}", word) else word for word in words]
    before = {path.name for path in ROOT.iterdir()}
    if "--push_to_hub" in words:  # the Hub's address is read when its library is imported
        with closing(Hub()) as hub:
            done = run([sys.executable, "-m", module, *words], env=hub.environment(tmp_path / "home", TOKEN))
            assert hub.repositories
    else:
        done = commands.run(Path(module).stem if module.endswith(".py") else module, words)
    assert done.status == 0, (words, done.err)
    assert (tmp_path / "out.json").exists() == ("--json" in words)
    assert not [path for path in ROOT.iterdir() if path.name not in before and not path.name.startswith(".")]


def path_of_a_newcomer() -> str:
    """The commands of the first block of the first page, as they stand there."""
    _, block = next(code_blocks((ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")))
    return block


@pytest.fixture(scope="module")
def newcomer(tiny_model, uneven_rows, tmp_path_factory) -> tuple[Path, Done]:
    """A folder in which someone has followed the first page, in a shell, with a tiny model and the rows of a file.

    What is cloned are this project's files as they stand. Nothing is installed: the environment is this one, which says
    of itself that it is complete.
    """
    folder = tmp_path_factory.mktemp("newcomer")
    address, environment = folder / "address", folder / "environment"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "--git-dir", address / ".git", "--work-tree", ROOT]
    for words in (["git", "init", address], [*git, "add", "--all"], [*git, "commit", "--message", "all"]):
        assert run(words).status == 0
    environment.mkdir()
    for path in BIN.parent.iterdir():
        if path.name != "installed.txt":
            (environment / path.name).symlink_to(path)
    stamp = "source scripts/setup_env.sh && environment_stamp requirements-cpu.txt requirements.txt"
    (environment / "installed.txt").write_text(run(["bash", "-c", stamp]).out)
    shutil.copy(uneven_rows, folder / "my_rows.parquet")
    path = path_of_a_newcomer().replace("ADDRESS", str(address)).replace("smollm2-135m", str(tiny_model))
    path = path.replace("cd dsft\n", f"cd dsft\nln -s {environment} .venv\n")
    script = f"set -e\ncd {folder}\n{path}\nsource .venv/bin/activate\ncommand -v python"
    small = {"MODEL": str(tiny_model), "NPROC": "1", "DSFT_TORCH": "cpu", "PYTHON": sys.executable}
    return folder / "dsft", run(["bash", "-c", script], env=small)


in_the_clone = pytest.mark.xdist_group("deepspeed's default port")


@pytest.mark.slow
@in_the_clone
def test_a_newcomer_gets_a_merged_model_in_five_commands(newcomer):
    clone, done = newcomer
    assert done.status == 0, done.err
    assert len([words for line in shell_lines(path_of_a_newcomer()) for words in split(line[1])]) <= 5
    assert "installing" not in done.out
    for answered in ("base model:", "merged model:", "== next: "):
        assert answered in done.out
    for out in ("out/quickstart/fsdp", "out/mine"):
        assert (clone / out / "merged" / "model.safetensors").is_file()
    assert done.out.splitlines()[-1] == str(BIN / "python")


@pytest.mark.slow
@in_the_clone
@pytest.mark.parametrize("name", [name for name in RUN if name.endswith(".sh")])
def test_a_script_runs_in_the_clone(name, newcomer, tiny_model, tmp_path):
    script, words = RUN[name]
    starts = {"config": f"scripts/pipeline_{words[0]}_cpu.yaml", "env": words[0]} | flag_values(tuple(words[1:]))
    pipelines = [command.words for command in COMMANDS if "dsft.pipeline" in command.words]
    assert pipelines
    assert all(flag_values(tuple(small_form("dsft.pipeline", words[3:]))) == starts for words in pipelines)
    words = [word.format(model=tiny_model, out=tmp_path / "out") for word in words]
    done = run(["bash", newcomer[0] / script, *words], env={"DSFT_TORCH": "cpu", "PYTHON": sys.executable})
    assert done.status == 0, done.err
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if parts(c.words)], ids=lambda c: c.place)
def test_launcher_and_flags_are_read(command, tmp_path):
    """Also of what is not run: names, types and values of all flags, and of those of a pipeline's steps."""
    from dsft.orchestration import Pipeline

    launcher, module, flags = parts(command.words)
    read_launcher(launcher, module)
    if module == "dsft.pipeline":
        values = flag_values(flags) | {"output_dir": str(tmp_path)}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        Pipeline(cli.parse(PipelineConfig, words))
    assert module in SMALL, f"no small form of {module}"


def test_checksums_are_checked_without_dsft(trained_runs):
    assert any(command.words == ("sha256sum", "-c", "COMPLETE") for command in COMMANDS)
    folder = trained_runs.folder("lora") / "checkpoint-000001"
    assert subprocess.run(["sha256sum", "-c", "COMPLETE"], cwd=folder, capture_output=True).returncode == 0


SCRIPTS = sorted({word for c in COMMANDS for word in c.words if re.fullmatch(r"scripts/\w+\.(py|sh)", word)})


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_flags_that_the_pages_give_it(script):
    known = {f.name for f in fields(TrainConfig)}
    text = (ROOT / script).read_text(encoding="utf-8")
    for command in COMMANDS:
        if script in command.words:
            given = flag_values(command.words[command.words.index(script) + 1 :])
            assert not [name for name in given if name and name not in known and not re.search(rf"\b{name}\b", text)]
        if script == "scripts/finetune_lora_med.sh" and script in command.words:
            flags = command.words[command.words.index(script) + 3 :]
            cli.parse(TrainConfig, ["--model", "m", "--train_files", "t", "--output_dir", "no/such/out", *flags])
    if script.endswith(".sh"):
        done = run(["bash", script, "--help"], timeout=20)
        assert done.status == 0
        assert script in done.out


def test_generated_pages_are_up_to_date():
    assert any(command.words[:2] == ("python", "scripts/make_docs.py") for command in COMMANDS)
    done = run([BIN / "python", "scripts/make_docs.py", "--check"])
    assert done.status == 0, done.err


def test_the_site_is_built_without_a_warning(tmp_path):
    """All pages are in its navigation; all links and anchors between pages resolve."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = run([BIN / "zensical", "build", "--strict", "--config-file", tmp_path / "mkdocs.yml"])
    assert (done.status, done.err) == (0, "No issues found\n")
    pages = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(pages) == sorted(path.name for path in tmp_path.glob("docs/*.md"))
    assert (tmp_path / "site" / "folding" / "index.html").is_file()


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "data/README.md"])
def test_links_outside_the_site_resolve(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("http")]
    for target in targets:
        name, _, anchor = target.partition("#")
        other = (ROOT / page).parent / name if name else ROOT / page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_game_of_the_page_is_one():
    """The example that a reader would copy plays as the page says."""
    from dsft.envs.expert_data import play_expert

    text = (ROOT / "docs" / "adding_environment.md").read_text(encoding="utf-8")
    [source] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    game = names["Corridor"](9, max_steps=20, max_depth=20)
    lengths = set()
    for seed in range(20):
        episode = play_expert(game, seed)
        assert episode.solved
        assert game.steps == game.optimal_length == abs(game.goal - game.reset(seed).split().index("P"))
        lengths.add(game.optimal_length)
    assert len(lengths) > 3
    with pytest.raises(ValueError, match="--size must be 2 or more, got 1"):
        names["Corridor"](1, max_steps=20, max_depth=20)


def test_shell_is_read_as_a_shell_does():
    text = 'a --b "c d"  # a comment\n\n    python -m dsft.merge --checkpoint x \\\n        --output y\n\ntext\n'
    assert list(split('a --b "c d" && e | f  # g')) == [("a", "--b", "c d"), ("e",), ("f",)]
    assert [block.split() for _, block in code_blocks(f"```bash\ncd x\n```\n{text}")] == [
        ["cd", "x"],
        ["python", "-m", "dsft.merge", "--checkpoint", "x", "\\", "--output", "y"],
    ]
    assert flag_values(("out", "--a", "1", "--b")) == {"": "out", "a": "1", "b": None}
