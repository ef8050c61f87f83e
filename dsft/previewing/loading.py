"""The rows of a preview: as they are in the files, tokenized, and separated as training separates them."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from dsft.config import PreviewConfig
from dsft.dataset.chat_format import ChatFormat
from dsft.dataset.leaks import Leaks, separate
from dsft.dataset.readers import read_columns
from dsft.dataset.row_format import find_sources
from dsft.dataset.tokens import OPTIONAL, TokenDataset, load_dataset, render_row
from dsft.errors import UserError
from dsft.previewing.row_checks import Finding, Scan, excerpt
from dsft.previewing.template_checks import ChatTemplate

NO_LIMIT = 2**31 - 1
NO_LEAK = "no validation row shares its text, prompt, dialogue or level with a training row"


@dataclass
class LoadedSet:
    """The rows of --train_files or --val_files.

    label: before the names of findings
    scan: of their text
    whole: before truncation; None where they cannot be read
    data: as trained on; None where training would refuse them
    error: why there is no `whole` or no `data`
    """

    label: str
    scan: Scan
    whole: TokenDataset | None = None
    data: TokenDataset | None = None
    error: str = ""

    @property
    def side(self) -> "Side | None":
        """What training takes, unless it separates the rows."""
        return None if self.data is None or self.whole is None else Side(self.data, self.whole.lengths)


def load_set(config: PreviewConfig, flag: str, chat_format: ChatFormat, template: ChatTemplate) -> LoadedSet:
    """The rows of a flag, train_files or val_files, as far as they can be read.

    Raises:
        UserError: there are no such files, or their format does not go with the flags.
    """
    is_train = flag == "train_files"
    names = (config.train_files if is_train else config.val_files) or []
    max_rows = config.max_train_rows if is_train else config.max_val_rows
    sources = find_sources(names, flag, config)
    scan = Scan(config, template.source, template.user_header, template.end_of_turn)
    loaded = LoadedSet("" if is_train else "val: ", scan)

    def tokenize(flags: PreviewConfig) -> TokenDataset | None:
        try:
            return load_dataset(names, flag, chat_format.tokenizer, flags, max_rows=max_rows, show_progress=True)
        except UserError as error:
            loaded.error = loaded.error or str(error)
            return None

    loaded.data = loaded.whole = tokenize(config)
    if loaded.data is None or loaded.data.counts.losses():
        loaded.whole = tokenize(replace(config, max_length=NO_LIMIT, truncation="error"))
    try:
        for part in sources:
            own_format = ChatFormat.of(chat_format.tokenizer, part.flags)
            for chunk in read_columns(part.files, *part.flags.columns(), max_rows, OPTIONAL):
                for cell, values in chunk:
                    make = partial(render_row, values, cell, own_format, part.flags)
                    scan.see(values, cell, part.flags, make if loaded.whole is None else None)
    except UserError as error:
        loaded.error = loaded.error or str(error)
    return loaded


class Side(NamedTuple):
    """Rows that train or validate, and their lengths before truncation, with those that it drops (int64 [rows])."""

    data: TokenDataset
    lengths: np.ndarray


@dataclass
class SeparatedSets:
    """The rows of a run; None where there are none, or training would refuse them.

    findings: what leaks, or what was done about it
    left_out: which rows of --train_files do not train, bool [rows]; None where all do
    """

    train: Side | None
    val: Side | None
    findings: list[Finding] = field(default_factory=list)
    left_out: np.ndarray | None = None


def separate_sets(
    train: LoadedSet, val: LoadedSet | None, config: PreviewConfig, chat_format: ChatFormat
) -> SeparatedSets:
    """Separate the rows as training does by --val_fraction and --on_leak.

    Where training would refuse rows for another reason, such as their length, the whole rows are searched for leaks.
    """
    sets = SeparatedSets(train.side, val.side if val else None)
    is_usable = sets.train is not None and (val is None or sets.val is not None)
    data, other = ((loaded.data if is_usable else loaded.whole) if loaded else None for loaded in (train, val))
    if data is None or (other is None and config.val_fraction is None):
        return sets
    # Training would end at --on_leak error; here every kind of leak is reported.
    flags = replace(config, on_leak="warn") if config.on_leak == "error" else config
    try:
        separation = separate(data, other, flags, warn=lambda _: None)
    except UserError as error:
        sets.findings = [Finding("refused", "leaks" if config.val_fraction is None else "split", str(error))]
        return sets
    split, leaks = separation.split, separation.leaks
    if split is not None:
        text = f"--val_fraction {config.val_fraction:g} splits off {len(split):,} of {len(data):,} rows"
        sets.findings = [Finding("ok", "split", text)]
    elif leaks and other is not None and not separation.text:
        sets.findings = leak_findings(leaks, data, other, config, chat_format)
    else:
        text = separation.text or (NO_LEAK if leaks is not None else "not searched with --on_leak ignore")
        sets.findings = [Finding("ok", "leaks", text)]
    if is_usable and train.whole is not None:
        kept, validating = separation.apply(data, other)
        sets.left_out = _rows_of(train.whole, data, separation.drop_train if split is None else split)
        sets.train = Side(kept, train.whole.lengths[~sets.left_out])
        if split is not None and validating is not None:
            sets.val = Side(validating, train.whole.lengths[sets.left_out])
        elif val is not None and val.whole is not None and other is not None and validating is not None:
            sets.val = Side(validating, val.whole.lengths[~_rows_of(val.whole, other, separation.drop_val)])
    return sets


def _rows_of(whole: TokenDataset, data: TokenDataset, rows: np.ndarray) -> np.ndarray:
    """Which of the whole rows are these of `data`, from which truncation may have dropped some: bool [rows]."""
    return np.isin(whole.file_row, data.file_row[rows])


def leak_findings(
    leaks: Leaks, train: TokenDataset, val: TokenDataset, config: PreviewConfig, chat_format: ChatFormat
) -> list[Finding]:
    """One for each kind of leak with rows that none before it has: a copied row has the same prompt too."""
    reported = np.empty(0, np.int64)
    findings = []
    for name, matches in leaks.kinds().items():
        new = ~np.isin(matches.val, reported)
        if not new.any():
            continue
        reported = np.union1d(reported, matches.val)
        first = int(np.argmax(new))
        val_row, train_row = int(matches.val[first]), int(matches.train[first])
        shared = f"share {matches.distinct:,} {name}{'s' if matches.distinct > 1 else ''} with training rows"
        relation = {"row": "are copies of training rows", "prompt": "have the prompt of a training row"}.get(
            name, shared
        )
        text = (
            f"{len(matches):,} of {len(val):,} validation rows {relation}, e.g. {val.place(val_row)} and "
            f"{train.place(train_row)}, {_question(val, val_row, chat_format)}; "
            "drop them with --on_leak drop_val or drop_train"
        )
        findings.append(Finding("refused" if config.on_leak == "error" else "warning", f"leak by {name}", text))
    return findings


def _question(data: TokenDataset, row: int, chat_format: ChatFormat) -> str:
    """The last turn before a row's first answer, without its middle."""
    tokens = data.prompt(row)
    turns = np.flatnonzero(tokens == chat_format.end_of_turn)
    if len(turns):
        tokens = tokens[turns[-2] + 1 if len(turns) > 1 else 0 : turns[-1]]
    text = str(chat_format.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
    return excerpt(" ".join(text.split()))
