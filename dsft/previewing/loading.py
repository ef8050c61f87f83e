"""One set of rows for a preview: tokenised as training would, before truncation, and as they stand in the files."""

from dataclasses import asdict, dataclass, field

import numpy as np

from dsft.config import PreviewConfig
from dsft.dataset.chat_format import ChatFormat, Segment
from dsft.dataset.readers import Cell, find_files, read_columns
from dsft.dataset.tokens import DataFormat, TokenDataset, load_dataset, row_segments
from dsft.errors import UserError
from dsft.previewing.row_checks import Scan
from dsft.previewing.template_checks import Probe

NO_LIMIT = 2**31 - 1
MOST_COMPARED = 100  # rows whose prompts are made into tokens once more, as generation would


@dataclass
class Loaded:
    """One set of rows.

    flag: train_files or val_files
    whole: its rows before truncation; None where they cannot be read
    data: its rows as trained on; None where training would refuse them
    scan: of their text
    cells: where the rows in `kept` stand
    kept: number of a row -> its segments, for those that were asked for
    errors: why there is no whole or no data, unless a finding of the scan says so
    """

    flag: str
    scan: Scan
    whole: TokenDataset | None = None
    data: TokenDataset | None = None
    files: list[tuple[str, int]] = field(default_factory=list)
    kept: dict[int, list[Segment]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Before the names of what is found in it."""
        return "" if self.flag == "train_files" else "val: "

    def cell(self, row: int) -> Cell:
        """Where a row stands."""
        for file, rows in self.files:
            if row < rows:
                return Cell(file, row)
            row -= rows
        raise IndexError(row)


def load(
    config: PreviewConfig,
    flag: str,
    names: list[str],
    max_rows: int | None,
    chat_format: ChatFormat,
    probe: Probe,
) -> Loaded:
    """A set's rows, as far as they can be had.

    Raises:
        UserError: there are no such files.
    """
    data_format = DataFormat.from_flags(config)
    unlimited = DataFormat(**asdict(data_format) | {"max_length": NO_LIMIT, "truncation": "error"})
    loaded = Loaded(flag, Scan(data_format, probe.marks, label="" if flag == "train_files" else "val: "))

    def tokens(wanted: DataFormat) -> TokenDataset | None:
        try:
            return load_dataset(names, flag, chat_format.tokenizer, wanted, max_rows=max_rows, show_progress=True)
        except UserError as error:
            loaded.errors.append(str(error))
            return None

    files = find_files(names, flag)
    loaded.data = tokens(data_format)
    if loaded.data is not None and not loaded.data.counts.losses():
        loaded.whole = loaded.data
    else:
        loaded.whole = tokens(unlimited)
    wanted = _wanted_rows(config, loaded)
    columns, flags = data_format.columns()
    try:
        for rows in read_columns(files, columns, flags, max_rows):
            for cell, cells in rows:
                _see(loaded, cell, cells, wanted, chat_format, data_format)
    except UserError as error:
        loaded.errors.append(str(error))
    return loaded


def _see(
    loaded: Loaded, cell: Cell, cells: tuple, wanted: set[int], chat_format: ChatFormat, data_format: DataFormat
) -> None:
    number = loaded.scan.rows
    if not loaded.files or loaded.files[-1][0] != cell.file or cell.row == 0:
        loaded.files.append((cell.file, 0))
    loaded.files[-1] = (cell.file, cell.row + 1)

    def make() -> list[Segment]:
        return row_segments(cells, cell, chat_format, data_format)

    loaded.scan.see(cells, cell, make if loaded.whole is None else None)
    if number in wanted:
        loaded.kept[number] = make()


def _wanted_rows(config: PreviewConfig, loaded: Loaded) -> set[int]:
    """The rows whose prompts are made into tokens once more."""
    if loaded.whole is None or loaded.flag != "train_files":
        return set()
    rows = len(loaded.whole)
    return set(np.linspace(0, rows - 1, min(rows, MOST_COMPARED)).astype(int).tolist())
