"""Parquet, of which only the columns used are read."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

ROWS_AT_ONCE = 1024


class ParquetReader:
    """One parquet file; `columns` are the names of its columns."""

    def __init__(self, file: Path) -> None:
        self._file = pyarrow.parquet.ParquetFile(file)
        self.columns: list[str] = self._file.schema_arrow.names

    def read(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """All rows of the named columns as Python values, some at a time."""
        with self._file:
            for batch in self._file.iter_batches(ROWS_AT_ONCE, columns=list(dict.fromkeys(columns))):
                values = (without_nulls(batch.column(column).to_pylist()) for column in columns)
                yield list(zip(*values, strict=True))

    def read_field(self, column: str, field: str) -> Iterator[Any]:
        """One field of a column of structs, a value per row; None if there is no such column or field."""
        with self._file:
            kind = self._file.schema_arrow.field(column).type if self.columns.count(column) == 1 else None
            if not isinstance(kind, pyarrow.StructType) or kind.get_field_index(field) < 0:
                yield from repeat(None, self._file.metadata.num_rows)
                return
            for batch in self._file.iter_batches(ROWS_AT_ONCE, columns=[f"{column}.{field}"]):
                yield from (value and value[field] for value in batch.column(column).to_pylist())


def without_nulls(value: Any, *, is_nested: bool = False) -> Any:
    """Values without the null fields of structs in structs.

    All values of a column have the same fields there, so that the arguments of one tool call have those of all others.
    """
    if isinstance(value, list):
        return [without_nulls(one, is_nested=is_nested) for one in value]
    if isinstance(value, dict):
        kept = value.items() if not is_nested else ((key, one) for key, one in value.items() if one is not None)
        return {key: without_nulls(one, is_nested=True) for key, one in kept}
    return value
