"""Reads data sets with columns as tables: ``datasets.Dataset``, Arrow tables, data frames, and files of Parquet and Arrow."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from hpr.data.contents import Source, content_of, suffix_of
from hpr.data.json_rows import table_of_objects
from hpr.data.tables import Column, Table, read_table
from hpr.errors import DataError

_TITLE = "the data set given"


def read_columns(
    data: Any, labels: bool = False, column: Column = None, label: Column = None
) -> tuple[list[Any], str, list[float] | None]:
    """The texts of a data set or its rows of model inputs, a name for error messages, and its labels if ``labels`` is set.

    ``column`` and ``label`` name the columns of texts and labels, which are ``text`` or ``sentence`` and ``label`` by default.
    In a data set without texts, every column of numbers is a model input of the same name. Raises ``DataError`` for an empty
    data set, and for one without texts and numbers.
    """
    table = table_of(data)
    values, numbers = read_table(table, labels, column, label)
    return values, table.title, numbers


def table_of(data: Any) -> Table:
    """A data set, Arrow table, data frame or list of objects as a table. Raises ``DataError`` for a stream without a length."""
    if is_frame(data):
        names = [str(name) for name in data.columns]
        return Table(_TITLE, names, lambda index: _without_gaps(data.iloc[:, index]), range(1, len(data) + 1))
    if isinstance(data, list | tuple):
        return table_of_objects(_TITLE, data, range(1, len(data) + 1))
    if not hasattr(data, "__len__"):
        raise DataError(f"{_TITLE} is a stream without a length: give a part of it, such as list(data.take(10000))")
    if hasattr(data, "to_pylist"):
        return _arrow_table(_TITLE, data)
    names = list(data.column_names)
    return Table(_TITLE, names, lambda index: data[names[index]], range(1, len(data) + 1))


def is_frame(data: Any) -> bool:
    """Whether the data is a data frame of pandas, whose elements as an iterable are names of columns."""
    return hasattr(data, "iloc") and hasattr(data, "columns")


def are_objects(data: Any) -> bool:
    """Whether the data is a list of objects with texts in them, not of rows of model inputs."""
    if not isinstance(data, list | tuple) or not all(isinstance(row, Mapping) for row in data):
        return False
    return any(isinstance(value, str) for row in data for value in row.values())


def read_arrow(path: Source, wanted: Sequence[Column] = ()) -> Table:
    """The table in a file of Parquet, Arrow (file or stream) or Feather. It needs pyarrow, which ``hpr[data]`` installs."""
    content = content_of(path)
    if not content:
        raise DataError(f"{path} is empty: give at least one example")
    arrow = _pyarrow(path)
    try:
        table = _arrow_content(arrow, io.BytesIO(content), suffix_of(path), content[:6])
        table.validate(full=True)  # damaged offsets would be read beyond the end of the buffer
        return _arrow_table(str(path), table)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Parquet" if suffix_of(path) == ".parquet" else "Arrow"
        raise DataError(f"{path} is no {kind} file or is damaged ({error!s:.200}): write it again, or as .jsonl") from error


def _arrow_content(arrow: ModuleType, source: io.BytesIO, suffix: str, start: bytes) -> Any:
    if suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(source)
    if start.startswith(b"FEA1"):
        from pyarrow import feather

        return feather.read_table(source)
    reader = arrow.ipc.open_file if start == b"ARROW1" else arrow.ipc.open_stream
    return reader(source).read_all()


def _arrow_table(title: str, data: Any) -> Table:
    return Table(title, list(data.column_names), lambda index: data.column(index).to_pylist(), range(1, data.num_rows + 1))


def _pyarrow(path: Source) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'hpr[data]', or convert the file to .jsonl") from error
    return pyarrow


def _without_gaps(series: Any) -> list[Any]:
    """The values of a column of a data frame, with None where one is missing."""
    return [None if gap else value for value, gap in zip(series.tolist(), series.isna(), strict=True)]
