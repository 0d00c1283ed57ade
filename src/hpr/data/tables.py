"""Tables: columns with names, from a file or from memory, and how texts and labels are read from them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpr.errors import DataError

_log = logging.getLogger(__name__)
Column = str | int | None
TEXT_COLUMNS = ("text", "sentence", "texts", "sentences", "content", "document")
LABEL_COLUMNS = ("label", "labels")
MISSING: Any = object()  # the cell of a row that ends before its column
_INPUTS = ("input_ids", "inputs_embeds", "input_values", "input_features", "pixel_values")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 12  # names of columns in an error message


@dataclass(frozen=True)
class Table:
    """Columns with names. ``title`` names the table in error messages.

    ``read(index)`` returns the cells of one column, and ``MISSING`` where a row has no such cell. ``numbers`` holds the number
    of each row as the user counts them, and ``unit`` says what is counted: rows or lines. ``header`` is False if the table has
    no names of columns; ``names`` then holds the cells of the first row.
    """

    title: str
    names: Sequence[str]
    read: Callable[[int], Sequence[Any]]
    numbers: Sequence[int]
    unit: str = "row"
    header: bool = True

    def place(self, row: int, index: int) -> str:
        """The place of a cell, for error messages."""
        return (
            f"{self.title}, {self.unit} {self.numbers[row]}, column {self.names[index]!r}"
            if self.header
            else (f"{self.title}, {self.unit} {self.numbers[row]}, column number {index}")
        )

    def find(self, wanted: str | int, flag: str = "column") -> int:
        """The index of a column that the user names, or numbers from 0.

        Upper and lower case and spaces around a name do not count, unless only they tell two columns apart. Raises
        ``DataError`` if there is no such column, or more than one.
        """
        found = named_like(self.names, wanted) if self.header else []
        if len(found) > 1:
            raise DataError(
                f"{self.title} has {len(found)} columns with the name {wanted!r}, number {', '.join(map(str, found))}: "
                f"give the number of one, {_how(flag)}"
            )
        number = wanted if isinstance(wanted, int) else int(wanted) if wanted.strip().isdecimal() else -1
        if found or 0 <= number < len(self.names):
            return found[0] if found else number
        shown = f"number {number}" if number >= 0 or isinstance(wanted, int) else repr(wanted)
        raise DataError(f"{self.title} has no column {shown}, it has {self.shown()}: name one, {_how(flag)}")

    def known(self, names: Sequence[str], flag: str) -> int | None:
        """The index of the first of some usual names; None if no column has one of them."""
        present = [name for name in names if self.header and named_like(self.names, name)]
        return self.find(present[0], flag) if present else None

    def shown(self) -> str:
        """The columns, for error messages."""
        names = [f"{name!r:.40}" for name in self.names[:_SHOWN]]
        more = f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        return (
            f"{', '.join(names)}{more}"
            if self.header
            else f"{len(self.names)} columns without names ({', '.join(names)}{more})"
        )

    def text_column(self, column: Column) -> int | None:
        """The index of the column of texts: the one that is named, else a usual name, else the only column."""
        if column is not None:
            return self.find(column)
        index = self.known(TEXT_COLUMNS, "column")
        return 0 if index is None and len(self.names) == 1 else index

    def label_column(self, label: Column) -> int | None:
        """The index of the column of labels: the one that is named, else a usual name, else None."""
        return self.find(label, "label") if label is not None else self.known(LABEL_COLUMNS, "label")

    def texts(self, index: int) -> list[str]:
        """The texts of a column, stripped. A cell without a value is an empty text; a cell of another kind is an error."""
        texts = []
        for row, value in enumerate(self.read(index)):
            if value is MISSING:
                raise DataError(
                    f"{self.place(row, index)}: the {self.unit} has no such cell: correct or remove the {self.unit}"
                )
            if not isinstance(value, str | None):
                kind = type(value).__name__
                raise DataError(
                    f"{self.place(row, index)}: the cell is a {kind}, not a string: correct or remove the {self.unit}"
                )
            if value and LONE_SURROGATE.search(value):
                raise DataError(f"{self.place(row, index)}: the cell has half a character (a lone surrogate): remove it")
            texts.append((value or "").strip())
        return texts

    def labels(self, index: int) -> list[float]:
        """The labels of a column: class numbers or scores."""
        return [as_label(value, self.place(row, index)) for row, value in enumerate(self.read(index))]


def as_label(value: Any, place: str) -> float:
    """The label as a class number (int) or a score (float).

    ``place`` says in error messages which example of which data it is. Raises ``DataError`` for a value that is no finite
    number.
    """
    if value is MISSING or value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place}: there is no label: give a class number or a score")
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{place}: the label {value!r:.40} is no number: give a class number or a score") from error
    if not math.isfinite(score):
        raise DataError(f"{place}: the label {value!r} is not finite: give a class number or a score")
    return int(score) if score.is_integer() and "." not in str(value) else score


def read_table(
    table: Table, labels: bool = False, column: Column = None, label: Column = None
) -> tuple[list[Any], list[float] | None]:
    """The texts of a table or its rows of model inputs, and its labels if ``labels`` is set; None if it has no labels.

    Rows without a text are left out. A table without a column of texts holds model inputs if its columns are all numbers, or if
    one of them is ``input_ids`` or a like one: every column of numbers is then an input of the same name. Raises ``DataError``
    for a table with neither texts nor inputs, and for one without rows.
    """
    if not len(table.numbers):
        raise DataError(f"{table.title} is empty: give at least one example")
    marks = table.label_column(label) if labels or label is not None else None
    index = table.text_column(column)
    if index is None or (column is None and _no_text(table, index)):
        inputs = _inputs(table, marks, labels)
        if inputs is not None:
            return inputs, table.labels(marks) if labels and marks is not None else None
        if index is None:
            raise DataError(
                f"{table.title} has no column {TEXT_COLUMNS[0]!r} or {TEXT_COLUMNS[1]!r}, it has {table.shown()}: "
                f"name the column of texts, {_how('column')}"
            )
    texts = table.texts(index)
    numbers = table.labels(marks) if labels and marks is not None else None
    kept = [row for row, text in enumerate(texts) if text]
    if not kept:
        raise DataError(f"{table.title} holds no text: give at least one line of text")
    if len(kept) < len(texts):
        empty = next(row for row, text in enumerate(texts) if not text)
        if numbers is not None:
            raise DataError(
                f"{table.title} has {len(kept)} examples and {len(numbers)} labels: give each text one label; "
                f"{table.unit} {table.numbers[empty]} has no text"
            )
        _log.info(
            "%s: %d rows without a text are left out, the first is %s %d",
            *(table.title, len(texts) - len(kept), table.unit, table.numbers[empty]),
        )
    return [texts[row] for row in kept], numbers


def named_like(names: Sequence[str], wanted: str | int) -> list[int]:
    """The indices of the columns with a name; those that differ only in case or outer spaces if none is equal."""
    if isinstance(wanted, int):
        return []
    same = [index for index, name in enumerate(names) if name == wanted]
    return same or [index for index, name in enumerate(names) if name.strip().casefold() == wanted.strip().casefold()]


def is_number(cell: Any) -> bool:
    """Whether a cell of a text file holds a number."""
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _how(flag: str) -> str:
    return f"with --{flag} NAME or --{flag} NUMBER from 0 (in Python: hpr.extras.Columns(data, {flag}=...))"


def _no_text(table: Table, index: int) -> bool:
    """Whether a column that has no usual name holds no texts, such as the only column ``input_ids``."""
    return (
        bool(table.header)
        and not any(named_like([table.names[index]], name) for name in TEXT_COLUMNS)
        and not any(isinstance(value, str) for value in table.read(index)[:1])
    )


def _inputs(table: Table, marks: int | None, labels: bool) -> list[Any] | None:
    """The rows of model inputs in the columns of numbers, with the labels if ``labels`` is set; None if there are none."""
    columns, words = {}, False
    for index, name in enumerate(table.names):
        cells = table.read(index)
        words = words or isinstance(cells[0], str)
        label = index == marks or any(named_like([name], usual) for usual in LABEL_COLUMNS)
        if _numeric(cells[0]) and (labels or not label):
            columns["labels" if index == marks else name] = (index, cells)
    if not columns or (words and not any(name in columns for name in _INPUTS)):
        return None
    for index, cells in columns.values():
        wrong = next((row for row, value in enumerate(cells) if value is None or value is MISSING), None)
        if wrong is not None:
            raise DataError(f"{table.place(wrong, index)}: the cell is empty: correct or remove the {table.unit}")
    _log.info("%s has no column of text, so its columns of numbers are model inputs: %s", table.title, ", ".join(columns))
    return [dict(zip(columns, row, strict=True)) for row in zip(*(cells for _, cells in columns.values()), strict=True)]


def _numeric(value: Any) -> bool:
    """Whether a cell holds numbers. Truth values are none."""
    try:
        return torch.as_tensor(value).dtype is not torch.bool
    except (TypeError, ValueError, RuntimeError):
        return False
