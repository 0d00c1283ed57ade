"""Data sets with columns (``datasets.Dataset``), and rows of model inputs, as batches."""

from __future__ import annotations

import logging
from typing import Any

import torch

from hpr.data.files import TEXT_COLUMNS, as_label
from hpr.errors import DataError

_log = logging.getLogger(__name__)
_LABELS = ("label", "labels")


def read_columns(data: Any, labels: bool = False) -> tuple[list[Any], str, list[float] | None]:
    """Texts of a data set, or its rows of model inputs where it holds no text; its name; and its labels where wanted.

    Texts are taken from the column ``text`` or ``sentence``. Else every column of numbers is an input under its own name.
    Raises ``DataError`` for a data set without either.
    """
    names, title = list(data.column_names), "the data set given"
    if not len(data):
        raise DataError(f"{title} is empty: at least one example is needed")
    found = next((name for name in _LABELS if name in names), None)
    own = [as_label(value, index, title) for index, value in enumerate(data[found], 1)] if labels and found else None
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    if text is not None:
        return [str(value) for value in data[text]], title, own
    first = data[0]
    inputs = [name for name in names if (labels or name not in _LABELS) and _numeric(first[name])]
    if not inputs:
        raise DataError(f"{title} has columns {', '.join(names)}: a column 'text' or columns of numbers are needed")
    _log.info("%s has no column of text: its columns of numbers are read as inputs: %s", title, ", ".join(inputs))
    columns = {("labels" if name == "label" else name): data[name] for name in inputs}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], title, own


def _numeric(value: Any) -> bool:
    try:
        return torch.as_tensor(value).dtype is not torch.bool
    except (TypeError, ValueError, RuntimeError):
        return False
