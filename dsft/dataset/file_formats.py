"""File formats: a reader each, of which only the columns used are read. Values are Python's."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
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


Batch = tuple[int, Callable[[], list[tuple[Any, ...]]]]
"""How many rows there are, and what makes Python values of them: of several processes, one makes them."""


class Reader(Protocol):
    """What a file format provides."""

    columns: list[str]
    """Their names. Of JSON, those of the first rows."""
    fields: set[str]
    """Those of structs, as STRUCT.FIELD, which may be read like columns."""

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        """All rows of the named columns, some at a time."""


class ParquetReader:
    """One parquet file."""

    def __init__(self, file: Path) -> None:
        self._file = pyarrow.parquet.ParquetFile(file)
        self.columns: list[str] = self._file.schema_arrow.names
        self.fields = _fields_of(self._file.schema_arrow)

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        """See Reader. Of a struct, only the field is read."""
        with self._file:
            for batch in self._file.iter_batches(ROWS_AT_ONCE, columns=list(dict.fromkeys(columns))):
                yield batch.num_rows, partial(_rows, batch, columns)


class ArrowReader:
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
        self.columns, self.fields = opened.schema.names, _fields_of(opened.schema)

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        """See Reader."""
        yield from _in_parts(self._batches, columns)


class CsvReader:
    """CSV, or TSV by its name; all values are text. Quoted values may have line breaks."""

    def __init__(self, file: Path) -> None:
        self._file = file
        delimiter = "\t" if ".tsv" in file.suffixes else ","
        self._parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        with self._open({}) as opened:
            self.columns: list[str] = opened.schema.names
        self.fields: set[str] = set()

    def _open(self, types: dict[str, Any]) -> Any:
        source = pyarrow.input_stream(str(self._file), compression="detect")
        convert = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
        read = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK)
        return pyarrow.csv.open_csv(source, read, self._parse, convert)

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        """See Reader."""
        with self._open(dict.fromkeys(self.columns, pyarrow.string())) as opened:
            yield from _in_parts(opened, columns)


class JsonReader:
    """JSON: an object per line, or (in a file named .json) a list of objects, which is held as a whole."""

    def __init__(self, file: Path) -> None:
        self._file = file
        _, make = next(self._objects(), (0, list))
        rows = make()
        self.columns = list({key: None for row in rows for key in row})
        self.fields = {f"{k}.{name}" for row in rows for k, v in row.items() if isinstance(v, dict) for name in v}

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        """See Reader."""
        for rows, make in self._objects():
            yield rows, partial(_columns_of, make, columns)

    def _objects(self) -> Iterator[tuple[int, Callable[[], list[dict[str, Any]]]]]:
        with io.BufferedReader(pyarrow.input_stream(str(self._file), compression="detect")) as stream:
            if ".json" in self._file.suffixes and stream.peek(64).lstrip()[:1] == b"[":
                objects = [_an_object(value) for value in json.loads(stream.read())]
                for start in range(0, len(objects), ROWS_AT_ONCE):
                    part = objects[start : start + ROWS_AT_ONCE]
                    yield len(part), partial(list, part)
                return
            first = 1
            while lines := list(islice(stream, ROWS_AT_ONCE)):
                while lines and not lines[-1].strip() and not stream.peek(1):  # blank lines at the end
                    lines.pop()
                if lines:
                    yield len(lines), partial(_parse_lines, lines, first)
                first += len(lines)


def _parse_lines(lines: Sequence[bytes], first: int) -> list[dict[str, Any]]:
    objects = []
    for number, line in enumerate(lines, first):
        try:
            objects.append(_an_object(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return objects


def _columns_of(make: Callable[[], list[dict[str, Any]]], columns: Sequence[str]) -> list[tuple[Any, ...]]:
    return [tuple(map(partial(_field, row), columns)) for row in make()]


def _field(row: dict[str, Any], column: str) -> Any:
    """A column, or STRUCT.FIELD."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    value = row.get(outer)
    return value.get(inner) if isinstance(value, dict) else None


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


def _in_parts(batches: Iterable[Any], columns: Sequence[str]) -> Iterator[Batch]:
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            part = batch.slice(start, ROWS_AT_ONCE)
            yield part.num_rows, partial(_rows, part, columns)


def _fields_of(schema: Any) -> set[str]:
    once = [column for column in schema if schema.names.count(column.name) == 1]
    structs = [column for column in once if pyarrow.types.is_struct(column.type)]
    return {f"{column.name}.{inner.name}" for column in structs for inner in column.type}


def _rows(batch: Any, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    names = set(batch.schema.names)
    values = []
    for column in columns:
        outer, _, inner = column.partition(".")
        name = column if column in names or not inner else outer
        array = batch.column(name)
        cells = array.to_pylist()
        if _has_nested_structs(array.type):
            cells = _without_nulls(cells)
        values.append(cells if name == column else [cell and cell.get(inner) for cell in cells])
    return list(zip(*values, strict=True)) if columns else [()] * batch.num_rows


def _has_nested_structs(kind: Any, *, is_nested: bool = False) -> bool:
    if not pyarrow.types.is_nested(kind):
        return False
    is_struct = pyarrow.types.is_struct(kind)
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return (is_struct and is_nested) or any(_has_nested_structs(one, is_nested=is_nested or is_struct) for one in inner)


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
