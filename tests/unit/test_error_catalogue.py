"""Every message that dsft can give its user is produced by a case, and stands in docs/errors.md with its remedy."""

import re
from pathlib import Path
from types import TracebackType

import pytest

from dsft.errors import UserError
from tests.error_cases import CASES, Place
from tests.error_sites import Site, makers_of, sites
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "errors.md"
ENTRY = re.compile(r"^- `(?:error: )?(.+)`\n((?:  \S.*\n)+)", re.MULTILINE)


def entries() -> list[tuple[str, str]]:
    """(example line, what to do) of every entry."""
    return [(line, " ".join(text.split())) for line, text in ENTRY.findall(PAGE.read_text(encoding="utf-8"))]


def files_on_the_way(error: BaseException | None) -> set[str]:
    """The files of dsft through which an error and its causes came."""
    found: set[str] = set()
    while error is not None:
        step: TracebackType | None = error.__traceback__
        while step is not None:
            file = Path(step.tb_frame.f_code.co_filename)
            found |= {str(file.relative_to(ROOT))} if file.is_relative_to(ROOT) else set()
            step = step.tb_next
        error = error.__cause__ or error.__context__
    return found


def produce(name: str, place: Place) -> tuple[list[str], set[Site]]:
    """The lines that a case makes, and the places in the source that have made them."""
    try:
        told = CASES[name](place)
    except UserError as error:
        files = files_on_the_way(error)
        lines = str(error).splitlines()
        return lines, {s for line in lines for s in makers_of(line, tuple(s for s in sites() if s.file in files))}
    lines = [told] if isinstance(told, str) else list(told or [])
    lines = [line.removeprefix("error: ") for line in lines]
    return lines, {site for line in lines for site in makers_of(line)}


@pytest.mark.slow
def test_every_message_is_produced(tmp_path_factory, tiny_model, tokenizer, trained_runs, commands):
    produced: set[Site] = set()
    silent = []
    for name in CASES:
        with pytest.MonkeyPatch.context() as patch:
            place = Place(tmp_path_factory.mktemp("case"), tiny_model, tokenizer, trained_runs, commands, patch)

            lines, made = produce(name, place)
        produced |= made
        if not made:
            silent.append(f"{name}: {lines}")
    assert not silent, "cases that made no message: " + "\n".join(silent)
    missing = [str(site) for site in sites() if site not in produced]
    assert not missing, "messages that no case in tests/error_cases.py produces:\n" + "\n".join(missing)


def test_every_message_stands_in_the_catalogue_with_what_to_do():
    covered = {site for line, _ in entries() for site in makers_of(line)}
    missing = [str(site) for site in sites() if site not in covered]
    assert not missing, "messages without an entry in docs/errors.md:\n" + "\n".join(missing)


def test_every_entry_of_the_catalogue_is_a_message():
    strange = [line for line, _ in entries() if not makers_of(line)]
    assert not strange, "entries of docs/errors.md that no place in the source makes:\n" + "\n".join(strange)
    lines = [line for line, _ in entries()]
    assert len(lines) == len(set(lines))
    assert len(lines) == PAGE.read_text(encoding="utf-8").count("\n- `"), "an entry without a text that is indented"


def test_the_sites_are_found_in_every_form_of_the_source():
    """As the walk through the source sees them: a raise, a list, a comprehension, a choice, a text in two parts."""
    texts = {site.template.replace("\0", "…") for site in sites()}
    assert "… names no base model; name it with --base" in texts
    assert "--env is required: sokoban or frozenlake" in texts
    assert "history_turns must be 0 or more, got …" in texts
    assert "… is missing" in texts
    assert "--… must be … or more, got …" in texts
    assert not [text for text in texts if not re.search(r"\w{2}", text)]


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("x.yaml is damaged (no text); choose another checkpoint", "… is damaged (…); choose another checkpoint"),
        ("rank 1 (process 5 on n) has died; where it does not say why, the system may have killed it for lack of "
         "memory; all ranks end", "died; where"),
        ("lr must be above 0, got 0.0", "… must be above 0, got …"),
    ],
)  # fmt: skip
def test_a_line_is_known_by_its_fixed_text(line, start):
    assert any(site.template.replace("\0", "…").startswith(start) for site in makers_of(line))
    assert makers_of("a line of another program") == []
