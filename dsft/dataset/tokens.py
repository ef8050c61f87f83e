"""Tokenised rows: made once on a machine, kept in the cache folder, mapped into memory by every rank."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsft.cache import build_once
from dsft.dataset.chat_format import ChatFormat, Segment
from dsft.dataset.folding import find_dialogues, sort_rows
from dsft.dataset.parquet import Cell, find_files, read_columns, walk
from dsft.errors import UserError

if TYPE_CHECKING:
    from dsft.config.flags import RowFlags

CACHE_FORMAT = 2  # raise it when the same input would give other tokens
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

    tokens: int32 [all tokens], is_target: bool [all tokens], starts: int64 [rows + 1]
    targets: int64 [rows]
    sorted_place: int64 [rows], where a row stands when rows are sorted by their tokens: neighbours share beginnings
    dialogue: int64 [rows], the same number for rows of one dialogue, see dsft.dataset.folding.find_dialogues
    """

    def __init__(self, folder: Path) -> None:
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.is_target = np.load(folder / "is_target.npy", mmap_mode="r")
        self.starts, self.targets, self.sorted_place, self.dialogue = (
            np.load(folder / f"{name}.npy") for name in ("starts", "targets", "sorted_place", "dialogue")
        )
        self.counts = Counts(**json.loads((folder / "counts.json").read_text(encoding="utf-8")))
        self.fingerprint = folder.name

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [length]) and is-target mask (bool [length]) of one row."""
        span = slice(self.starts[row], self.starts[row + 1])
        return self.tokens[span], self.is_target[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, int64 [rows]."""
        return np.diff(self.starts)


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
    return TokenDataset(folder)


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
    if data_format.messages_key is not None:
        columns, flags = [data_format.messages_key], ["messages_key"]
    else:
        columns, flags = [data_format.prompt_key, data_format.response_key], ["prompt_key", "response_key"]
    counts = Counts()
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    bar = tqdm(unit=" rows", desc="tokenising", disable=None if show_progress else True)
    with bar:
        for rows in read_columns(files, columns, flags, max_rows):
            segments = [_segments(cells, cell, chat_format, data_format) for cell, cells in rows]
            for (cell, _), row in zip(rows, chat_format.tokenize(segments), strict=True):
                kept = _fit(*row, cell, data_format, counts)
                if kept is not None:
                    tokens.append(kept[0])
                    masks.append(kept[1])
            bar.update(len(rows))
    if not tokens:
        raise UserError(
            f"no row of {', '.join(map(str, files))} is left: {counts.losses()}; raise max_length "
            f"({data_format.max_length}) or change truncation ({data_format.truncation})"
        )
    counts.rows = len(tokens)
    counts.tokens = sum(map(len, tokens))
    targets = np.array([count_targets(mask) for mask in masks], np.int64)
    counts.targets = int(targets.sum())
    order = sort_rows(tokens)
    prompt_lengths = np.array([max(1, np.argmax(mask)) for mask in masks], np.int64)
    np.save(folder / "tokens.npy", np.concatenate(tokens))
    np.save(folder / "is_target.npy", np.concatenate(masks))
    np.save(folder / "starts.npy", np.cumsum([0, *map(len, tokens)], dtype=np.int64))
    np.save(folder / "targets.npy", targets)
    np.save(folder / "sorted_place.npy", np.argsort(order))
    np.save(folder / "dialogue.npy", find_dialogues(tokens, prompt_lengths, order))
    (folder / "counts.json").write_text(json.dumps(asdict(counts)), encoding="utf-8")


def _segments(cells: tuple, cell: Cell, chat_format: ChatFormat, data_format: DataFormat) -> list[Segment]:
    if data_format.messages_key is not None:
        messages = walk(cells[0], data_format.prompt_dict_keys, cell, data_format.messages_key)
        return chat_format.conversation(messages, cell)
    prompt = walk(cells[0], data_format.prompt_dict_keys, cell, data_format.prompt_key)
    response = walk(cells[1], data_format.response_dict_keys, cell, data_format.response_key)
    return chat_format.prompt_and_response(prompt, response, cell)


def _fit(
    tokens: np.ndarray, is_target: np.ndarray, cell: Cell, data_format: DataFormat, counts: Counts
) -> tuple[np.ndarray, np.ndarray] | None:
    """One row within max_length, or None where the row is dropped."""
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
