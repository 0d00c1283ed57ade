"""Reads data sets with columns (``datasets.Dataset``) as texts or as rows of model inputs."""

from __future__ import annotations

import logging
from typing import Any

import torch

from hpr.data.files import TEXT_COLUMNS, as_label
from hpr.errors import DataError

_log = logging.getLogger(__name__)
_LABELS = ("label", "labels")


def read_columns(data: Any, labels: bool = False) -> tuple[list[Any], str, list[float] | None]:
    """The texts of a data set or its rows of model inputs, a name for error messages, and its labels if ``labels`` is set.

    Texts come from the column ``text`` or ``sentence``. In a data set without these, every column of numbers is a model input
    of the same name. Raises ``DataError`` for an empty data set, and for one without texts and numbers.
    """
    names, title = list(data.column_names), "the data set given"
    if not len(data):
        raise DataError(f"{title} is empty: give at least one example")
    label_column = next((name for name in _LABELS if name in names), None)
    values = data[label_column] if labels and label_column else None
    numbers = None if values is None else [as_label(value, index, title) for index, value in enumerate(values, 1)]
    text_column = next((name for name in TEXT_COLUMNS if name in names), None)
    if text_column is not None:
        return [str(value) for value in data[text_column]], title, numbers
    first = data[0]
    inputs = [name for name in names if (labels or name not in _LABELS) and _numeric(first[name])]
    if not inputs:
        raise DataError(f"{title} has columns {', '.join(names)}: give a column 'text' or columns of numbers")
    _log.info("%s has no column of text, so its columns of numbers are model inputs: %s", title, ", ".join(inputs))
    columns = {("labels" if name == "label" else name): data[name] for name in inputs}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], title, numbers


def _numeric(value: Any) -> bool:
    """Whether a cell holds numbers. Truth values are none."""
    try:
        return torch.as_tensor(value).dtype is not torch.bool
    except (TypeError, ValueError, RuntimeError):
        return False
