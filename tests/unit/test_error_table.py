"""docs/errors.yaml has every error message with its remedy and an example, and makes docs/errors.md.

That a test produces no other message, and that the tests which the table names produce theirs, is checked after each
test: tests/conftest.py.
"""

import ast

import pytest

from tests.error_table import code_of, entries
from tests.helpers import COMMANDS, ROOT

NEEDED = {
    "train": "--model m --train_files t.parquet --output_dir {}",
    "preview": "--model m --train_files t.parquet",
    "merge": "--checkpoint c",
    "report": "--runs r",
    "generate": "--num_processes 1 --output_dir {}",
    "validate": "--model m",
    "pipeline": "--model m --output_dir {}",
}
"""Flags that a command line of the table leaves out."""
EXAMPLES = [(entry.code, example) for entry in entries().values() for example in entry.examples]


@pytest.mark.parametrize(("code", "words"), [(c, e.split()) for c, e in EXAMPLES if e.split()[0] in COMMANDS])
def test_example_command_line(code, words, commands, tmp_path):
    needed = NEEDED.get(words[0], "").format(tmp_path / "out").split()
    done = commands.run(f"dsft.{words[0]}", [*needed, *words[1:]])
    assert done.status == 1
    assert {code_of(line.removeprefix("error: ")) for line in done.err.splitlines()} == {code}


def test_example_tests_exist():
    files = {str(file.relative_to(ROOT / "tests")): file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    named = [e.partition("[")[0].split("::") for _, e in EXAMPLES if e.split()[0] not in COMMANDS]
    assert not [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in files.get(file, "")]


def test_all_messages_are_in_the_table():
    """Each literal piece of text in a statement that makes an error, or that adds to a list of problems."""
    table = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    missing = []
    for path in (ROOT / "dsft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            errors = ("UserError", "AgreedError", "DamagedError", "StepFailedError")
            is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") in errors
            is_problem = isinstance(node, ast.stmt) and ast.unparse(node).startswith("problems")
            if is_error or is_problem or (isinstance(node, ast.Yield) and path.parent.name == "config"):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                missing += [f"{path}:{node.lineno}: {t}" for t in texts if " " in t.strip() and t.strip() not in table]
    assert not missing, "not in docs/errors.yaml:\n" + "\n".join(missing)
