"""Files to rows: find files, read columns, follow keys into nested values."""

import glob
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsft.dataset.file_formats import READERS, UNREADABLE, open_file, suffix_of
from dsft.dataset.hub_files import PREFIX, find_on_hub
from dsft.errors import UserError, did_you_mean, did_you_mean_path
from dsft.text import one_line


@dataclass(frozen=True)
class Cell:
    """Where a row comes from, for error messages."""

    file: str
    row: int

    def __str__(self) -> str:
        if suffix_of(Path(self.file)) == ".jsonl":
            return f"{self.file}, line {self.row + 1}"
        return f"{self.file}, row {self.row}"


def find_files(names: Sequence[str], flag: str) -> list[Path]:
    """Expand files, globs and folders, in the order given; each expansion is sorted.

    Raises:
        UserError: a name that matches no file.
    """
    found: list[Path] = []
    for name in names:
        path = find_on_hub(name, flag) if name.startswith(PREFIX) else Path(name).expanduser()
        if path.is_dir():
            matches = files_in(path, name, flag)
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise UserError(f"--{flag} {name}: no such file{did_you_mean_path(path)}")
        splits = {split[0] for file in matches if (split := re.match("train|val|dev|test", file.name))}
        if name.startswith(PREFIX) and len(splits) > 1:
            kinds = ", ".join(sorted(splits))
            raise UserError(f"--{flag} {name} has files of several splits ({kinds}); add a glob such as /data/train-*")
        found += matches
    if not found:
        raise UserError(f"--{flag} is empty; name a file, a glob or a folder")
    return found


def files_in(folder: Path, name: str, flag: str) -> list[Path]:
    """The files of a folder: of the first format of READERS of which there are some; below it, if it has none itself.

    Raises:
        UserError: it has none.
    """
    for pattern in ("*", "**/*"):
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        for suffix in READERS:
            if matches := [file for file in files if suffix_of(file) == suffix]:
                return matches
    kinds = ", ".join(f"*{suffix}" for suffix in READERS)
    raise UserError(f"--{flag} {name}: the folder contains no {kinds} file; name one that does")


Rows = list[tuple[Cell, tuple[Any, ...]]]
"""Where each row comes from, and its values."""


def read_columns(
    files: Sequence[Path],
    columns: Sequence[str],
    flags: Sequence[str],
    max_rows: int | None,
    optional: Collection[str] = (),
) -> Iterator[Rows]:
    """Rows of the named columns, some at a time; see `read_batches`."""
    for _, make in read_batches(files, columns, flags, max_rows, optional):
        yield make()


def read_batches(
    files: Sequence[Path],
    columns: Sequence[str],
    flags: Sequence[str],
    max_rows: int | None,
    optional: Collection[str] = (),
) -> Iterator[tuple[int, Callable[[], Rows]]]:
    """Rows of the named columns, some at a time: how many, and what makes Python values of them.

    Args:
        files: of formats in READERS.
        columns: the columns to read; others are not touched.
        flags: the flag that names each column, for messages.
        max_rows: stop after this many rows of all files together.
        optional: columns that are null where a file lacks them.

    Raises:
        UserError: an unreadable file, a missing column, no rows at all.
    """
    seen = 0
    for file in files:
        try:
            reader = open_file(file)
        except UNREADABLE as error:
            kind = suffix_of(file).removeprefix(".")
            kind = kind if f".{kind}" in READERS else "parquet"
            raise UserError(
                f"{file} is not a valid {kind} file: {one_line(error)}; correct it, or download it again"
            ) from error
        if not reader.columns:
            continue  # an empty file of JSON lines
        for column, flag in zip(columns, flags, strict=True):
            if column not in reader.columns and column not in optional:
                raise UserError(
                    f"{file} has no column '{column}' (--{flag}){did_you_mean(column, reader.columns)}; "
                    f"its columns: {', '.join(reader.columns)}"
                )
        present = [column for column in columns if column in reader.columns or column in reader.fields]
        row = 0
        with _reading(file, lambda: row):  # noqa: B023
            for rows, make in reader.read(present):
                kept = rows if max_rows is None else min(rows, max_rows - seen)
                if kept:
                    yield kept, partial(_make_rows, file, row, make, kept, columns, present)
                row += rows
                seen += kept
                if seen == max_rows:
                    return
    if seen == 0:
        raise UserError(f"no rows in {', '.join(map(str, files))}; name files that contain some")


@contextmanager
def _reading(file: Path, row: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        reason = f"{file} is damaged after row {row()}: {one_line(error)}"
        raise UserError(f"{reason}; correct it, or download it again") from error


def _make_rows(
    file: Path,
    first: int,
    make: Callable[[], list[tuple[Any, ...]]],
    kept: int,
    columns: Sequence[str],
    present: Sequence[str],
) -> Rows:
    with _reading(file, lambda: first):
        values = make()[:kept]
    if len(present) < len(columns):
        named = (dict(zip(present, cells, strict=True)) for cells in values)
        values = [tuple(row.get(column) for column in columns) for row in named]
    return [(Cell(str(file), first + i), cells) for i, cells in enumerate(values)]


def first_row(files: Sequence[Path]) -> dict[str, Any]:
    """The first row of the first file that has one, by column; empty where none can be read."""
    for file in files:
        try:
            reader = open_file(file)
            columns = reader.columns
            for rows, make in reader.read(columns):
                if rows:
                    return dict(zip(columns, make()[0], strict=True))
        except UNREADABLE:
            return {}  # read_columns says what is wrong
    return {}


def walk(value: Any, keys: Sequence[str] | None, cell: Cell, column: str) -> Any:
    """Follow keys into a nested value: names in a struct, indices into a list.

    Raises:
        UserError: a missing key, with those available.
    """
    for key in keys or ():
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.lstrip("-").isdigit() and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            available = f"keys: {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
            meant = did_you_mean(key, value) if isinstance(value, dict) else ""
            raise UserError(
                f"{cell}: column '{column}' has no key '{key}'{meant} at this depth ({available}); correct "
                "--prompt_dict_keys or --response_dict_keys"
            )
    return value
