"""File formats: a reader each, of which only the columns used are read. Values are Python's."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

ROWS_AT_ONCE = 1024
CSV_BLOCK = 2**24  # bytes; a row of CSV cannot be longer
COMPRESSED = (".gz", ".zst")
UNREADABLE = (pyarrow.ArrowException, OSError, ValueError)
"""What a reader raises for a damaged file."""


class Reader(Protocol):
    """What a file format provides."""

    columns: list[str]
    """Their names. Of JSON, those of the first rows."""

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """All rows of the named columns, some at a time."""

    def read_field(self, column: str, field: str) -> Iterator[Any]:
        """One field of a column of structs, a value per row; None if there is no such column or field."""


class ParquetReader:
    """One parquet file."""

    def __init__(self, file: Path) -> None:
        self._file = pyarrow.parquet.ParquetFile(file)
        self.columns: list[str] = self._file.schema_arrow.names

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """See Reader."""
        with self._file:
            for batch in self._file.iter_batches(ROWS_AT_ONCE, columns=list(dict.fromkeys(columns))):
                yield _rows(batch, columns)

    def read_field(self, column: str, field: str) -> Iterator[Any]:
        """See Reader."""
        with self._file:
            kind = self._file.schema_arrow.field(column).type if self.columns.count(column) == 1 else None
            if not isinstance(kind, pyarrow.StructType) or kind.get_field_index(field) < 0:
                yield from repeat(None, self._file.metadata.num_rows)
                return
            for batch in self._file.iter_batches(ROWS_AT_ONCE, columns=[f"{column}.{field}"]):
                yield from (value and value[field] for value in batch.column(column).to_pylist())


class _RowReader:
    """A format that has no cheaper way to a field than to its column."""

    columns: list[str]

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """See Reader."""
        raise NotImplementedError

    def read_field(self, column: str, field: str) -> Iterator[Any]:
        """See Reader."""
        for rows in self.read([column] if column in self.columns else []):
            for row in rows:
                yield row[0].get(field) if row and isinstance(row[0], dict) else None


class ArrowReader(_RowReader):
    """Arrow's IPC format, file or stream, as `datasets` saves it."""

    def __init__(self, file: Path) -> None:
        source = pyarrow.memory_map(str(file))
        try:
            opened = pyarrow.ipc.open_file(source)
            self._batches: Iterator[Any] = map(opened.get_batch, range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            opened = pyarrow.ipc.open_stream(source)
            self._batches = iter(opened)
        self.columns = opened.schema.names

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """See Reader."""
        for batch in self._batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield _rows(batch.slice(start, ROWS_AT_ONCE), columns)


class CsvReader(_RowReader):
    """CSV, or TSV by its name; all values are text. Quoted values may have line breaks."""

    def __init__(self, file: Path) -> None:
        self._file = file
        delimiter = "\t" if ".tsv" in file.suffixes else ","
        self._parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        with self._open({}) as opened:
            self.columns = opened.schema.names

    def _open(self, types: dict[str, Any]) -> Any:
        source = pyarrow.input_stream(str(self._file), compression="detect")
        convert = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
        read = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK)
        return pyarrow.csv.open_csv(source, read, self._parse, convert)

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """See Reader."""
        with self._open(dict.fromkeys(self.columns, pyarrow.string())) as opened:
            for batch in opened:
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield _rows(batch.slice(start, ROWS_AT_ONCE), columns)


class JsonReader(_RowReader):
    """JSON: an object per line, or (in a file named .json) a list of objects, which is held as a whole."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.columns = list({key: None for row in islice(self._objects(), ROWS_AT_ONCE) for key in row})

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """See Reader."""
        objects = self._objects()
        while rows := [tuple(row.get(column) for column in columns) for row in islice(objects, ROWS_AT_ONCE)]:
            yield rows

    def _open(self) -> io.BufferedReader:
        return io.BufferedReader(pyarrow.input_stream(str(self._file), compression="detect"))

    def _objects(self) -> Iterator[dict[str, Any]]:
        with self._open() as stream:
            if ".json" in self._file.suffixes and stream.peek(64).lstrip()[:1] == b"[":
                yield from map(_an_object, json.loads(stream.read()))
                return
            for number, line in enumerate(stream, 1):
                try:
                    yield _an_object(json.loads(line))
                except ValueError as error:
                    if not (line + stream.read()).strip():  # blank lines at the end
                        return
                    raise ValueError(f"line {number}: {error}") from error


def _an_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with the columns of a row, got {type(value).__name__}")
    return value


READERS: dict[str, Callable[[Path], Reader]] = {
    ".parquet": ParquetReader,
    ".arrow": ArrowReader,
    ".jsonl": JsonReader,
    ".csv": CsvReader,
    ".tsv": CsvReader,
    ".json": JsonReader,
}
"""By the name's end, before one of COMPRESSED. Of a folder, the first kind that it has is read."""


def suffix_of(file: Path) -> str:
    """The end of a file's name that says its format, without compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def open_file(file: Path) -> Reader:
    """The reader of a file. A parquet file may have any name.

    Raises:
        UNREADABLE: it is damaged, or of another format.
    """
    return READERS.get(suffix_of(file), ParquetReader)(file)


def _rows(batch: Any, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    if not columns:
        return [()] * batch.num_rows
    return list(zip(*(_without_nulls(batch.column(column).to_pylist()) for column in columns), strict=True))


def _without_nulls(value: Any, *, is_nested: bool = False) -> Any:
    """Values without the null fields of structs in structs.

    All values of a column have the same fields there, so that the arguments of one tool call have those of all others.
    """
    if isinstance(value, list):
        return [_without_nulls(one, is_nested=is_nested) for one in value]
    if isinstance(value, dict):
        kept = value.items() if not is_nested else ((key, one) for key, one in value.items() if one is not None)
        return {key: _without_nulls(one, is_nested=True) for key, one in kept}
    return value
