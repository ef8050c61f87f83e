"""Parquet files to rows: finding the files, reading only the columns used, walking into nested values."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dsft.errors import UserError, did_you_mean, did_you_mean_path

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Cell:
    """Where a row came from: what an error message names."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


def find_files(names: Sequence[str], flag: str) -> list[Path]:
    """Files, globs and folders as a list of parquet files: in the order given, each expansion sorted.

    Raises:
        UserError: a name that stands for no file.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            matches = sorted(path.glob("*.parquet"))
            if not matches:
                raise UserError(f"--{flag} {name}: the folder holds no *.parquet file; name one that does")
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise UserError(f"--{flag} {name}: no such file{did_you_mean_path(path)}")
        found += matches
    if not found:
        raise UserError(f"--{flag} names no file; name a parquet file, a glob or a folder")
    return found


def read_columns(
    files: Sequence[Path], columns: Sequence[str], flags: Sequence[str], max_rows: int | None
) -> Iterator[list[tuple[Cell, tuple[Any, ...]]]]:
    """Rows of the named columns, ROWS_AT_ONCE at a time, as Python values.

    Args:
        files: parquet files.
        columns: the columns to read; others are not touched.
        flags: the flag that names each column, for messages.
        max_rows: stop after this many rows of all files together.

    Raises:
        UserError: a file that is no parquet, a missing column, no rows at all.
    """
    left = max_rows if max_rows is not None else float("inf")
    seen = 0
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{file} is no readable parquet file: {reason}; convert it, or fetch it again") from error
        with parquet:
            existing = parquet.schema_arrow.names
            for column, flag in zip(columns, flags, strict=True):
                if column not in existing:
                    raise UserError(
                        f"{file} has no column '{column}' (--{flag}){did_you_mean(column, existing)}; "
                        f"its columns: {', '.join(existing)}"
                    )
            row = 0
            try:
                for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=list(dict.fromkeys(columns))):
                    values = [batch.column(column).to_pylist() for column in columns]
                    rows = [(Cell(str(file), row + i), cells) for i, cells in enumerate(zip(*values, strict=True))]
                    row += len(rows)
                    rows = rows[: int(min(left, len(rows)))]
                    left -= len(rows)
                    seen += len(rows)
                    if rows:
                        yield rows
                    if left <= 0:
                        return
            except (pyarrow.ArrowException, OSError) as error:
                reason = " ".join(str(error).split()).rstrip(".")
                raise UserError(f"{file}, after row {row}: damaged: {reason}; fetch the file again") from error
    if seen == 0:
        raise UserError(f"no rows in {', '.join(map(str, files))}; name files that hold some")


def read_field(files: Sequence[Path], column: str, field: str) -> Iterator[Any]:
    """One field of a struct column, a value a row; None where a file or a row has no such column or field.

    Raises:
        UserError: a file that cannot be read.
    """
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                kind = parquet.schema_arrow.field(column).type if names.count(column) == 1 else None
                if not isinstance(kind, pyarrow.StructType) or kind.get_field_index(field) < 0:
                    yield from repeat(None, parquet.metadata.num_rows)
                    continue
                for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=[f"{column}.{field}"]):
                    yield from (value and value[field] for value in batch.column(column).to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{file}, column '{column}': damaged: {' '.join(str(error).split())}; fetch the file again"
            ) from error


def walk(value: Any, keys: Sequence[str] | None, cell: Cell, column: str) -> Any:
    """Follow keys into a nested value: names in a struct, numbers in a list.

    Raises:
        UserError: a key that is not there, with those that are.
    """
    for key in keys or ():
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.lstrip("-").isdigit() and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            there = f"keys: {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
            meant = did_you_mean(key, value) if isinstance(value, dict) else ""
            raise UserError(
                f"{cell}: column '{column}' has no key '{key}'{meant} at this depth ({there}); correct "
                "--prompt_dict_keys or --response_dict_keys"
            )
    return value
