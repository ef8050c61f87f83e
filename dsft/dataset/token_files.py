"""The files of a TokenDataset, written row by row: what is held does not grow with the tokens.

tokens.bin        int32 [all tokens], including what truncation cut from the front of a row
is_target.bin     bool [all tokens]
rows.bin          ROW [rows]
sorted_place.npy  int64 [rows], ascending along rows sorted by their tokens: neighbours share prefixes
dialogue.npy      int64 [rows], see folding.find_dialogues, before truncation; ascending along the sorted rows
counts.json       Counts
"""

import hashlib
import heapq
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dsft.dataset.folding import common_prefix, find_dialogues, sort_key

ROW = np.dtype(
    [
        ("starts", "<i8"),  # of a row's own tokens in tokens.bin
        ("lengths", "<i8"),
        ("front", "<i4"),  # tokens before them that truncation cut off
        ("cut", "<i4"),  # tokens that truncation removed
        ("prompt", "<i4"),  # tokens before the first target, with the front
        ("history", "<i4"),  # of these, how many identify a dialogue
        ("targets", "<i8"),
        ("weight", "<f8"),  # of each target in the loss
        ("row_hash", "<u8"),  # of tokens and mask
        ("prompt_hash", "<u8"),
        ("level", "<u8"),  # the environment's level of rows written by dsft.generate; otherwise 0
        ("file", "<i4"),  # index of the file that it comes from
        ("row_in_file", "<i8"),
    ]
)
RUN_TOKENS = 2**23  # that are sorted in memory at once
ROWS_AT_ONCE = 2**16


@dataclass
class Counts:
    """How many rows and tokens there are, and what became of those in the files.

    rows, tokens, targets: as trained on
    conversations: rows of the files with --messages_key
    split_conversations, split_rows: of these, how many became several rows, and how many rows
    rows_cut, tokens_cut, rows_dropped, tokens_dropped: by truncation
    rows_without_weight: rows of the files of which nothing is learned
    ignored: in how many rows of the files the chat template ignores a key of the messages
    format: of the rows in the files, in words
    """

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    conversations: int = 0
    split_conversations: int = 0
    split_rows: int = 0
    rows_cut: int = 0
    tokens_cut: int = 0
    rows_dropped: int = 0
    tokens_dropped: int = 0
    rows_without_weight: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    format: str = ""

    def add(self, other: "Counts") -> None:
        """Add the numbers of other rows."""
        for name in (f.name for f in fields(self) if f.type is int):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for key, rows in other.ignored.items():
            self.ignored[key] = self.ignored.get(key, 0) + rows

    def losses(self) -> str:
        """What is not learned, in words; empty if nothing."""
        parts = []
        if self.rows_without_weight:
            parts.append(f"{self.rows_without_weight} rows with nothing to learn")
        if self.rows_cut:
            parts.append(f"{self.rows_cut} rows cut by {self.tokens_cut} tokens")
        if self.rows_dropped:
            parts.append(f"{self.rows_dropped} rows dropped with {self.tokens_dropped} tokens")
        return ", ".join(parts)

    def conversations_text(self) -> str:
        """How conversations became rows; empty if there are none."""
        if not self.conversations:
            return ""
        if not self.split_conversations:
            return "each conversation is one sequence, because the chat template keeps its history"
        split = f"{self.split_conversations:,} of {self.conversations:,} conversations became {self.split_rows:,} rows"
        return f"{split}, because the chat template rewrites their history or their answers differ in weight"

    def ignored_text(self) -> str:
        """The ignored keys, in words; empty if there are none."""
        keys = ", ".join(f"{key} in {rows:,} row{'' if rows == 1 else 's'}" for key, rows in self.ignored.items())
        return f"the chat template ignores keys of the messages: {keys}" if keys else ""


class Row(NamedTuple):
    """A row about to be saved.

    tokens, is_target: int32 and bool [length]
    front: int32 [length], what truncation removed before `tokens`
    cut: tokens that truncation removed
    level: see ROW
    source: index of the file, and row in it
    weight: of its targets in the loss
    history: of `front` and `tokens`, how many precede the generation prompt, for finding dialogues; 0 stands for all
        that precede the first target
    """

    tokens: np.ndarray
    is_target: np.ndarray
    front: np.ndarray = np.empty(0, np.int32)
    cut: int = 0
    level: int = 0
    source: tuple[int, int] = (0, 0)
    weight: float = 1.0
    history: int = 0


class PackedRows(NamedTuple):
    """Rows as few arrays, to be sent from process to process; `rows` starts count from the first of `tokens`."""

    tokens: np.ndarray
    is_target: np.ndarray
    rows: np.ndarray


def pack_rows(rows: Sequence[Row]) -> PackedRows:
    """Rows in the order given."""
    records = np.zeros(len(rows), ROW)
    tokens, masks, start = [np.empty(0, np.int32)], [np.empty(0, bool)], 0
    for index, row in enumerate(rows):
        front = len(row.front)
        whole = np.concatenate([row.front, row.tokens]) if front else row.tokens
        mask = np.concatenate([np.zeros(front, bool), row.is_target]) if front else row.is_target
        prompt = max(1, int(np.argmax(mask)))
        hashes = _hash(row.tokens, row.is_target), _hash(whole[:prompt])
        sizes = len(row.tokens), front, row.cut, prompt, row.history or prompt, count_targets(row.is_target)
        records[index] = (start + front, *sizes, row.weight, *hashes, row.level, *row.source)
        tokens.append(whole)
        masks.append(mask)
        start += len(whole)
    return PackedRows(np.concatenate(tokens), np.concatenate(masks), records)


def _hash(*arrays: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return int.from_bytes(digest.digest())


def count_targets(is_target: np.ndarray) -> int:
    """Targets in one row's mask (bool [length]). A row's first token is never predicted, so it does not count."""
    return int(np.count_nonzero(is_target[1:]))


class TokenWriter:
    """Writes the files of a TokenDataset into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {
            name: open(folder / f"{name}.bin", "wb")  # noqa: SIM115 (close does it)
            for name in ("tokens", "is_target", "rows")
        }
        self._tokens = self.rows = 0

    def add(self, packed: PackedRows) -> None:
        """Append rows."""
        rows = packed.rows.copy()
        rows["starts"] += self._tokens
        for name, array in (("tokens", packed.tokens), ("is_target", packed.is_target), ("rows", rows)):
            array.tofile(self._files[name])
        self._tokens += len(packed.tokens)
        self.rows += len(rows)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def finish(self, counts: Counts) -> None:
        """Sort the rows, find dialogues, and write the rest; `counts` has what is not counted here."""
        self.close()
        columns = ("starts", "lengths", "front", "history", "targets")
        starts, lengths, front, history, targets = read_fields(self._folder / "rows.bin", columns)
        with open(self._folder / "tokens.bin", "rb") as file:
            order, shared = sort_rows_of_file(file, starts, lengths)
            np.save(self._folder / "sorted_place.npy", np.argsort(order))
            if front.any():
                order, shared = sort_rows_of_file(file, starts - front, lengths + front)
        np.save(self._folder / "dialogue.npy", find_dialogues(history, order, shared))
        counts = replace(counts, rows=len(starts), tokens=int(lengths.sum()), targets=int(targets.sum()))
        (self._folder / "counts.json").write_text(json.dumps(asdict(counts)), encoding="utf-8")


def read_fields(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Some fields of all rows in a rows.bin, each [rows], without reading it into memory as a whole."""
    parts: list[list[np.ndarray]] = [[] for _ in names]
    with open(file, "rb") as opened:
        while len(rows := np.fromfile(opened, ROW, ROWS_AT_ONCE)):
            for part, name in zip(parts, names, strict=True):
                part.append(rows[name].copy())
    return [np.concatenate(part) for part in parts]


def save_rows(folder: Path, rows: Sequence[Row], counts: Counts) -> None:
    """Write the files of a TokenDataset with these rows; see TokenWriter.finish."""
    writer = TokenWriter(folder)
    writer.add(pack_rows(rows))
    writer.finish(counts)


def sort_rows_of_file(file: BinaryIO, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows by their tokens (int32) in a file, of which a part is in memory at a time: an external merge sort.

    Args:
        file: tokens.bin.
        starts, lengths: int64 [rows].

    Returns:
        The indices that sort the rows, and the length of the prefix that each of them, in that order, shares with the
        one before it (0 for the first), both int64 [rows].
    """
    number = file.fileno()

    def read(row: int) -> np.ndarray:
        return np.frombuffer(os.pread(number, 4 * int(lengths[row]), 4 * int(starts[row])), "<i4")

    runs = (np.cumsum(lengths) - 1) // RUN_TOKENS
    sorted_runs = []
    for rows in np.split(np.arange(len(starts)), np.flatnonzero(np.diff(runs)) + 1):
        first, last = int(starts[rows[0]]), int(starts[rows[-1]] + lengths[rows[-1]])
        whole = sort_key(np.frombuffer(os.pread(number, 4 * (last - first), 4 * first), "<i4"))
        begins = 4 * (starts[rows] - first)
        keys = [whole[a:b] for a, b in zip(begins.tolist(), (begins + 4 * lengths[rows]).tolist(), strict=True)]
        sorted_runs.append(rows[sorted(range(len(rows)), key=keys.__getitem__)])

    def keyed(rows: np.ndarray) -> Iterator[tuple[bytes, int]]:
        return ((sort_key(read(row)), row) for row in rows.tolist())

    order, shared = np.empty(len(starts), np.int64), np.zeros(len(starts), np.int64)
    before = b""
    for place, (key, row) in enumerate(heapq.merge(*map(keyed, sorted_runs))):
        order[place] = row
        shared[place] = common_prefix(np.frombuffer(before, ">u4"), np.frombuffer(key, ">u4"))
        before = key
    return order, shared
