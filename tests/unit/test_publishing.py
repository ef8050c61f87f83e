"""--push_to_hub, against a Hub on this machine: huggingface_hub itself speaks to it over HTTP."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsft.cli import parse
from dsft.config import MergeConfig
from tests.helpers import BIN, ROOT, contents, flags, message, run
from tests.hub import READ_ONLY, TOKEN, Hub

pytestmark = pytest.mark.slow

PUSH = """
import sys
from pathlib import Path
from dsft.errors import run_and_report
from dsft.export.hub import push

folder, name, private, debug = sys.argv[1:]
work = lambda: print("pushed", push(Path(folder), name, private=private == "True"))
sys.exit(run_and_report(work, debug=debug == "True"))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    opened = Hub()
    yield opened
    opened.close()


@pytest.fixture
def model(tmp_path) -> Path:
    """Not a model: an upload looks at the names and bytes alone."""
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")
    return folder


def push(hub: Hub, model: Path, name: str = "me/tuned", *, private=True, debug=False, **more: str | None):
    token = more.pop("token", TOKEN)
    words = [sys.executable, "-c", PUSH, str(model), name, str(private), str(debug)]
    environment = os.environ | hub.environment(model.parent / "home", token) | more
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("name", "private"), [("me/tuned", True), ("tuned", False)])
def test_a_folder_arrives_whole_in_a_repository_of_its_own(hub, model, name, private):
    done = push(hub, model, name, private=private)
    assert (done.returncode, done.stdout) == (0, f"pushed {hub.address}/me/tuned\n"), done.stderr
    assert TOKEN not in done.stdout + done.stderr
    repository = hub.repositories["me/tuned"]
    assert repository.private == private
    assert repository.files == contents(model)


def test_a_repository_that_is_there_is_filled_and_stays_as_public_as_it_was(hub, model):
    """Its old weights go: from_pretrained loads one whole file before several that an index names."""
    assert push(hub, model, private=False).returncode == 0
    hub.repositories["me/tuned"].files["LICENSE"] = b"mine"
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text("{}")
    (model / "config.json").write_text('{"a": 1}')
    assert push(hub, model, private=True).returncode == 0
    assert not hub.repositories["me/tuned"].private
    assert hub.repositories["me/tuned"].files == contents(model) | {"LICENSE": b"mine"}


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("what", "more", "told"),
    [
        ("no token", {"token": None}, "there is no token; log in with hf auth login, or set HF_TOKEN"),
        ("wrong token", {"token": "hf_secret1"}, "the Hub refuses the token (401); log in again"),
        ("no letters of a token", {"token": "hf_secr\u00e9t"}, "the token cannot be sent as it is; log in again"),
        ("no right to write", {"token": READ_ONLY}, "the token may not write there (403: You don't have the rights"),
        ("no network", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached ("),
        ("offline", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
    ],
)
def test_a_failure_is_one_line_that_says_how_to_push_later(hub, model, what, more, told, debug):
    before = contents(model)
    done = push(hub, model, debug=debug, **more)
    assert done.returncode == 1
    assert hub.repositories == {}
    assert contents(model) == before
    later = (
        f"; the merged model is complete in {model}; to push it: hf upload me/tuned {model} . --private "
        "--delete 'model*.safetensors' --delete model.safetensors.index.json"
    )
    [line] = [line for line in done.stderr.splitlines() if "to push it" in line]
    assert told in line
    assert line.endswith(later)
    assert ("Traceback" in done.stderr) == debug
    if not debug:
        assert done.stderr == f"{line}\n"
    if more.get("token"):
        assert more["token"] not in done.stderr + done.stdout


def test_metadata_that_the_hub_refuses(hub, model):
    (model / "README.md").write_text("---\nlicence: mit\n---\n")
    done = push(hub, model)
    assert 'Invalid metadata in README.md. - "license" is required; the merged model is complete in' in done.stderr


def test_the_command_for_later_works(hub, model):
    line = push(hub, model, token=None).stderr.strip()
    words = shlex.split(line.partition("to push it: ")[2])
    done = run([BIN / words[0], *words[1:]], env=hub.environment(model.parent / "home"))
    assert done.status == 0, done.err
    assert hub.repositories["me/tuned"].private
    assert hub.repositories["me/tuned"].files == contents(model)


@pytest.mark.parametrize("flag_name", ["push_to_hub", "hub_name"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a/b/c", "a/b/c: Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
        ("me/a b", "me/a b: Repo id must use alphanumeric chars"),
        ("me/a--b", "me/a--b: Cannot have -- or .. in repo_id"),
        ("me/" + "a" * 97, "maximum length is 96"),
        ("/no/path", "/no/path: "),
    ],
)
def test_a_name_that_no_repository_can_have_is_refused_before_the_merge(flag_name, name, told):
    line = message(parse, MergeConfig, ["--checkpoint", "/no/such", f"--{flag_name}", name])
    assert line.startswith(f"{flag_name} {name}: ")
    assert told in line
    assert line.endswith("; write owner/name, or name")


def test_a_card_names_the_repository_that_it_is_meant_for(commands, trained_runs, tmp_path):
    words = flags(checkpoint=trained_runs.folder("lora"), output=tmp_path / "merged", hub_name="me/tuned")
    done = commands.run("dsft.merge", words)
    assert done.status == 0, done.err
    assert "me/tuned" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


def test_merged_and_pushed_in_one_command(hub, trained_runs, tmp_path):
    """And where the push fails, the merge stays."""
    words = [sys.executable, "-m", "dsft.merge", "--checkpoint", trained_runs.folder("lora")]
    output = tmp_path / "model"
    done = run([*words, "--output", output, "--push_to_hub", "me/tuned"], env=hub.environment(tmp_path / "home"))
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1] == f"pushed   {hub.address}/me/tuned"
    assert hub.repositories["me/tuned"].files == contents(output)
    assert b"\n# tuned\n" in hub.repositories["me/tuned"].files["README.md"]
    other = tmp_path / "other"
    refused = run(
        [*words, "--output", other, "--push_to_hub", "me/tuned"], env=hub.environment(tmp_path / "home", "hf_wrong")
    )
    assert refused.status == 1
    assert refused.out.startswith("merged   ")
    assert len(refused.errors) == 1
    assert contents(other).keys() == contents(output).keys()
