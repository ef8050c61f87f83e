"""Reports of dsft.validate: tables of results, and answers before and after training."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.config.games import BASE, PLAYERS, SCRIPTED_PLAYERS, TUNED
from dsft.config.values import value_text
from dsft.errors import UserError
from dsft.reporting.document import Block, Mono, fenced, heading, paragraph, table
from dsft.reporting.html import folded, side_by_side
from dsft.reporting.runs import Run

GAME_HEADER = ("player", "success rate (95 % interval)", "moves over optimum", "invalid answers")
DIALOGUE_HEADER = ("model", "val/loss", "perplexity", "well formed (95 % interval)", "repeated questions", "answers")
LONGEST = 4000  # characters of an answer; one that never ends would fill the page


@dataclass(frozen=True)
class EvalReport:
    """One report of dsft.validate.

    model: the fine-tuned model, its base model, expert, random, or a model's name
    run: the name of the run it belongs to; None if it belongs to every run
    """

    model: str
    run: str | None
    path: Path
    values: dict[str, Any]

    @property
    def is_game(self) -> bool:
        """Whether a game was played; else dialogues were answered."""
        return "success_rate" in self.values

    @property
    def task(self) -> str:
        """What was played or answered, for a heading."""
        return str(self.values["settings"].get("env" if self.is_game else "data"))

    def rows(self) -> list[dict[str, Any]]:
        """All episodes or answered rows, from the .jsonl next to the report; none if it cannot be read."""
        try:
            text = self.path.with_suffix(".jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.split("\n") if line]  # splitlines would also cut at U+2028
        except (OSError, ValueError):
            return []
        return [row for row in rows if isinstance(row, dict)]


def find_eval_reports(runs: Sequence[Run], more: Sequence[str]) -> list[EvalReport]:
    """The reports in the runs' folders, and those at the paths `more`.

    Raises:
        UserError: one of `more` is not a report of dsft.validate.
    """
    found: dict[Path, EvalReport] = {}
    for run in runs:
        for path in [*sorted(run.root.glob("*.json")), *sorted(run.root.glob("validate/*.json"))]:
            if (values := _read(path)) is not None:
                found.setdefault(path.resolve(), EvalReport(_model(values, [run]), run.name, path, values))
    for name in more:
        path = Path(os.path.expanduser(name))
        values = _read(path)
        if values is None:
            raise UserError(
                f"--eval_reports {name} is not a report of dsft.validate; name the .json file that it wrote"
            )
        owner = next((run.name for run in runs if _is_tuned(values, run)), None)
        found.setdefault(path.resolve(), EvalReport(_model(values, runs), owner, path, values))
    return sorted(found.values(), key=lambda report: PLAYERS.index(report.model) if report.model in PLAYERS else 99)


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a report of dsft.validate; None for a file that cannot be shown as one."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        make_row = _game_row if "success_rate" in values else _dialogue_row
        is_report = "model" in values and isinstance(values["settings"], dict) and bool(make_row(values))
        return values if is_report and type(values.get("episodes", 0)) is int else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _model(values: dict[str, Any], runs: Sequence[Run]) -> str:
    if any(_is_tuned(values, run) for run in runs):
        return TUNED
    bases = {str(run.flags.get("model")) for run in runs}
    return BASE if values.get("adapter") is None and str(values["model"]) in bases else str(values["model"])


def _is_tuned(values: dict[str, Any], run: Run) -> bool:
    """Whether the model or its adapter is in the run's folder, or was when the run was trained elsewhere."""
    # A name that is not a path would be taken for one below the run's folder when started from there.
    if values.get("adapter") is None and values["model"] in (*SCRIPTED_PLAYERS, run.flags.get("model")):
        return False
    path = _absolute(values.get("adapter") or values["model"])
    homes = {_absolute(run.root), _absolute(run.folder)}
    if run.flags.get("output_dir"):
        trained = _absolute(run.flags["output_dir"])
        homes.add(trained.parent if run.is_pipeline else trained)
    return any(home == path or home in path.parents for home in homes)


def _absolute(path: Any) -> Path:
    return Path(os.path.expanduser(str(path))).resolve()


# Tables


def result_tables(reports: Sequence[EvalReport], *, several: bool) -> list[Block]:
    """A table for each game and each set of dialogues; with `several` runs, each row names its own."""
    blocks: list[Block] = []
    for task, members in _by_task(reports).items():
        make_row, head = (_game_row, GAME_HEADER) if members[0].is_game else (_dialogue_row, DIALOGUE_HEADER)
        rows = [(_label(report, several), *make_row(report.values)) for report in members]
        blocks += [heading(2, f"Results: {task}"), table(head, rows, right=range(1, len(head)))]
        if members[0].is_game:
            levels = " or ".join(map(str, sorted({report.values["episodes"] for report in members})))
            note = "Moves over optimum: on solved levels, moves beyond the fewest possible."
            blocks.append(paragraph(f"Each player played {levels} levels. {note}"))
    return blocks


def game_lines(reports: Sequence[EvalReport]) -> list[str]:
    """The table of players, for a console."""
    rows = [(report.model, *_game_row(report.values)) for report in reports if report.is_game]
    return table(GAME_HEADER, rows, right=range(1, len(GAME_HEADER))).split("\n")


def sources(reports: Sequence[EvalReport], *, several: bool) -> str:
    """Which file each row came from, and with which versions."""
    rows = []
    for report in reports:
        versions = report.values.get("versions")
        text = ", ".join(f"{name} {v}" for name, v in versions.items()) if isinstance(versions, dict) else ""
        seed = value_text(report.values["settings"].get("seed", ""))
        rows.append((_label(report, several), Mono(report.path), text, seed))
    return table(("model", "report", "versions", "seed"), rows)


def _by_task(reports: Sequence[EvalReport]) -> dict[str, list[EvalReport]]:
    groups: dict[str, list[EvalReport]] = {}
    for report in reports:
        groups.setdefault(report.task, []).append(report)
    return groups


def _label(report: EvalReport, several: bool) -> str:
    return f"{report.model}, {report.run}" if several and report.run else report.model


def _game_row(values: dict[str, Any]) -> tuple[str, ...]:
    over = values.get("moves_over_optimum")
    moves = "none solved" if over is None else f"{over:.2f}"
    return _share(values, "success"), moves, f"{values.get('invalid_answer_rate', 0):.1%}"


def _dialogue_row(values: dict[str, Any]) -> tuple[str, ...]:
    loss, perplexity = values["val/loss"], values.get("val/perplexity")
    return (
        "unknown" if loss is None else f"{loss:.6f}",
        "unknown" if perplexity is None else f"{perplexity:.4f}",
        _share(values, "well_formed"),
        "no question" if values.get("repeated_question_rate") is None else _share(values, "repeated_question"),
        str(values.get("answers", "unknown")),
    )


def _share(values: dict[str, Any], name: str) -> str:
    low, high = values[f"{name}_interval"]
    return f"{values[f'{name}_rate']:.1%} ({low:.1%} to {high:.1%})"


# Samples


def samples(run: Run, reports: Sequence[EvalReport], count: int) -> list[Block]:
    """What the base model and the fine-tuned one have answered to the same prompts."""
    blocks: list[Block] = []
    for members in _by_task([report for report in reports if report.run in (run.name, None)]).values():
        tuned = next((report for report in members if report.model == TUNED), None)
        before = next((report.rows() for report in members if report.model == BASE), [])
        if tuned is not None:
            blocks += _played(tuned.rows(), before, count) if tuned.is_game else _answered(tuned, before, count)
    return blocks


def _played(tuned: list[dict[str, Any]], base: list[dict[str, Any]], count: int) -> list[Block]:
    """A solved level and a failed one first, then the following ones."""
    episodes = [row for row in tuned if _is_conversation(row.get("messages"))]
    before = {_level(row): row for row in base if _is_conversation(row.get("messages"))}
    firsts = [next((row for row in episodes if bool(row.get("solved")) is solved), None) for solved in (True, False)]
    chosen = [row for row in firsts if row is not None]
    chosen += [row for row in episodes if row not in chosen]
    blocks: list[Block] = []
    for row in chosen[:count]:
        played = {BASE: before[_level(row)]} if _level(row) in before else {}
        answers = [
            (f"{name}: {_result(r)} in {r.get('turns')} answers", shortened("\n".join(_said(r, "assistant"))))
            for name, r in (played | {TUNED: row}).items()
        ]
        whole = "\n\n".join(f"{m['role']}:\n{m['content']}" for m in row["messages"])
        blocks += [
            heading(3, f"A level that the {TUNED} {_result(row)} (seed {row.get('seed')})"),
            fenced(shortened(next(iter(_said(row, "user")), ""))),
            side_by_side(answers),
            folded("The whole conversation", [fenced(shortened(whole, 5 * LONGEST))]),
        ]
    return blocks


def _result(row: dict[str, Any]) -> str:
    return "solved" if row.get("solved") else "failed"


def _level(row: dict[str, Any]) -> tuple[str, str]:
    return str(row.get("seed")), str(row.get("level"))


def _said(row: dict[str, Any], role: str) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == role]


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _answered(tuned: EvalReport, base: list[dict[str, Any]], count: int) -> list[Block]:
    rows = [row for row in tuned.rows() if isinstance(row.get("answer"), str) and type(row.get("row")) is int][:count]
    before = {row.get("row"): str(row.get("answer")) for row in base}
    texts = _prompts(tuned.values["settings"], max((row["row"] for row in rows), default=-1))
    blocks: list[Block] = []
    for row in rows:
        prompt, response = texts.get(row["row"], (None, None))
        answers = {BASE: before.get(row["row"]), TUNED: row["answer"], "the row's response": response}
        shown = [(name, shortened(text)) for name, text in answers.items() if text is not None]
        question = [fenced(shortened(prompt))] if prompt is not None else []
        blocks += [heading(3, f"Row {row['row']}"), *question, side_by_side(shown)]
    return blocks


def _prompts(settings: dict[str, Any], last: int) -> dict[int, tuple[str, str]]:
    """Row -> the last message of its prompt, and its response; empty if the file is not as it was."""
    from dsft.dataset.readers import find_files, read_columns, walk

    keys = ("prompt_key", "response_key")
    columns = [str(settings.get(key)) for key in keys]
    found: dict[int, tuple[str, str]] = {}
    try:
        files = find_files([str(settings["data"])], "data")
        for rows in read_columns(files, columns, keys, last + 1):
            for cell, (prompt, response) in rows:
                prompt = walk(prompt, settings.get("prompt_dict_keys"), cell, columns[0])
                response = walk(response, settings.get("response_dict_keys"), cell, columns[1])
                found[len(found)] = _last_message(prompt), _last_message(response)
    except (UserError, OSError, KeyError, TypeError):
        return {}
    return found


def _last_message(value: Any) -> str:
    """The text of a string, a message, or a list of messages."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text that fills no more than a page."""
    return text if len(text) <= longest else f"{text[:longest]}\n… ({len(text) - longest:,} more characters)"
