"""From a command line to a checked config."""

import dataclasses
import resource
import subprocess
import sys
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft import cli
from dsft.cli import parse
from dsft.config import (
    CheckpointConfig,
    GenerateConfig,
    MergeConfig,
    PipelineConfig,
    ReportConfig,
    TrainConfig,
    ValidateConfig,
    values,
)
from dsft.config.values import as_yaml, read_value
from dsft.errors import UserError
from tests.helpers import COMMANDS, ROOT

NEEDED = ["--model", "m", "--train_files", "t.parquet", "--output_dir", "out"]
PROPERTY = settings(deadline=None, database=None, max_examples=50)


def problems(*argv: str, config_class: type = TrainConfig) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(config_class, argv)
    return str(caught.value).splitlines()


def help_of_train() -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsft.train", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def test_help_takes_under_half_a_second():
    """Of the processor: other tests may run beside it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    help_of_train()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("module", ["", *(f".{name}" for name in COMMANDS)])
def test_importing_dsft_and_help_load_nothing_large(module):
    statement = f"import dsft{module}" + (f"; dsft{module}.main()" if module else "")
    script = f"import sys; sys.argv = ['dsft', '--help']; {statement}; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    large = {
        "torch",
        "transformers",
        "deepspeed",
        "pandas",
        "numpy",
        "pyarrow",
        "matplotlib",
        "rich",
        "huggingface_hub",
    }
    loaded = set(done.stderr.split())
    assert f"dsft{module}" in loaded
    assert not large & loaded


def test_help_lists_every_flag_with_type_default_and_meaning():
    lines = help_of_train().stdout.splitlines()
    for f in dataclasses.fields(TrainConfig):
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"  --{f.name} ")]
        assert lines[at + 1].strip() == values.meanings(TrainConfig)[f.name] != ""
    assert "  --backend  (one of fsdp, zero3; fsdp)" in lines
    assert "  --model  (str; required)" in lines
    assert "  --lr  (float; 0.0001)" in lines
    assert "  --betas  (2 floats; 0.9,0.95)" in lines
    assert "  --target_modules  (list; all-linear)" in lines
    assert '  --eval_steps  (int or "epoch"; epoch)' in lines
    assert "  --max_train_rows  (int; None)" in lines
    assert "  --debug  (bool; False)" in lines


def test_help_takes_precedence_over_wrong_flags(capsys):
    cli.main(MergeConfig, lambda config: pytest.fail("must not run"), ["--bogus", "1", "--help"])
    assert "--checkpoint  (str; required)" in capsys.readouterr().out


def test_unknown_flag_suggests_the_closest_one():
    expected = "unknown flag --lora_rnak (did you mean 'lora_rank'?); --help lists all flags"
    assert problems(*NEEDED, "--lora_rnak", "8") == [expected]


def test_unknown_flag_without_a_similar_one_gets_no_suggestion():
    assert problems(*NEEDED, "--xyzzy=8") == ["unknown flag --xyzzy; --help lists all flags"]


@pytest.mark.parametrize("flag", ["--nothing", "--nomodel", "--nolr"])
def test_no_prefix_is_for_bool_flags_only(flag):
    [reported] = problems(*NEEDED, flag)
    assert reported.startswith(f"unknown flag {flag}")


def test_all_problems_are_reported_together(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_rankk: 3\nmax_length: null\n")
    reported = problems(
        "--bogus", "1", "--lr=fast", "--output_dir", "--seed", "1.5", "--config", str(tmp_path / "c.yaml")
    )
    assert reported == [
        "--output_dir needs a value (str)",
        "unknown flag --bogus; --help lists all flags",
        f"{tmp_path}/c.yaml: unknown flag 'lora_rankk' (did you mean 'lora_rank'?)",
        f"--model is required: {values.meanings(TrainConfig)['model']}",
        "max_length: expected int, got None",
        f"--train_files is required: {values.meanings(TrainConfig)['train_files']}",
        "lr: expected float, got 'fast'",
        "seed: expected int, got '1.5'",
    ]


def test_unexpected_argument():
    assert problems(*NEEDED, "--debug", "False", "stray") == [
        "unexpected argument 'stray'; write flags as --name value"
    ]


@pytest.mark.parametrize("word", ["-", "--"])
def test_fires_separators_have_no_meaning(word):
    assert f"unexpected argument '{word}'; write flags as --name value" in problems(*NEEDED, word, "--interactive")


@pytest.mark.parametrize("rest", [["--lr"], ["--lr", "--debug"], ["-lr"]])
def test_only_bool_flags_need_no_value(rest):
    assert problems(*NEEDED, *rest) == ["--lr needs a value (float)"]


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=3"])
def test_local_rank_of_the_launcher_is_accepted(word):
    assert parse(TrainConfig, [word, *NEEDED]).model == "m"


def test_local_rank_as_a_value():
    assert parse(TrainConfig, [*NEEDED, "--experiment_name", "local_rank"]).experiment_name == "local_rank"


def test_dashes_underscores_and_equals_signs():
    words = ["--model=m", "--train-files", "t", "--output-dir=o=1", "--max-length=7"]
    config = parse(TrainConfig, words)
    assert (config.max_length, config.output_dir) == (7, "o=1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--debug"], True),
        (["--debug", "--lr", "1"], True),
        (["--debug=True"], True),
        (["--debug", "true"], True),
        (["--debug=1"], True),
        (["--nodebug"], False),
        (["--debug=False"], False),
        (["--debug", "false"], False),
        (["--debug=0"], False),
        (["--debug", "--nodebug"], False),
    ],
)
def test_every_form_of_a_bool_flag(words, expected):
    assert parse(TrainConfig, [*NEEDED, *words]).debug is expected


def test_invalid_bool():
    assert problems(*NEEDED, "--debug", "maybe") == ["debug: expected bool, got 'maybe'"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a, b,", ["a", "b"]),
        ("[a,b]", ["a", "b"]),
        ("(a, b)", ["a", "b"]),
        ("copy (1)", ["copy (1)"]),
        ("[ab].parquet", ["[ab].parquet"]),
    ],
)
def test_lists(text, expected):
    assert parse(TrainConfig, ["--model=m", "--output_dir=o", f"--train_files={text}"]).train_files == expected


@pytest.mark.parametrize("text", ["0.8,0.9", "(0.8, 0.9)", "[0.8,0.9]"])
def test_betas_are_two_floats(text):
    assert parse(TrainConfig, [*NEEDED, "--betas", text]).betas == (0.8, 0.9)


@pytest.mark.parametrize("text", ["0.8", "0.8,0.9,0.99", "a,b", ""])
def test_invalid_betas(text):
    assert problems(*NEEDED, f"--betas={text}") == [f"betas: expected 2 floats, got {text!r}"]


def test_none_for_optional_flags_and_as_a_str():
    words = ["--model", "None", "--train_files", "t", "--output_dir", "o", "--max_train_rows", "None"]
    config = parse(TrainConfig, [*words, "--val_files=None"])
    assert (config.model, config.max_train_rows, config.val_files) == ("None", None, None)


def test_intervals_are_ints_or_epoch():
    config = parse(TrainConfig, [*NEEDED, "--eval_steps", "5", "--save_steps", "epoch"])
    assert (config.eval_steps, config.save_steps) == (5, "epoch")
    expected = "eval_steps: expected int or \"epoch\", got 'often'"
    assert problems(*NEEDED, "--eval_steps", "often") == [expected]


def test_invalid_choice_lists_the_choices():
    reported = "backend: expected one of fsdp, zero3, got"
    assert problems(*NEEDED, "--backend", "zero2") == [f"{reported} 'zero2' (did you mean 'zero3'?)"]
    assert problems(*NEEDED, "--backend", "ddp") == [f"{reported} 'ddp'"]
    assert problems(*NEEDED, "--fold", "bacth") == [
        "fold: expected one of batch, off, got 'bacth' (did you mean 'batch'?)"
    ]
    assert problems(*NEEDED, "--gradient_checkpointing", "atuo") == [
        "gradient_checkpointing: expected bool or \"auto\", got 'atuo' (did you mean 'auto'?)"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"),
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "--lr", "1"], True),
        (["--gradient_checkpointing", "True"], True),
        (["--nogradient_checkpointing"], False),
        (["--gradient_checkpointing=false"], False),
        (["--gradient_checkpointing", "auto"], "auto"),
    ],
)
def test_bool_flag_with_a_third_value(words, expected):
    assert parse(TrainConfig, [*NEEDED, *words]).gradient_checkpointing == expected


@pytest.mark.parametrize("text", ["fold: off", "fold: 'off'", "fold: no", "fold: OFF"])
def test_unquoted_off_in_yaml_is_off(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert parse(TrainConfig, [*NEEDED, "--config", str(tmp_path / "c.yaml")]).fold == "off"


def test_negative_number_is_a_value():
    assert problems(*NEEDED, "--lr", "-1e-4") == ["lr must be above 0, got -0.0001"]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_floats_are_finite(text):
    assert problems(*NEEDED, f"--lr={text}") == [f"lr: expected float, got '{text}'"]


def test_flags_take_precedence_over_the_yaml_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: from-file\ntrain_files: [a, b]\nlr: 1e-3\nbetas: [0.5, 0.6]\nseed: 9\ndebug: true\n")
    config = parse(TrainConfig, ["--config", str(file), "--output_dir", "o", "--seed", "4", "--nodebug"])
    assert (config.model, config.train_files, config.lr, config.betas) == ("from-file", ["a", "b"], 1e-3, (0.5, 0.6))
    assert (config.seed, config.debug) == (4, False)


def test_empty_yaml_file(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert parse(TrainConfig, [*NEEDED, "--config", str(tmp_path / "c.yaml")]).lr == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must contain 'flag: value' lines, got a list"),
        ("a: [1\n", "is not valid YAML: "),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["no flags", "not YAML", "no file"],
)
def test_bad_yaml_file(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    [reported] = problems(*NEEDED, "--config", str(file))
    assert reported.startswith(f"--config {file} {message}")


@pytest.mark.parametrize("native", [None, [1], {"a": 1}, True, 1.5])
def test_native_value_that_is_not_an_int(native):
    with pytest.raises(ValueError, match=r"^$"):
        read_value(native, int)


@pytest.mark.parametrize("native", [None, [1], {"a": 1}, True])
def test_native_value_that_is_not_a_float(native):
    with pytest.raises(ValueError, match=r"^$"):
        read_value(native, float)


finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1)
items = st.text("abcxyz_./-*?09", min_size=1)


@PROPERTY
@given(st.integers(-(10**12), 10**12), finite, st.booleans(), words, st.lists(items), st.tuples(finite, finite))
def test_values_survive_a_round_trip_through_str(whole, number, switch, word, several, pair):
    assert read_value(str(whole), int) == whole
    assert read_value(str(number), float) == number
    assert read_value(str(switch), bool) is switch
    assert read_value(word, str) == word
    assert read_value(",".join(several), list[str]) == several
    assert read_value(str(pair), tuple[float, float]) == pair
    assert read_value(str(whole), int | None) == whole


@st.composite
def configs(draw):
    """Any config that its own check accepts."""
    ratio = st.floats(0, 1)
    name = words.filter(lambda word: word != "None")
    file = name.filter(lambda word: "=" not in word and "*" not in word)
    return TrainConfig(
        model=draw(words),
        train_files=draw(st.lists(file, min_size=1)),
        val_files=draw(st.none() | st.lists(file, min_size=1)),
        output_dir="out",
        debug=draw(st.booleans()),
        messages_key=draw(st.none() | name),
        experiment_name=draw(st.none() | name),
        max_length=draw(st.integers(1, 10**9)),
        max_train_rows=draw(st.none() | st.integers(1, 10**9)),
        lr=draw(st.floats(1e-300, 1e300)),
        betas=(draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))),
        warmup_ratio=draw(ratio),
        eval_steps=draw(st.just("epoch") | st.integers(0, 10**6)),
        logger=draw(st.lists(st.sampled_from(["console", "wandb", "tensorboard"]))),
        schedule=draw(st.sampled_from(["cosine", "linear", "constant"])),
        max_tokens_per_micro_batch=draw(st.none() | st.integers(1, 10**9)),
        fold=draw(st.sampled_from(["batch", "off"])),
        gradient_checkpointing=draw(st.sampled_from([True, False, "auto"])),
    )


@PROPERTY
@given(configs())
def test_config_survives_a_round_trip_through_yaml(tmp_path_factory, config):
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(as_yaml(config), encoding="utf-8")
    again = parse(TrainConfig, ["--config", str(file)])
    assert dataclasses.replace(again, config=None) == config


def test_yaml_has_the_flags_in_order():
    config = parse(TrainConfig, NEEDED)
    names = [line.split(":")[0] for line in as_yaml(config).splitlines() if line[0] not in " -"]
    assert names == [f.name for f in dataclasses.fields(TrainConfig)]


def test_invalid_command_line_exits_with_status_1(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(TrainConfig, lambda config: pytest.fail("must not run"), ["--model", "m", "--train_files", "t"])
    assert exited.value.code == 1
    meaning = values.meanings(TrainConfig)["output_dir"]
    assert capsys.readouterr().err == f"error: --output_dir is required: {meaning}\n"


def test_valid_command_line_runs_with_its_config():
    ran = []
    cli.main(TrainConfig, ran.append, [*NEEDED, "--seed=3"])
    assert [config.seed for config in ran] == [3]


@pytest.mark.parametrize("config_class", [TrainConfig, MergeConfig])
def test_every_flag_has_a_help_text_of_one_line(config_class):
    meaning = values.meanings(config_class)
    assert list(meaning) == list(typing.get_type_hints(config_class))
    assert all(text.strip() and "\n" not in text for text in meaning.values())


def test_no_flags_at_all_lists_the_required_ones():
    assert [line.split()[0] for line in problems()] == ["--model", "--train_files", "--output_dir"]


PIPELINE = ["--env", "sokoban", "--model", "m", "--output_dir", "out"]


def test_section_flags_on_the_command_line_take_precedence_over_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  lr: 1.0e-3\n  lora_rank: 8\nvalidate:\n  episodes: 7\n")
    read = parse(
        PipelineConfig, [*PIPELINE, "--config", str(tmp_path / "c.yaml"), "--train.lr", "2e-3", "--merge.base=b"]
    )
    assert (read.train, read.validate) == ({"lr": "2e-3", "lora_rank": 8}, {"episodes": 7})
    assert (read.merge, read.generate) == ({"base": "b"}, {})


def test_wrong_section_flags_are_reported_together(tmp_path):
    (tmp_path / "c.yaml").write_text("train: 3\n")
    assert problems(*PIPELINE, "--config", str(tmp_path / "c.yaml"), config_class=PipelineConfig) == [
        "train: expected flags, got 3"
    ]
    assert problems(*PIPELINE, "--train.lrr", "1", "--trian.lr", "1", config_class=PipelineConfig) == [
        "unknown flag --trian.lr (did you mean 'train'?); --help lists all flags"
    ]
    assert problems(*PIPELINE, "--train.lrr", "1", "--generate.seed", "1", config_class=PipelineConfig) == [
        "unknown flag --train.lrr (did you mean 'lr'?)"
    ]


@pytest.mark.parametrize(
    "config_class",
    [TrainConfig, MergeConfig, CheckpointConfig, ReportConfig, GenerateConfig, ValidateConfig, PipelineConfig],
)
def test_inherited_flags_have_help_texts(config_class):
    meanings = values.meanings(config_class)
    assert all(meanings[f.name].strip() for f in dataclasses.fields(config_class))


def test_config_survives_a_round_trip_through_the_command_line():
    config = TrainConfig(model="m", train_files=["a", "b"], output_dir="o", lr=3e-4, use_dora=True, eval_steps=7)
    assert parse(TrainConfig, values.as_words(config)) == config
    assert values.as_words(TrainConfig(model="m", train_files=["a"], output_dir="o")) == [
        *("--model", "m", "--train_files", "a", "--output_dir", "o")
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["out"],
        ["out", "--verify", "False"],
        ["--verify=False", "out"],
        ["--checkpoint", "out"],
        ["--noverify", "--checkpoint=out"],
    ],
)
def test_positional_argument(words):
    config = parse(CheckpointConfig, words)
    assert config.checkpoint == "out"
    assert config.verify == (len(words) == 1 or words[0] == "--checkpoint")


@pytest.mark.parametrize("words", [["a", "b"], ["--checkpoint", "a", "b"], ["b", "--checkpoint", "a"]])
def test_second_positional_argument_is_unexpected(words):
    assert problems(*words, config_class=CheckpointConfig) == ["unexpected argument 'b'; write flags as --name value"]


def test_positional_argument_is_required():
    [reported] = problems(config_class=CheckpointConfig)
    assert reported.startswith("--checkpoint is required: ")
    assert "python -m dsft.checkpoint PATH" in reported
    assert "python -m dsft.checkpoint PATH" in cli.help_text(CheckpointConfig)


def test_several_positional_arguments_are_a_list():
    assert parse(ReportConfig, ["a", "b,c", "--samples", "1"]).runs == ["a", "b,c"]
    assert parse(ReportConfig, ["--runs", "a,b"]).runs == ["a", "b"]
    assert problems("a", "--runs", "b", config_class=ReportConfig) == [
        "unexpected argument 'a'; write flags as --name value"
    ]
