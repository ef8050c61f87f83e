"""Tokenised rows: made once on a machine, kept in the cache folder, mapped into memory by every rank."""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsft.cache import build_once
from dsft.dataset.chat_format import ChatFormat, Segment
from dsft.dataset.folding import find_dialogues, sort_rows
from dsft.dataset.readers import Cell, find_files, read_columns, read_field, walk
from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.config.flags import RowFlags

CACHE_FORMAT = 3  # raise it when the same input would give other files
LEVEL_COLUMN, LEVEL_FIELD = "extra_info", "level"  # where dsft.generate writes it
LEVEL_ID = re.compile("[0-9a-f]{16}")  # other sets have a level there too, and mean a difficulty
Truncation = Literal["error", "left", "right", "drop"]


@dataclass(frozen=True)
class DataFormat:
    """Where a row's text stands in the parquet, and how long it may be."""

    prompt_key: str = "prompt"
    response_key: str = "response"
    messages_key: str | None = None
    prompt_dict_keys: tuple[str, ...] = ()
    response_dict_keys: tuple[str, ...] = ()
    with_thinking: bool = False
    max_length: int = 2048
    truncation: Truncation = "error"

    @classmethod
    def from_flags(cls, flags: "RowFlags") -> "DataFormat":
        """As the flags say."""
        return cls(
            flags.prompt_key,
            flags.response_key,
            flags.messages_key,
            tuple(flags.prompt_dict_keys or ()),
            tuple(flags.response_dict_keys or ()),
            flags.with_thinking,
            flags.max_length,
            flags.truncation,
        )

    def columns(self) -> tuple[list[str], list[str]]:
        """The columns that are read, and the flag that names each."""
        if self.messages_key is not None:
            return [self.messages_key], ["messages_key"]
        return [self.prompt_key, self.response_key], ["prompt_key", "response_key"]


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    rows_cut: int = 0
    tokens_cut: int = 0
    rows_dropped: int = 0
    tokens_dropped: int = 0

    def losses(self) -> str:
        """What truncation cost, in words; empty where it cost nothing."""
        parts = []
        if self.rows_cut:
            parts.append(f"{self.rows_cut} rows cut by {self.tokens_cut} tokens")
        if self.rows_dropped:
            parts.append(f"{self.rows_dropped} rows dropped with {self.tokens_dropped} tokens")
        return ", ".join(parts)


class TokenDataset:
    """Rows of token ids and target masks, read from memory-mapped files.

    tokens: int32 [all tokens], is_target: bool [all tokens]; what truncation cut from a row's front stands there too
    starts, ends: int64 [rows], where a row's own tokens stand in them
    targets: int64 [rows]
    sorted_place: int64 [rows], grows along rows that are sorted by their tokens: neighbours share beginnings
    dialogue: int64 [rows], the same number for rows of one dialogue, see dsft.dataset.folding.find_dialogues; of rows
        as they were before truncation cut their fronts. Numbers grow along rows sorted by their tokens.

    What only the search for leaks reads, mapped as well:

    cut: int64 [rows], tokens that truncation took
    prompt_starts, prompt_ends: int64 [rows], where the prompt stands in `tokens`, its cut front included
    row_hash, prompt_hash: uint64 [rows], of tokens and mask, and of the prompt
    level: uint64 [rows], the environment level of rows that dsft.generate has made; 0 where there is none
    source: int64 [rows, 2], index of the file among `files`, row in it
    """

    starts: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    sorted_place: np.ndarray
    dialogue: np.ndarray
    cut: np.ndarray
    prompt_starts: np.ndarray
    prompt_ends: np.ndarray
    row_hash: np.ndarray
    prompt_hash: np.ndarray
    level: np.ndarray
    source: np.ndarray

    def __init__(self, folder: Path, files: Sequence[Path] = ()) -> None:
        """Args:
        folder: what `save_rows` has filled.
        files: that the rows come from, for `place`.
        """
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.is_target = np.load(folder / "is_target.npy", mmap_mode="r")
        for name in READ_ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy"))
        for name in MAPPED_ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))
        self.counts = Counts(**json.loads((folder / "counts.json").read_text(encoding="utf-8")))
        self.fingerprint = folder.name
        self.files = [str(file) for file in files]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [length]) and is-target mask (bool [length]) of one row."""
        span = slice(self.starts[row], self.ends[row])
        return self.tokens[span], self.is_target[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, int64 [rows]."""
        return self.ends - self.starts

    def prompt(self, row: int) -> np.ndarray:
        """Tokens before a row's first target, as they were before truncation: int32 [length]."""
        return self.tokens[self.prompt_starts[row] : self.prompt_ends[row]]

    def place(self, row: int) -> str:
        """Where a row comes from: file and row in it; its index where the file is not known."""
        file, row_in_file = self.source[row].tolist()
        return str(Cell(self.files[file], row_in_file)) if self.files else f"row {row}"

    def subset(self, rows: np.ndarray) -> "TokenDataset":
        """Some of the rows, read from the same mapped files.

        Rows that truncation dropped are no dialogue's, so they stay in the counts. The fingerprint follows from that of
        this dataset and the rows; where those are all of them, it stays.

        Args:
            rows: int64 [rows], ascending, of whole dialogues: what a dialogue is depends on all its rows.
        """
        if len(rows) == len(self):
            return self
        chosen = copy.copy(self)
        for name in (*READ_ARRAYS, *MAPPED_ARRAYS):
            setattr(chosen, name, getattr(self, name)[rows])
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
        """All but some rows; see `subset`."""
        return self.subset(np.setdiff1d(np.arange(len(self)), rows))


READ_ARRAYS = ("starts", "ends", "targets", "sorted_place", "dialogue")
MAPPED_ARRAYS = ("cut", "prompt_starts", "prompt_ends", "row_hash", "prompt_hash", "level", "source")


class Row(NamedTuple):
    """A row on its way to the files of a TokenDataset; see there.

    front: int32 [length], what truncation took before `tokens`
    """

    tokens: np.ndarray
    is_target: np.ndarray
    front: np.ndarray = np.empty(0, np.int32)
    cut: int = 0
    level: int = 0
    source: tuple[int, int] = (0, 0)


def save_rows(folder: Path, rows: Sequence[Row], counts: Counts) -> None:
    """Write the files of a TokenDataset; `counts` has what truncation cost, the rest is counted here."""
    fronts = np.array([len(row.front) for row in rows], np.int64)
    whole, masks = [row.tokens for row in rows], [row.is_target for row in rows]
    for i in np.flatnonzero(fronts).tolist():
        whole[i] = np.concatenate([rows[i].front, whole[i]])
        masks[i] = np.concatenate([np.zeros(fronts[i], bool), masks[i]])
    bounds = np.cumsum([0, *map(len, whole)], dtype=np.int64)
    prompts = np.array([max(1, np.argmax(mask)) for mask in masks], np.int64)
    order = whole_order = sort_rows([row.tokens for row in rows])
    if fronts.any():
        whole_order = sort_rows(whole)
    arrays: dict[str, Any] = {
        "tokens": np.concatenate(whole),
        "is_target": np.concatenate(masks),
        "starts": bounds[:-1] + fronts,
        "ends": bounds[1:],
        "targets": np.array([count_targets(row.is_target) for row in rows], np.int64),
        "sorted_place": np.argsort(order),
        "dialogue": find_dialogues(whole, prompts, whole_order),
        "cut": np.array([row.cut for row in rows], np.int64),
        "prompt_starts": bounds[:-1],
        "prompt_ends": bounds[:-1] + prompts,
        "row_hash": np.array([_hash(row.tokens, row.is_target) for row in rows], np.uint64),
        "prompt_hash": np.array([_hash(ids[:n]) for ids, n in zip(whole, prompts, strict=True)], np.uint64),
        "level": np.array([row.level for row in rows], np.uint64),
        "source": np.array([row.source for row in rows], np.int64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    tokens = int((arrays["ends"] - arrays["starts"]).sum())
    counts = replace(counts, rows=len(rows), tokens=tokens, targets=int(arrays["targets"].sum()))
    (folder / "counts.json").write_text(json.dumps(asdict(counts)), encoding="utf-8")


def _hash(*arrays: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest())


def count_targets(is_target: np.ndarray) -> int:
    """Targets in one row's mask (bool [length]). A row's first token is predicted by nothing, so never counts."""
    return int(np.count_nonzero(is_target[1:]))


def load_dataset(
    names: Sequence[str],
    flag: str,
    tokenizer: PreTrainedTokenizerBase,
    data_format: DataFormat,
    *,
    max_rows: int | None = None,
    show_progress: bool = False,
) -> TokenDataset:
    """The tokenised rows of parquet files, from the cache or made now.

    Args:
        names: files, globs or folders, as the flag gave them.
        flag: the flag's name, for messages.
        tokenizer: of the model.
        data_format: columns, thinking, length and truncation.
        max_rows: the first N rows only.
        show_progress: draw a bar where the output is a terminal.

    Raises:
        UserError: for every fault in the files or their rows, with file and row.
    """
    files = find_files(names, flag)
    key = _cache_key(files, tokenizer, data_format, max_rows)
    folder = build_once(
        f"tokens/{key}", lambda target: _tokenize_files(target, files, tokenizer, data_format, max_rows, show_progress)
    )
    return TokenDataset(folder, files)


def _cache_key(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, data_format: DataFormat, max_rows: int | None
) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; make it readable, or name another") from error
    parts = [CACHE_FORMAT, asdict(data_format), max_rows, tokenizer_fingerprint(tokenizer)]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes whenever the tokenizer or its chat template would give other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    state = [rules, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(state).encode()).hexdigest()


def _tokenize_files(
    folder: Path,
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    data_format: DataFormat,
    max_rows: int | None,
    show_progress: bool,
) -> None:
    chat_format = ChatFormat(tokenizer, with_thinking=data_format.with_thinking)
    columns, flags = data_format.columns()
    counts = Counts()
    kept_rows: list[Row] = []
    index = {str(file): i for i, file in enumerate(files)}
    levels = read_field(files, LEVEL_COLUMN, LEVEL_FIELD)
    bar = tqdm(unit=" rows", desc="tokenising", disable=None if show_progress else True)
    with bar:
        for rows in read_columns(files, columns, flags, max_rows):
            segments = [row_segments(cells, cell, chat_format, data_format) for cell, cells in rows]
            for (cell, _), row in zip(rows, chat_format.tokenize(segments), strict=True):
                kept, level = truncate_row(*row, cell, data_format, counts), _level_number(next(levels))
                if kept is not None:
                    cut = len(row[0]) - len(kept[0])
                    front = row[0][: cut if data_format.truncation == "left" else 0]
                    kept_rows.append(Row(*kept, front, cut, level, (index[cell.file], cell.row)))
            bar.update(len(rows))
    if not kept_rows:
        raise UserError(
            f"no row of {', '.join(map(str, files))} is left: {counts.losses()}; raise max_length "
            f"({data_format.max_length}) or change truncation ({data_format.truncation})"
        )
    save_rows(folder, kept_rows, counts)


def _level_number(level: Any) -> int:
    """The 64 bits of an environment's level_id; 0 for anything else."""
    return int(level, 16) if isinstance(level, str) and LEVEL_ID.fullmatch(level) else 0


def row_segments(cells: tuple, cell: Cell, chat_format: ChatFormat, data_format: DataFormat) -> list[Segment]:
    """What a row of the columns read becomes, before it is tokenised.

    Raises:
        UserError: values of another kind than the flags say, with file and row.
    """
    if data_format.messages_key is not None:
        messages = walk(cells[0], data_format.prompt_dict_keys, cell, data_format.messages_key)
        return chat_format.conversation(messages, cell)
    prompt = walk(cells[0], data_format.prompt_dict_keys, cell, data_format.prompt_key)
    response = walk(cells[1], data_format.response_dict_keys, cell, data_format.response_key)
    return chat_format.prompt_and_response(prompt, response, cell)


def truncate_row(
    tokens: np.ndarray, is_target: np.ndarray, cell: Cell, data_format: DataFormat, counts: Counts
) -> tuple[np.ndarray, np.ndarray] | None:
    """One row within max_length, or None where the row is dropped; `counts` is told what that cost.

    Raises:
        UserError: the row is too long, and nothing may be cut.
    """
    surplus = len(tokens) - data_format.max_length
    if surplus > 0:
        if data_format.truncation == "error":
            raise UserError(
                f"{cell} has {len(tokens)} tokens, max_length is {data_format.max_length}; raise --max_length, "
                "or choose --truncation left, right or drop"
            )
        if data_format.truncation == "right":
            kept = slice(0, data_format.max_length)
        elif data_format.truncation == "left" and surplus < np.argmax(is_target):
            kept = slice(surplus, None)  # at least one token stays before the first target: it predicts it
        else:
            kept = slice(0, 0)
        if not is_target[kept][1:].any():
            counts.rows_dropped += 1
            counts.tokens_dropped += len(tokens)
            return None
        counts.rows_cut += 1
        counts.tokens_cut += surplus
        tokens, is_target = tokens[kept], is_target[kept]
    return tokens, is_target
