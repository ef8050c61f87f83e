"""Where the source makes an error for the user, and the text that it makes: read from the source, not from a list."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tests.helpers import ROOT

ERRORS = {"UserError", "AgreedError", "StepFailedError"}
MAKERS = r"_refusal|\w+_problems"
"""Functions that return the text of an error."""
PARTS = {"Verdict": 0, "_lose": 1}
"""Calls of the liveness watch, whose text becomes a part of a line: the argument that has it."""
OFFERS = "_offer"
"""Functions that return the last part of one."""
HOLE = "\0"


@dataclass(frozen=True)
class Site:
    """One message: the file that makes it, and its text with a hole for each value."""

    file: str
    template: str
    lines: tuple[int, ...]
    """The first lines of the statements that make it."""
    is_part: bool = False
    """Whether the line that a user sees has more before or after it."""

    @property
    def fixed(self) -> int:
        """Letters that are the same whatever the values."""
        return len(self.template.replace(HOLE, ""))

    def matches(self, line: str) -> bool:
        """Whether it can have made a line."""
        pattern = ".*".join(re.escape(part) for part in self.template.split(HOLE))
        return (re.search if self.is_part else re.fullmatch)(pattern, line) is not None

    def __str__(self) -> str:
        return f"{self.file}:{self.lines[0]} {self.template.replace(HOLE, '…')}"


@cache
def sites() -> tuple[Site, ...]:
    """All of them, in the order of the files. A text that only passes another one on is none."""
    found: dict[tuple[str, str, bool], list[int]] = {}
    for path in sorted((ROOT / "dsft").rglob("*.py")):
        for line, template, is_part in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            if re.search(r"\w{2}", template.replace(HOLE, "")):
                found.setdefault((str(path.relative_to(ROOT)), template, is_part), []).append(line)
    return tuple(Site(file, template, tuple(lines), is_part) for (file, template, is_part), lines in found.items())


def makers_of(line: str, among: "tuple[Site, ...] | None" = None) -> list[Site]:
    """The sites that can have made a line. A template of little text would take the lines of others for its own."""
    able = [site for site in (sites() if among is None else among) if site.matches(line)]
    best = max(able, key=lambda site: site.fixed, default=None)
    if best is None or best.is_part:
        return [site for site in able if site.is_part]
    return [site for site in able if not site.is_part and site.fixed > 0.75 * best.fixed]


def _texts(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, template, whether it is a part) of every text that becomes an error."""
    for node in ast.walk(tree):
        expressions: list[ast.expr] = []
        is_part = False
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ERRORS:
                expressions = node.args[:1]
            elif name == "DamagedError":
                yield node.lineno, f"{HOLE} {_template(node.args[1])}", False
            elif name in PARTS and len(node.args) > PARTS[name]:
                expressions, is_part = [node.args[PARTS[name]]], True
            elif name in ("append", "insert", "extend") and ast.unparse(node.func).startswith("problems."):
                expressions = node.args[-1:]
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            expressions = [node.value] if ast.unparse(target) == "problems" else []
        elif isinstance(node, ast.FunctionDef) and re.fullmatch(f"{MAKERS}|{OFFERS}", node.name):
            expressions = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
            is_part = node.name == OFFERS
        for expression in expressions:
            for text in _strings(expression):
                yield expression.lineno, _template(text), is_part


def _strings(node: ast.expr) -> Iterator[ast.expr]:
    """The texts in a list, a comprehension, a choice, or the text itself."""
    if isinstance(node, ast.List):
        for element in node.elts:
            yield from _strings(element)
    elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        yield from _strings(node.elt)
    elif isinstance(node, ast.IfExp):
        yield from _strings(node.body)
        yield from _strings(node.orelse)
    else:
        yield node


def _template(node: ast.expr) -> str:
    """A text with a hole for each value; holes side by side are one."""
    if isinstance(node, ast.Constant):
        text = str(node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)  # type: ignore[misc]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = _template(node.left) + _template(node.right)
    else:
        text = HOLE
    return re.sub(f"{HOLE}+", HOLE, text)
