"""Files to rows: find files, read columns, follow keys into nested values. A file format is one entry of READERS."""

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow

from dsft.dataset.parquet import ParquetReader
from dsft.errors import UserError, did_you_mean, did_you_mean_path
from dsft.text import one_line


class Reader(Protocol):
    """What a file format provides; ParquetReader describes each. A damaged file raises one of UNREADABLE."""

    columns: list[str]

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]: ...
    def read_field(self, column: str, field: str) -> Iterator[Any]: ...


UNREADABLE = (pyarrow.ArrowException, OSError, ValueError)
READERS: dict[str, Callable[[Path], Reader]] = {".parquet": ParquetReader}


@dataclass(frozen=True)
class Cell:
    """Where a row comes from, for error messages."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


def find_files(names: Sequence[str], flag: str) -> list[Path]:
    """Expand files, globs and folders, in the order given; each expansion is sorted.

    Raises:
        UserError: a name that matches no file.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            matches = sorted(file for suffix in READERS for file in path.glob(f"*{suffix}"))
            if not matches:
                kinds = " or ".join(f"*{suffix}" for suffix in READERS)
                raise UserError(f"--{flag} {name}: the folder contains no {kinds} file; name one that does")
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise UserError(f"--{flag} {name}: no such file{did_you_mean_path(path)}")
        found += matches
    if not found:
        raise UserError(f"--{flag} is empty; name a parquet file, a glob or a folder")
    return found


def read_columns(
    files: Sequence[Path], columns: Sequence[str], flags: Sequence[str], max_rows: int | None
) -> Iterator[list[tuple[Cell, tuple[Any, ...]]]]:
    """Rows of the named columns, some at a time.

    Args:
        files: of formats in READERS.
        columns: the columns to read; others are not touched.
        flags: the flag that names each column, for messages.
        max_rows: stop after this many rows of all files together.

    Raises:
        UserError: an unreadable file, a missing column, no rows at all.
    """
    seen = 0
    for file in files:
        try:
            reader = _open(file)
        except UNREADABLE as error:
            raise UserError(
                f"{file} is not a valid parquet file: {one_line(error)}; convert it, or download it again"
            ) from error
        for column, flag in zip(columns, flags, strict=True):
            if column not in reader.columns:
                raise UserError(
                    f"{file} has no column '{column}' (--{flag}){did_you_mean(column, reader.columns)}; "
                    f"its columns: {', '.join(reader.columns)}"
                )
        row = 0
        try:
            for batch in reader.read(columns):
                rows = [(Cell(str(file), row + i), cells) for i, cells in enumerate(batch)]
                row += len(rows)
                rows = rows if max_rows is None else rows[: max_rows - seen]
                seen += len(rows)
                if rows:
                    yield rows
                if seen == max_rows:
                    return
        except UNREADABLE as error:
            raise UserError(f"{file} is damaged after row {row}: {one_line(error)}; download it again") from error
    if seen == 0:
        raise UserError(f"no rows in {', '.join(map(str, files))}; name files that contain some")


def read_field(files: Sequence[Path], column: str, field: str) -> Iterator[Any]:
    """One field of a column of structs, a value per row; None where there is no such column or field.

    Raises:
        UserError: a file that cannot be read.
    """
    for file in files:
        try:
            yield from _open(file).read_field(column, field)
        except UNREADABLE as error:
            raise UserError(f"{file}, column '{column}' is damaged: {one_line(error)}; download it again") from error


def _open(file: Path) -> Reader:
    return READERS.get(file.suffix, ParquetReader)(file)  # a parquet file may have any name


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
