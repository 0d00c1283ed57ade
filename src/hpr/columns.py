"""Data sets with columns (``datasets.Dataset``), and rows of model inputs, as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hpr.data import TEXT_COLUMNS, Batches, as_label
from hpr.errors import HprError
from hpr.profiling.objectives import IGNORED

_LABELS = ("label", "labels")


def read_columns(data: Any, labels: bool = False) -> tuple[list[Any], str, list[float] | None]:
    """Texts of a data set, or its rows of model inputs where it holds no text; its name; and its labels where wanted.

    Texts are taken from the column ``text`` or ``sentence``. Else every column of numbers is an input under its own name.
    Raises ``HprError`` for a data set without either.
    """
    names, title = list(data.column_names), "the data set given"
    if not len(data):
        raise HprError(f"{title} is empty: at least one example is needed")
    found = next((name for name in _LABELS if name in names), None)
    own = [as_label(value, index, title) for index, value in enumerate(data[found], 1)] if labels and found else None
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    if text is not None:
        return [str(value) for value in data[text]], title, own
    first = data[0]
    inputs = [name for name in names if (labels or name not in _LABELS) and _numeric(first[name])]
    if not inputs:
        raise HprError(f"{title} has columns {', '.join(names)}: a column 'text' or columns of numbers are needed")
    columns = {("labels" if name == "label" else name): data[name] for name in inputs}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], title, own


def input_batches(rows: Sequence[Mapping[str, Any]], batch_size: int = 64) -> Batches:
    """Rows of model inputs in their own order; what differs in length is filled up on the right: with 0, labels with −100.

    A row of ids without an ``attention_mask`` gets one. Raises ``HprError`` for rows with different columns.
    """
    for index, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise HprError(f"row {index} has columns {sorted(row)}, row 0 {sorted(rows[0])}: give all rows the same")
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = {name: _stacked([torch.as_tensor(row[name]) for row in part], name) for name in rows[0]}
        if "input_ids" in batch and "attention_mask" not in batch:
            batch["attention_mask"] = _stacked([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in part], "")
        batches.append(batch)
    return Batches(batches, range(len(rows)))


def _stacked(values: list[Tensor], name: str) -> Tensor:
    values = [value.float() if value.is_floating_point() else value for value in values]
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return pad_sequence(values, batch_first=True, padding_value=IGNORED if name == "labels" else 0)


def _numeric(value: Any) -> bool:
    try:
        return torch.as_tensor(value).dtype is not torch.bool
    except (TypeError, ValueError, RuntimeError):
        return False
