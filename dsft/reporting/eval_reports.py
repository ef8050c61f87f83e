"""What dsft.validate has found: reports of players and models, in tables, and answers before and after training."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.errors import UserError
from dsft.reporting.document import Beside, Block, Folded, Heading, Lines, Mono, Table, Text, aligned
from dsft.reporting.runs import Run, listed

BASE, TUNED = "base model", "fine-tuned model"
WITHOUT_WEIGHTS = ("expert", "random")
PLAYERS = (BASE, TUNED, *WITHOUT_WEIGHTS)
GAME_HEADER = ("player", "success rate (95 % interval)", "moves over optimum", "invalid answers")
DIALOGUE_HEADER = ("model", "val/loss", "perplexity", "well formed (95 % interval)", "repeated questions", "answers")
PLACES = (".", "validate")  # in a run's or a pipeline's folder
LONGEST = 4000  # characters of an answer; one that never ends would fill the page


@dataclass(frozen=True)
class Judgement:
    """One report of dsft.validate.

    player: a fine-tuned model, its base model, expert, random, or a model's name
    run: the name of the run it belongs to; nothing where it is every run's
    path: of the report
    report: what stands in it
    """

    player: str
    run: str | None
    path: Path
    report: dict[str, Any]

    @property
    def is_game(self) -> bool:
        """A game was played; else dialogues were answered."""
        return "success_rate" in self.report

    @property
    def task(self) -> str:
        """What was played or answered, for a heading."""
        settings = self.report["settings"]
        return str(settings.get("env")) if self.is_game else str(settings.get("data"))

    def rows(self) -> list[dict[str, Any]]:
        """All episodes or answered rows, from the file beside the report; none where it cannot be read."""
        try:
            text = self.path.with_suffix(".jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.split("\n") if line]  # an answer may hold what splitlines cuts at
        except (OSError, ValueError):
            return []
        return [row for row in rows if isinstance(row, dict)]


def find_judgements(runs: Sequence[Run], more: Sequence[str]) -> list[Judgement]:
    """The reports in the runs' folders, and those that a user has named.

    Args:
        runs: whose folders are looked through.
        more: paths of further reports.

    Raises:
        UserError: one of `more` is no report of dsft.validate.
    """
    found: dict[Path, Judgement] = {}
    for run in runs:
        folders = [run.root / place for place in PLACES]
        paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.json"))]
        for path in paths:
            report = _read(path)
            if report is not None:
                found.setdefault(path.resolve(), Judgement(_player(report, [run]), run.name, path, report))
    for name in more:
        path = Path(os.path.expanduser(name))
        report = _read(path)
        if report is None:
            raise UserError(f"--judgements {name}: no report of dsft.validate; name the .json file that it wrote")
        owners = [run.name for run in runs if _is_tuned(report, run)]
        run_name = owners[0] if owners else None
        found.setdefault(path.resolve(), Judgement(_player(report, runs), run_name, path, report))
    order = {player: place for place, player in enumerate(PLAYERS)}
    return sorted(found.values(), key=lambda judgement: order.get(judgement.player, len(order)))


def _read(path: Path) -> dict[str, Any] | None:
    """A report of dsft.validate, or None where the file is something else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict) or "model" not in report:
        return None
    is_game = _is_share(report, "success") and type(report.get("episodes")) is int
    is_game = is_game and _are_numbers(report.get("invalid_answer_rate", 0), report.get("moves_over_optimum") or 0)
    is_dialogues = _is_share(report, "well_formed") and "val/loss" in report
    is_dialogues = is_dialogues and _are_numbers(report["val/loss"] or 0, report.get("val/perplexity") or 0)
    return report if is_game or is_dialogues else None


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _is_share(report: dict[str, Any], name: str) -> bool:
    interval = report.get(f"{name}_interval")
    bounds = interval if isinstance(interval, list) and len(interval) == 2 else [None]
    return _are_numbers(report.get(f"{name}_rate"), *bounds)


def _player(report: dict[str, Any], runs: Sequence[Run]) -> str:
    if any(_is_tuned(report, run) for run in runs):
        return TUNED
    bases = {str(run.flags.get("model")) for run in runs}
    return BASE if report.get("adapter") is None and str(report["model"]) in bases else str(report["model"])


def _is_tuned(report: dict[str, Any], run: Run) -> bool:
    """Whether the model, or its adapter, stands in the run's folder, or did where that stood when it was trained."""
    # Read from within the run's folder, a name that is no path would be one below it.
    if report.get("adapter") is None and report["model"] in (*WITHOUT_WEIGHTS, run.flags.get("model")):
        return False
    path = _absolute(report.get("adapter") or report["model"])
    homes = {_absolute(run.root), _absolute(run.folder)}
    if run.flags.get("output_dir"):
        trained = _absolute(run.flags["output_dir"])
        homes.add(trained.parent if run.is_pipeline else trained)
    return any(home == path or home in path.parents for home in homes)


def _absolute(path: Any) -> Path:
    return Path(os.path.expanduser(str(path))).resolve()


# Tables


def tables(judgements: Sequence[Judgement], *, several: bool) -> list[Block]:
    """A table for each game and each set of dialogues.

    Args:
        judgements: in the order of the rows.
        several: there are several runs, so each row names its own.
    """
    blocks: list[Block] = []
    for task, members in _by_task(judgements).items():
        is_game = members[0].is_game
        make_row = _game_row if is_game else _dialogue_row
        rows = [make_row(_label(judgement, several), judgement.report) for judgement in members]
        blocks.append(Heading(2, f"Results: {task}"))
        blocks.append(Table(GAME_HEADER if is_game else DIALOGUE_HEADER, rows, right=range(1, len(rows[0]))))
        if is_game:
            counts = sorted({judgement.report["episodes"] for judgement in members})
            levels = " or ".join(map(str, counts))
            blocks.append(Text(f"Each player met {levels} levels. Moves over optimum: on solved levels, moves beyond "
                               "the fewest possible ones."))  # fmt: skip
    return blocks


def _by_task(judgements: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    groups: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        groups.setdefault(judgement.task, []).append(judgement)
    return groups


def _label(judgement: Judgement, several: bool) -> str:
    return f"{judgement.player}, {judgement.run}" if several and judgement.run else judgement.player


def _game_row(player: str, report: dict[str, Any]) -> tuple[str, ...]:
    over = report.get("moves_over_optimum")
    return (
        player,
        _share(report, "success"),
        "none solved" if over is None else f"{over:.2f}",
        f"{report.get('invalid_answer_rate', 0):.1%}",
    )


def _dialogue_row(model: str, report: dict[str, Any]) -> tuple[str, ...]:
    loss, perplexity = report.get("val/loss"), report.get("val/perplexity")
    return (
        model,
        "unknown" if loss is None else f"{loss:.6f}",
        "unknown" if perplexity is None else f"{perplexity:.4f}",
        _share(report, "well_formed"),
        _share(report, "repeated_question") if _is_share(report, "repeated_question") else "no question",
        str(report.get("answers", "unknown")),
    )


def _share(report: dict[str, Any], name: str) -> str:
    low, high = report[f"{name}_interval"]
    return f"{report[f'{name}_rate']:.1%} ({low:.1%} to {high:.1%})"


def game_lines(judgements: Sequence[Judgement]) -> list[str]:
    """The table of players, for a console."""
    return aligned(GAME_HEADER, [_game_row(j.player, j.report) for j in judgements if j.is_game])


# Samples


def samples(run: Run, judgements: Sequence[Judgement], count: int) -> list[Block]:
    """What the base model and the fine-tuned one have answered to the same prompts."""
    own = [judgement for judgement in judgements if judgement.run in (run.name, None)]
    blocks: list[Block] = []
    for members in _by_task(own).values():
        tuned = next((judgement for judgement in members if judgement.player == TUNED), None)
        base = next((judgement for judgement in members if judgement.player == BASE), None)
        if tuned is not None:
            blocks += _played(tuned, base, count) if tuned.is_game else _answered(tuned, base, count)
    return blocks


def _played(tuned: Judgement, base: Judgement | None, count: int) -> list[Block]:
    """A solved level and a failed one first, then the following ones."""
    episodes = [row for row in tuned.rows() if _is_conversation(row.get("messages"))]
    before = {_level(row): row for row in (base.rows() if base else []) if _is_conversation(row.get("messages"))}
    firsts = [next((row for row in episodes if bool(row.get("solved")) is solved), None) for solved in (True, False)]
    chosen = [row for row in firsts if row is not None]
    chosen += [row for row in episodes if row not in chosen][: max(0, count - len(chosen))]
    blocks: list[Block] = []
    for row in chosen[:count]:
        came = "solved" if row.get("solved") else "failed"
        blocks.append(Heading(3, f"One level that the {TUNED} {came} (seed {row.get('seed')})"))
        start = next((m["content"] for m in row["messages"] if m["role"] == "user"), "")
        blocks.append(Lines(shortened(start)))
        players = [(TUNED, row)] if _level(row) not in before else [(BASE, before[_level(row)]), (TUNED, row)]
        answers = [
            (f"{name}: {'solved' if r.get('solved') else 'failed'} in {r.get('turns')} answers", _own_words(r))
            for name, r in players
        ]
        whole = "\n\n".join(f"{m['role']}:\n{m['content']}" for m in row["messages"])
        blocks += [Beside(answers), Folded("The whole conversation", [Lines(shortened(whole, 5 * LONGEST))])]
    return blocks


def _level(row: dict[str, Any]) -> tuple[str, str]:
    return str(row.get("seed")), str(row.get("level"))


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _own_words(row: dict[str, Any]) -> str:
    return shortened("\n".join(m["content"] for m in row["messages"] if m["role"] == "assistant"))


def _answered(tuned: Judgement, base: Judgement | None, count: int) -> list[Block]:
    rows = [row for row in tuned.rows() if isinstance(row.get("answer"), str) and type(row.get("row")) is int]
    before = {row.get("row"): str(row.get("answer")) for row in (base.rows() if base else [])}
    chosen = rows[:count]
    texts = _prompts(tuned.report["settings"], max((row["row"] for row in chosen), default=-1))
    blocks: list[Block] = []
    for row in chosen:
        number = row["row"]
        blocks.append(Heading(3, f"Row {number}"))
        if number in texts:
            prompt, response = texts[number]
            blocks.append(Lines(shortened(prompt)))
        answers = [(BASE, before[number])] if number in before else []
        answers += [(TUNED, row["answer"])]
        answers += [("the row's response", response)] if number in texts else []
        blocks.append(Beside([(name, shortened(text)) for name, text in answers]))
    return blocks


def _prompts(settings: dict[str, Any], last: int) -> dict[int, tuple[str, str]]:
    """Row -> last words of its prompt, and its response; empty where the file is not as it was."""
    from dsft.dataset.readers import find_files, read_columns, walk

    columns = [str(settings.get("prompt_key")), str(settings.get("response_key"))]
    found: dict[int, tuple[str, str]] = {}
    if last < 0:
        return found
    try:
        files = find_files([str(settings["data"])], "data")
        for rows in read_columns(files, columns, ["prompt_key", "response_key"], last + 1):
            for cell, (prompt, response) in rows:
                prompt = walk(prompt, settings.get("prompt_dict_keys"), cell, columns[0])
                response = walk(response, settings.get("response_dict_keys"), cell, columns[1])
                found[len(found)] = _last_words(prompt), _last_words(response)
    except (UserError, OSError, KeyError, TypeError):
        return {}
    return found


def _last_words(value: Any) -> str:
    """Of a string, a message, or a list of them."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text that fills no more than a page."""
    return text if len(text) <= longest else f"{text[:longest]}\n… ({len(text) - longest:,} more characters)"


def sources(judgements: Sequence[Judgement], *, several: bool) -> Table:
    """Which report each row came from, and with which versions."""
    rows = [
        (
            _label(judgement, several),
            Mono(judgement.path),
            ", ".join(f"{name} {number}" for name, number in _versions(judgement.report).items()),
            listed(judgement.report["settings"].get("seed", "")),
        )
        for judgement in judgements
    ]
    return Table(("player", "report", "versions", "seed"), rows)


def _versions(report: dict[str, Any]) -> dict[str, Any]:
    versions = report.get("versions")
    return versions if isinstance(versions, dict) else {}
