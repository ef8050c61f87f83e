"""Tokenized rows: made once per machine, kept in the cache folder, and memory-mapped by every rank."""

import copy
import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsft.cache import build_once
from dsft.config.flags import RowFlags
from dsft.dataset.chat_format import ChatFormat, RenderedRow, read_system_prompt
from dsft.dataset.messages import read_weight
from dsft.dataset.readers import Cell, Rows, read_batches
from dsft.dataset.row_format import SourceFiles, find_sources, formats_text, read_values
from dsft.dataset.token_files import ROW, Counts, PackedRows, Row, TokenWriter, pack_rows
from dsft.errors import UserError
from dsft.processes import parallel

CACHE_FORMAT = 5  # raise it when the same input would give other files
LEVEL = "extra_info.level"  # where dsft.generate writes it
OPTIONAL = ("input",)  # of Alpaca's columns
FIRST_BATCHES = 4  # of 1,024 rows, made into tokens before other processes are started, which takes seconds
MAX_PROCESSES = 32
OTHERS = ("sorted_place", "dialogue")
LEVEL_ID = re.compile("[0-9a-f]{16}")  # other datasets have a level there too, and mean a difficulty


@dataclass(frozen=True)
class SourceStatistics:
    """Rows of a source, and how often each is seen in an epoch."""

    name: str
    rows: int
    tokens: int
    targets: int
    weight: float

    def __str__(self) -> str:
        times = "" if self.weight == 1 else f", {self.weight:g} times per epoch"
        return f"{self.name}: {self.rows:,} rows, {self.tokens:,} tokens, {self.targets:,} targets{times}"


class TokenDataset:
    """Rows of token ids and loss masks in memory-mapped files; see token_files.

    tokens: int32 [all tokens], is_target: bool [all tokens]; including what truncation cut from the front of a row.
    rows: ROW [rows]; its fields are attributes too.
    sources: names of the sources of a mixture; one empty name if the rows are not told apart
    source: int32 [rows], index of each row's source
    source_weights: float64 [sources], how often a row of each is seen in an epoch
    """

    sorted_place: np.ndarray  # int64 [rows]
    dialogue: np.ndarray  # int64 [rows]

    def __init__(self, folder: Path, sources: Sequence[SourceFiles[Any]] = ()) -> None:
        """Args:
        folder: filled by a TokenWriter.
        sources: where the rows come from; without them there are no places, and one source without a name.
        """

        def mapped(name: str, kind: Any) -> np.ndarray:
            return np.asarray(np.memmap(folder / f"{name}.bin", kind, "r"))  # a plain view: indexing it is faster

        self.tokens, self.is_target = mapped("tokens", np.int32), mapped("is_target", bool)
        self.rows = mapped("rows", ROW)
        for name in OTHERS:
            setattr(self, name, np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")))
        self.counts = Counts(**json.loads((folder / "counts.json").read_text(encoding="utf-8")))
        self.files = [str(file) for part in sources for file in part.files]
        self.sources = [part.source.name for part in sources] or [""]
        self.source_weights = np.array([part.source.weight for part in sources] or [1.0])
        self._source_of_file = np.repeat(np.arange(len(sources), dtype=np.int32), [len(part.files) for part in sources])
        self.fingerprint = folder.name
        if (self.source_weights != 1).any():
            per_file = self.source_weights[self._source_of_file]
            self.fingerprint = hashlib.sha256(folder.name.encode() + per_file.tobytes()).hexdigest()[:32]
        self._name_fields()

    def _name_fields(self) -> None:
        self.starts, self.lengths, self.targets = (self.rows[name] for name in ("starts", "lengths", "targets"))
        self.weight, self.cut, self.level = (self.rows[name] for name in ("weight", "cut", "level"))
        self.row_hash, self.prompt_hash = self.rows["row_hash"], self.rows["prompt_hash"]
        self.source = np.broadcast_to(np.int32(0), len(self.rows))
        if len(self.sources) > 1:
            self.source = self._source_of_file[self.rows["file"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [length]) and is-target mask (bool [length]) of one row."""
        start = self.starts[row]
        span = slice(start, start + self.lengths[row])
        return self.tokens[span], self.is_target[span]

    def source_statistics(self) -> list["SourceStatistics"]:
        """Of each named source."""
        found = []
        for index, (name, weight) in enumerate(zip(self.sources, self.source_weights.tolist(), strict=True)):
            if name:
                of = self.source == index
                tokens, targets = int(self.lengths[of].sum()), int(self.targets[of].sum())
                found.append(SourceStatistics(name, int(of.sum()), tokens, targets, weight))
        return found

    @property
    def file_row(self) -> np.ndarray:
        """Equal for the rows that a row of the files became, int64 [rows]; above 0."""
        return (self.rows["file"].astype(np.int64) << 40) + self.rows["row_in_file"] + 1

    def prompt(self, row: int) -> np.ndarray:
        """Tokens before a row's first target, before truncation: int32 [length]."""
        start = self.starts[row] - self.rows["front"][row]
        return self.tokens[start : start + self.rows["prompt"][row]]

    def cell(self, row: int) -> Cell:
        """The file that a row comes from, and its row there."""
        return Cell(self.files[self.rows["file"][row]], int(self.rows["row_in_file"][row]))

    def place(self, row: int) -> str:
        """The same, in words; the row's index if the file is unknown."""
        return str(self.cell(row)) if self.files else f"row {row}"

    def subset(self, rows: np.ndarray) -> "TokenDataset":
        """Some of the rows, from the same mapped files.

        Rows dropped by truncation belong to no dialogue, so they stay in the counts. The fingerprint follows from that
        of this dataset and the rows; if those are all of them, it stays.

        Args:
            rows: int64 [rows], ascending, of whole dialogues: what a dialogue is depends on all its rows.
        """
        if len(rows) == len(self):
            return self
        chosen = copy.copy(self)
        for name in ("rows", *OTHERS):
            setattr(chosen, name, getattr(self, name)[rows])
        chosen._name_fields()
        assert np.isin(self.dialogue, chosen.dialogue).sum() == len(rows)
        chosen.counts = replace(
            self.counts,
            rows=len(rows),
            tokens=int(chosen.lengths.sum()),
            targets=int(chosen.targets.sum()),
            rows_cut=int(np.count_nonzero(chosen.cut)),
            tokens_cut=int(chosen.cut.sum()),
        )
        chosen.fingerprint = hashlib.sha256(self.fingerprint.encode() + b"\0" + rows.tobytes()).hexdigest()[:32]
        return chosen

    def without(self, rows: np.ndarray) -> "TokenDataset":
        """All rows but some; see `subset`."""
        return self.subset(np.setdiff1d(np.arange(len(self)), rows))


def load_dataset(
    names: Sequence[str],
    flag: str,
    tokenizer: PreTrainedTokenizerBase,
    flags: RowFlags,
    *,
    max_rows: int | None = None,
    show_progress: bool = False,
) -> TokenDataset:
    """The tokenized rows of files, from the cache if possible.

    Args:
        names: files, globs or folders, with names and weights of sources; see read_sources.
        flag: the flag's name, for messages.
        tokenizer: of the model.
        flags: columns, thinking, length and truncation.
        max_rows: the first N rows of each source only.
        show_progress: draw a progress bar if the output is a terminal.

    Raises:
        UserError: a fault in the files or their rows, with file and row.
    """
    sources = find_sources(names, flag, flags)

    def tokenize(folder: Path) -> None:
        counts, writer = Counts(format=formats_text(sources)), TokenWriter(folder)
        reader = RowReader(sources, tokenizer, max_rows)
        try:
            with (
                closing(reader.packed()) as batches,  # which ends the processes
                tqdm(unit=" rows", desc="tokenizing", disable=None if show_progress else True) as bar,
            ):
                for rows_of_file, packed, found in batches:
                    writer.add(packed)
                    counts.add(found)
                    bar.update(rows_of_file)
            if not writer.rows:
                remedy = f"raise max_length ({flags.max_length}) or change truncation ({flags.truncation})"
                if counts.rows_without_weight:
                    remedy = "give some answer a weight above 0, or change --learn"
                files = ", ".join(str(file) for part in sources for file in part.files)
                raise UserError(f"no row of {files} is left: {counts.losses()}; {remedy}")
            writer.finish(counts)
        finally:
            writer.close()

    key = _cache_key(sources, tokenizer, max_rows)
    return TokenDataset(build_once(f"tokens/{key}", tokenize), sources)


@dataclass(frozen=True)
class RowReader:
    """Makes rows of files into tokens: here, or after FIRST_BATCHES in several processes."""

    sources: Sequence[SourceFiles[RowFlags]]
    tokenizer: PreTrainedTokenizerBase
    max_rows: int | None

    def packed(self) -> Generator[tuple[int, PackedRows, Counts]]:
        """The rows in the order of the files, some at a time: how many of the files, and what became of them."""
        processes, made = min(len(os.sched_getaffinity(0)), MAX_PROCESSES), 0
        for made, batch in enumerate(self.every(0, 1, last=FIRST_BATCHES if processes > 1 else None), 1):  # noqa: B007
            yield batch
        if processes > 1 and made == FIRST_BATCHES:
            lost = "a tokenizing process was killed, possibly for lack of memory; free some and rerun"
            with parallel(self.every_after_the_first, processes, lost) as batches:
                yield from batches

    def every_after_the_first(self, number: int, processes: int) -> Iterator[tuple[int, PackedRows, Counts]]:
        """The body of a process."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each process would take all cores
        gc.set_threshold(200_000, 20, 100)  # rows are many small objects, none of which is part of a cycle
        return self.every(number, processes, first=FIRST_BATCHES)

    def every(
        self, number: int, processes: int, *, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, PackedRows, Counts]]:
        """Every n-th batch from the first on, made into tokens."""
        for make, chat_format, flags, index in islice(self._batches(), first + number, last, processes):
            rows = make()
            yield len(rows), *_make_tokens(rows, chat_format, flags, index)

    def _batches(self) -> Iterator[tuple[Callable[[], Rows], ChatFormat, RowFlags, dict[str, int]]]:
        """What makes some rows; how they become tokens; and the index of each file."""
        first = 0
        for part in self.sources:
            chat_format = ChatFormat.of(self.tokenizer, part.flags)
            index = {str(file): first + i for i, file in enumerate(part.files)}
            first += len(part.files)
            columns, names = part.flags.columns()
            columns, names = [*columns, LEVEL], [*names, "extra_info"]
            for _, make in read_batches(part.files, columns, names, self.max_rows, (*OPTIONAL, LEVEL)):
                yield make, chat_format, part.flags, index


def _make_tokens(
    rows: Rows, chat_format: ChatFormat, flags: RowFlags, index: dict[str, int]
) -> tuple[PackedRows, Counts]:
    counts, kept_rows = Counts(), []
    rendered = [render_row(cells[:-1], cell, chat_format, flags) for cell, cells in rows]
    for (cell, cells), one, found in zip(rows, rendered, chat_format.tokenize(rendered), strict=True):
        counts.conversations += flags.messages_key is not None
        counts.split_conversations += len(found) > 1
        counts.split_rows += len(found) if len(found) > 1 else 0
        counts.rows_without_weight += not found
        for key in one.ignored:
            counts.ignored[key] = counts.ignored.get(key, 0) + 1
        for row in found:
            kept = truncate_row(row.tokens, row.is_target, cell, flags, counts)
            if kept is None:
                continue
            cut = len(row.tokens) - len(kept[0])
            front = row.tokens[: cut if flags.truncation == "left" else 0]
            source, history = (index[cell.file], cell.row), row.history if len(found) > 1 else 0
            kept_rows.append(Row(*kept, front, cut, _level_number(cells[-1]), source, row.weight, history))
    return pack_rows(kept_rows), counts


def _cache_key(
    sources: Sequence[SourceFiles[RowFlags]], tokenizer: PreTrainedTokenizerBase, max_rows: int | None
) -> str:
    digest = hashlib.sha256()
    for file in (file for part in sources for file in part.files):
        try:
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; make it readable, or choose another") from error
    settings = [(_settings(part.flags), len(part.files)) for part in sources]
    parts = [CACHE_FORMAT, settings, max_rows, tokenizer_fingerprint(tokenizer)]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _settings(flags: RowFlags) -> dict[str, Any]:
    """The flags that decide a row's tokens."""
    settings = {flag.name: getattr(flags, flag.name) for flag in fields(RowFlags)}
    settings |= {name: list(settings[name] or ()) for name in ("prompt_dict_keys", "response_dict_keys")}
    return settings | {"system_prompt": read_system_prompt(flags)}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes whenever the tokenizer or its chat template would give other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    state = [rules, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(state).encode()).hexdigest()


def _level_number(level: Any) -> int:
    """The 64 bits of an environment's level_id; 0 for anything else."""
    return int(level, 16) if isinstance(level, str) and LEVEL_ID.fullmatch(level) else 0


def render_row(cells: tuple, cell: Cell, chat_format: ChatFormat, flags: RowFlags) -> RenderedRow:
    """The answers of a row, given the values of its columns.

    Raises:
        UserError: values of another kind than the flags say, with file and row.
    """
    values = dict(zip(flags.columns()[1], cells, strict=True))
    tools = values.get("tools_key")
    weight = read_weight(values["weight_key"], str(cell)) if "weight_key" in values else 1.0
    prompt, response = read_values(cells, cell, flags)
    if flags.messages_key is not None:
        return chat_format.conversation(prompt, cell, tools, weight)
    return chat_format.prompt_and_response(prompt, response, cell, tools, weight)


def truncate_row(
    tokens: np.ndarray, is_target: np.ndarray, cell: Cell, flags: RowFlags, counts: Counts
) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and mask within max_length, or None if the row is dropped; what that costs is added to `counts`.

    Raises:
        UserError: the row is too long, and nothing may be cut.
    """
    surplus = len(tokens) - flags.max_length
    if surplus <= 0:
        return tokens, is_target
    if flags.truncation == "error":
        raise UserError(
            f"{cell} has {len(tokens)} tokens, max_length is {flags.max_length}; raise --max_length, "
            "or choose --truncation left, right or drop"
        )
    kept = slice(0)
    if flags.truncation == "right":
        kept = slice(flags.max_length)
    elif flags.truncation == "left" and surplus < np.argmax(is_target):
        kept = slice(surplus, None)  # a token stays before the first target, to predict it
    if not is_target[kept][1:].any():
        counts.rows_dropped += 1
        counts.tokens_dropped += len(tokens)
        return None
    counts.rows_cut += 1
    counts.tokens_cut += surplus
    return tokens[kept], is_target[kept]
