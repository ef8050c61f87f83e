"""Which rows would train and which validate, and what stands on both sides: as lines of a preview."""

from dataclasses import dataclass, field

import numpy as np

from dsft.config import PreviewConfig
from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.leaks import find_leaks, separate
from dsft.dataset.tokens import TokenDataset
from dsft.errors import UserError
from dsft.previewing.loading import Loaded
from dsft.previewing.row_checks import Finding

HEAD, TAIL = 40, 25  # characters of an example's text
NO_LEAK = "no validation row shares its text, prompt, dialogue or level with a training row"


@dataclass
class Sides:
    """The rows that train and those that validate.

    train, val: None where there are none, or training would refuse them
    train_lengths, val_lengths: tokens of these rows before truncation, and of those that it drops, int64 [rows]; None
        where they cannot be known
    findings: what stands on both sides, or what was done about it
    moved: places of the rows of --train_files that do not train, int64 [rows]
    """

    train: TokenDataset | None
    val: TokenDataset | None
    train_lengths: np.ndarray | None = None
    val_lengths: np.ndarray | None = None
    findings: list[Finding] = field(default_factory=list)
    moved: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def has_moved(self, whole: TokenDataset) -> np.ndarray:
        """Which of all rows of --train_files do not train: bool [rows]."""
        return np.isin(_places(whole), self.moved)


def part(train: Loaded, val: Loaded | None, config: PreviewConfig, chat_format: ChatFormat) -> Sides:
    """Part the rows as the Trainer does by --val_fraction and --on_leak.

    Where training would refuse some for another reason, such as their length, the whole rows are looked at instead.

    Args:
        train: rows of --train_files.
        val: rows of --val_files, if any.
        config: the flags.
        chat_format: of the run, for the examples.
    """
    sides = Sides(train.data, val.data if val else None)
    if train.whole is not None:
        sides.train_lengths = train.whole.lengths
    if val is not None and val.whole is not None:
        sides.val_lengths = val.whole.lengths
    before, other = sides.train, sides.val
    is_refused = before is None or (val is not None and other is None)
    if is_refused:
        before, other = train.whole, val.whole if val else None
    if before is None or (other is None and config.val_fraction is None):
        return sides
    if other is not None and config.on_leak in ("warn", "error"):
        sides.findings = leak_findings(before, other, config, chat_format)
        return sides
    name = "split" if config.val_fraction is not None else "leaks"
    try:
        separation = separate(before, other, config, warn=lambda line: None)
    except UserError as error:
        sides.findings = [Finding("refused", name, str(error))]
        return sides
    after, validating = separation.apply(before, other)
    assert validating is not None
    if config.val_fraction is not None:
        text = f"--val_fraction {config.val_fraction:g} splits off {len(validating):,} of {len(before):,} rows"
    elif config.on_leak == "ignore":
        text = "--on_leak ignore looks for none"
    else:
        text = separation.text or NO_LEAK
    sides.findings = [Finding("ok", name, text)]
    if is_refused or train.whole is None:
        return sides
    sides.train, sides.val = after, validating
    sides.moved = np.setdiff1d(_places(before), _places(after))
    moved = sides.has_moved(train.whole)
    sides.train_lengths = train.whole.lengths[~moved]
    if other is None:
        sides.val_lengths = train.whole.lengths[moved]
    elif val is not None and val.whole is not None:
        dropped = np.setdiff1d(_places(other), _places(validating))
        sides.val_lengths = val.whole.lengths[~np.isin(_places(val.whole), dropped)]
    return sides


def _places(data: TokenDataset) -> np.ndarray:
    """Where rows come from, a number each: int64 [rows]."""
    return (data.source[:, 0] << 40) + data.source[:, 1]


def leak_findings(
    train: TokenDataset, val: TokenDataset, config: PreviewConfig, chat_format: ChatFormat
) -> list[Finding]:
    """A line for each kind of leak that has rows of which no line before tells: a copied row copies its prompt too."""
    leaks = find_leaks(train, val)
    remedy = "--on_leak drop_val or drop_train leaves them out"
    told = np.empty(0, np.int64)
    findings = []
    for name, matches, relation in (
        ("row", leaks.rows, "are copies of training rows"),
        ("prompt", leaks.prompts, "have the prompt of a training row"),
        ("dialogue", leaks.dialogues, f"are of {_count(leaks.dialogues.distinct, 'dialogue')} of training rows"),
        ("level", leaks.levels, f"are of {_count(leaks.levels.distinct, 'level')} of training rows"),
    ):
        new = ~np.isin(matches.val, told)
        if not new.any():
            continue
        told = np.union1d(told, matches.val)
        first = int(np.argmax(new))
        val_row, train_row = int(matches.val[first]), int(matches.train[first])
        text = (
            f"{len(matches):,} of {len(val):,} validation rows {relation}, e.g. {val.place(val_row)} and "
            f"{train.place(train_row)}, {_question(val, val_row, chat_format)}; {remedy}"
        )
        findings.append(Finding("refused" if config.on_leak == "error" else "warning", f"leak by {name}", text))
    return findings or [Finding("ok", "leaks", NO_LEAK)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number > 1 else ''}"


def _question(data: TokenDataset, row: int, chat_format: ChatFormat) -> str:
    """The last turn before a row's first answer, without its middle."""
    tokens = data.prompt(row)
    turns = np.flatnonzero(tokens == chat_format.end_of_turn)
    if len(turns):
        tokens = tokens[turns[-2] + 1 if len(turns) > 1 else 0 : turns[-1]]
    text = chat_format.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    assert isinstance(text, str)
    text = " ".join(text.split())
    return repr(text if len(text) <= HEAD + TAIL else f"{text[:HEAD].rstrip()} … {text[-TAIL:].lstrip()}")
