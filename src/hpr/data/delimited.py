"""Reads tables whose cells stand between commas, semicolons, tabs or bars (``.csv``, ``.tsv``)."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from hpr.data.contents import Source, suffix_of, text_of
from hpr.data.json_rows import refuse_json
from hpr.data.tables import LABEL_COLUMNS, MISSING, TEXT_COLUMNS, Column, Table, is_number, named_like
from hpr.errors import DataError

_log = logging.getLogger(__name__)
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_LONGEST_CELL = 2**31 - 1  # the highest limit that csv takes on every system
_LOOKED_AT, _LINES_OF_A_TABLE = 100_000, 8  # characters and lines of a plain text that may be a table
_limit_lock = Lock()
_EXCEL_HINT = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)


@dataclass(frozen=True)
class _Reading:
    """The rows of a file when read with one delimiter, without blank ones, and their numbers from 1."""

    delimiter: str
    rows: list[list[str]]
    numbers: list[int]
    error: str | None = None

    @property
    def width(self) -> int:
        return len(self.rows[0])

    def uneven(self) -> int | None:
        """The first row with more or fewer cells than the first one; None if there is none."""
        return next((place for place, row in enumerate(self.rows) if len(row) != self.width), None)

    @property
    def even(self) -> bool:
        return self.error is None and self.uneven() is None

    def says(self) -> str:
        """What this delimiter makes of the file, for error messages."""
        name = _DELIMITERS[self.delimiter]
        if self.error is not None:
            return f"{name}: {self.error}"
        place = self.uneven()
        if place is None:
            return f"{name}: {self.width} cells in every row"
        return f"{name}: {self.width} cells in row {self.numbers[0]}, {len(self.rows[place])} in row {self.numbers[place]}"


def read_delimited(path: Source, wanted: Sequence[Column] = ()) -> Table:
    """The table in a file of cells with delimiters, with a header or without.

    The delimiter is the one that gives every row the same number of cells. The first row is a header if it has one of the
    ``wanted`` names or a usual name such as ``text``, or if it has only words, one of them above a column of numbers. Raises
    ``DataError`` if the delimiter is in doubt, for a row with more cells than the header, and for rows of unlike length without
    a header.
    """
    text = text_of(path)
    refuse_json(path, text)
    reading = _best(path, text, suffix_of(path) == ".tsv", wanted)
    rows, numbers = reading.rows, reading.numbers
    header = _is_header(rows, wanted)
    if header and len(rows) == 1:
        raise DataError(f"{path} is empty below its header: give at least one example")
    place = next((place for place, row in enumerate(rows) if len(row) > reading.width), None if header else reading.uneven())
    if place is not None:
        first = "the header" if header else f"row {numbers[0]}"
        lines = ", or rename the file to .txt if it holds one text per line" if reading.width == 1 else ", or correct the row"
        raise DataError(
            f"{path}, row {numbers[place]}: {len(rows[place])} cells, but {first} has {reading.width}: put cells with a "
            f"{_DELIMITERS[reading.delimiter]} in double quotes{lines}"
        )
    if not header and reading.width == 1:
        _log.info("%s has a single column without a usual name: its first row is read as a text, too", path)
    names, start = [cell.strip() for cell in rows[0]], int(header)
    body = rows[start:]
    return Table(
        str(path),
        names,
        lambda index: [row[index] if index < len(row) else MISSING for row in body],
        numbers[start:],
        header=header,
    )


def refuse_table(path: Source, text: str) -> None:
    """Raise ``DataError`` if a plain text is a table, whose rows would be read as texts: its first line is a header."""
    first, *rest = [line for line in text.lstrip()[:_LOOKED_AT].splitlines() if line.strip()]
    for delimiter, name in _DELIMITERS.items():
        cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
        known = any(named_like(cells, usual) for usual in TEXT_COLUMNS) and not any(" " in cell for cell in cells)
        even = all(line.count(delimiter) >= len(cells) - 1 for line in rest[:_LINES_OF_A_TABLE])
        if known and len(cells) > 1 and rest and even:
            suffix, line = ".tsv" if delimiter == "\t" else ".csv", f"{first!r:.60}"
            raise DataError(
                f"{path} is a table: its first line {line} has names with a {name} between them: rename it to {suffix}"
            )


def _best(path: Source, text: str, tabs: bool, wanted: Sequence[Column]) -> _Reading:
    """The reading of a table with the delimiter that fits it."""
    hint = _EXCEL_HINT.match(text)
    if hint and hint[1] in _DELIMITERS:
        return _sound(path, _read(text[hint.end() :], hint[1], first=2))
    if tabs and "\t" in text:  # quotes in a .tsv are part of the text, unless the rows are even only if they are not
        plain = _read(text, "\t", quoted=False)
        return plain if plain.even or '"' not in text else next((r for r in [_read(text, "\t")] if r.even), plain)
    readings = [_read(text, delimiter) for delimiter in _DELIMITERS if delimiter in text]
    several = [reading for reading in readings if reading.rows and reading.width > 1]
    for found in ([reading for reading in several if reading.even], several):
        named = [reading for reading in found if _has_name(reading.rows[0], wanted)]
        if len(found) == 1 or len(named) == 1:
            return _sound(path, (named or found)[0])
        if found:
            raise DataError(
                f"{path} does not show which delimiter it has ({'; '.join(reading.says() for reading in found)}): write it "
                f"with one kind of delimiter and with double quotes around cells that hold it, or as .jsonl"
            )
    return _sound(path, _read(text, ","))  # a single column


def _sound(path: Source, reading: _Reading) -> _Reading:
    if reading.error is not None:
        raise DataError(f"{path} is no table ({reading.error}): check its quotes and line ends")
    if not reading.rows:
        raise DataError(f"{path} is empty: give at least one example")
    return reading


def _read(text: str, delimiter: str, quoted: bool = True, first: int = 1) -> _Reading:
    rows, numbers = [], []
    with _cells_of_any_length():
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=quoted,
            skipinitialspace=delimiter != "\t",
        )
        try:
            for number, row in enumerate(reader, first):
                if any(cell.strip() for cell in row):
                    rows.append(row)
                    numbers.append(number)
        except csv.Error as error:
            return _Reading(delimiter, rows, numbers, f"{error}, line {reader.line_num}")
    return _Reading(delimiter, rows, numbers)


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Lift the limit that the csv module has for the length of a cell, and set it back: it holds for the whole process."""
    with _limit_lock:
        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _has_name(row: Sequence[str], wanted: Sequence[Column]) -> bool:
    """Whether a row has a usual name of a column, or one that the user gives. A number that the user gives is no name."""
    given = (name for name in wanted if isinstance(name, str) and not name.strip().isdecimal())
    return any(named_like(row, name) for name in (*TEXT_COLUMNS, *LABEL_COLUMNS, *given))


def _is_header(rows: Sequence[Sequence[str]], wanted: Sequence[Column]) -> bool:
    """Whether the first row of a table holds names of columns."""
    first, width = [cell.strip() for cell in rows[0]], len(rows[0])
    if _has_name(first, wanted) or (width > 1 and first == [str(index) for index in range(width)]):
        return True
    if len(rows) == 1 or any(map(is_number, first)) or any(len(row) != width for row in rows):
        return False
    columns = [[row[index] for row in rows[1:] if row[index].strip()] for index in range(width)]
    return any(cells and all(map(is_number, cells)) for cells in columns)
