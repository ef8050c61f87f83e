"""Tokenized rows: made once per machine, kept in the cache folder, and memory-mapped by every rank."""

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsft.cache import build_once
from dsft.config.flags import RowFlags
from dsft.dataset.chat_format import ChatFormat, RenderedRow, read_system_prompt
from dsft.dataset.folding import find_dialogues, sort_rows
from dsft.dataset.messages import read_weight
from dsft.dataset.readers import Cell, find_files, read_columns, read_field
from dsft.dataset.row_format import format_text, read_values, resolve_format
from dsft.errors import UserError

CACHE_FORMAT = 4  # raise it when the same input would give other files
LEVEL_COLUMN, LEVEL_FIELD = "extra_info", "level"  # where dsft.generate writes it
OPTIONAL = ("input",)  # of Alpaca's columns
LEVEL_ID = re.compile("[0-9a-f]{16}")  # other datasets have a level there too, and mean a difficulty


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


class TokenDataset:
    """Rows of token ids and loss masks in memory-mapped files.

    tokens: int32 [all tokens], is_target: bool [all tokens]; including what truncation cut from the front of a row.
    The arrays below have one entry per row; those from `cut` on are for the search for leaks.
    """

    starts: np.ndarray  # int64, of a row's own tokens in `tokens`
    ends: np.ndarray
    targets: np.ndarray  # int64
    weight: np.ndarray  # float64, of each target in the loss
    sorted_place: np.ndarray  # int64, ascending along rows sorted by their tokens: neighbours share prefixes
    dialogue: np.ndarray  # int64, see find_dialogues, before truncation; ascending along the sorted rows
    cut: np.ndarray  # int64, tokens removed by truncation
    prompt_starts: np.ndarray  # int64, of the prompt in `tokens`, including what was cut from its front
    prompt_ends: np.ndarray
    row_hash: np.ndarray  # uint64, of tokens and mask
    prompt_hash: np.ndarray  # uint64
    level: np.ndarray  # uint64, the environment's level of rows written by dsft.generate; otherwise 0
    source: np.ndarray  # int64 [rows, 2], index into `files`, row in that file

    def __init__(self, folder: Path, files: Sequence[Path] = ()) -> None:
        """Args:
        folder: filled by `save_rows`.
        files: where the rows come from, for `place`.
        """

        def load(name: str) -> np.ndarray:
            return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))  # a plain view: indexing it is faster

        self.tokens, self.is_target = load("tokens"), load("is_target")
        for name in PER_ROW:
            setattr(self, name, load(name))
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
        """Tokens per row, int64 [rows]."""
        return self.ends - self.starts

    @property
    def file_row(self) -> np.ndarray:
        """Equal for the rows that a row of the files became, int64 [rows]; above 0."""
        return (self.source[:, 0] << 40) + self.source[:, 1] + 1

    def prompt(self, row: int) -> np.ndarray:
        """Tokens before a row's first target, before truncation: int32 [length]."""
        return self.tokens[self.prompt_starts[row] : self.prompt_ends[row]]

    def place(self, row: int) -> str:
        """Where a row comes from: file and row in it, or its index if the file is unknown."""
        file, row_in_file = self.source[row].tolist()
        return str(Cell(self.files[file], row_in_file)) if self.files else f"row {row}"

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
        for name in PER_ROW:
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
        """All rows but some; see `subset`."""
        return self.subset(np.setdiff1d(np.arange(len(self)), rows))


PER_ROW = tuple(TokenDataset.__annotations__)


class Row(NamedTuple):
    """A row about to be saved; see TokenDataset.

    front: int32 [length], what truncation removed before `tokens`
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


def save_rows(folder: Path, rows: Sequence[Row], counts: Counts) -> None:
    """Write the files of a TokenDataset; `counts` has what truncation cost, the rest is counted here."""
    fronts = np.array([len(row.front) for row in rows], np.int64)
    whole = [np.concatenate([row.front, row.tokens]) if len(row.front) else row.tokens for row in rows]
    masks = [np.concatenate([np.zeros(len(row.front), bool), row.is_target]) for row in rows]
    bounds = np.cumsum([0, *map(len, whole)], dtype=np.int64)
    prompts = np.array([max(1, np.argmax(mask)) for mask in masks], np.int64)
    histories = np.array([row.history or prompt for row, prompt in zip(rows, prompts.tolist(), strict=True)], np.int64)
    order = whole_order = sort_rows([row.tokens for row in rows])
    if fronts.any():
        whole_order = sort_rows(whole)
    arrays: dict[str, Any] = {
        "tokens": np.concatenate(whole),
        "is_target": np.concatenate(masks),
        "starts": bounds[:-1] + fronts,
        "ends": bounds[1:],
        "targets": np.array([count_targets(row.is_target) for row in rows], np.int64),
        "weight": np.array([row.weight for row in rows], np.float64),
        "sorted_place": np.argsort(order),
        "dialogue": find_dialogues(whole, histories, whole_order),
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
    digest = hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8)
    return int.from_bytes(digest.digest())


def count_targets(is_target: np.ndarray) -> int:
    """Targets in one row's mask (bool [length]). A row's first token is never predicted, so it does not count."""
    return int(np.count_nonzero(is_target[1:]))


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
        names: files, globs or folders, as given by the flag.
        flag: the flag's name, for messages.
        tokenizer: of the model.
        flags: columns, thinking, length and truncation.
        max_rows: the first N rows only.
        show_progress: draw a progress bar if the output is a terminal.

    Raises:
        UserError: a fault in the files or their rows, with file and row.
    """
    files = find_files(names, flag)
    flags = resolve_format(files, flags)

    def tokenize(folder: Path) -> None:
        chat_format = ChatFormat.of(tokenizer, flags)
        counts, kept_rows, ignored = Counts(), [], Counter[str]()
        index = {str(file): i for i, file in enumerate(files)}
        levels = read_field(files, LEVEL_COLUMN, LEVEL_FIELD)
        with tqdm(unit=" rows", desc="tokenizing", disable=None if show_progress else True) as bar:
            for rows in read_columns(files, *flags.columns(), max_rows, OPTIONAL):
                rendered = [render_row(cells, cell, chat_format, flags) for cell, cells in rows]
                for (cell, _), one, found in zip(rows, rendered, chat_format.tokenize(rendered), strict=True):
                    ignored.update(one.ignored)
                    counts.conversations += flags.messages_key is not None
                    counts.split_conversations += len(found) > 1
                    counts.split_rows += len(found) if len(found) > 1 else 0
                    counts.rows_without_weight += not found
                    level = _level_number(next(levels))
                    for row in found:
                        kept = truncate_row(row.tokens, row.is_target, cell, flags, counts)
                        if kept is None:
                            continue
                        cut = len(row.tokens) - len(kept[0])
                        front = row.tokens[: cut if flags.truncation == "left" else 0]
                        source = (index[cell.file], cell.row)
                        history = row.history if len(found) > 1 else 0
                        kept_rows.append(Row(*kept, front, cut, level, source, row.weight, history))
                bar.update(len(rows))
        counts.ignored, counts.format = dict(ignored), format_text(flags)
        if not kept_rows:
            remedy = f"raise max_length ({flags.max_length}) or change truncation ({flags.truncation})"
            if counts.rows_without_weight:
                remedy = "give some answer a weight above 0, or change --learn"
            raise UserError(f"no row of {', '.join(index)} is left: {counts.losses()}; {remedy}")
        save_rows(folder, kept_rows, counts)

    key = _cache_key(files, tokenizer, flags, max_rows)
    return TokenDataset(build_once(f"tokens/{key}", tokenize), files)


def _cache_key(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, flags: RowFlags, max_rows: int | None) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; make it readable, or choose another") from error
    settings = {flag.name: getattr(flags, flag.name) for flag in fields(RowFlags)}
    settings |= {name: list(settings[name] or ()) for name in ("prompt_dict_keys", "response_dict_keys")}
    settings["system_prompt"] = read_system_prompt(flags)
    parts = [CACHE_FORMAT, settings, max_rows, tokenizer_fingerprint(tokenizer)]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:32]


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
