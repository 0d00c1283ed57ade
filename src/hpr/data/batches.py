"""Batches of model inputs, made of texts, arrays and rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hpr.data.files import Source, read_array
from hpr.errors import DataError, HprError
from hpr.runtime.batch import IGNORED, POSITIONAL, Batch, BatchLike, as_batch, examples_in

_log = logging.getLogger(__name__)


class Batches(list[Batch]):
    """A list of batches. ``order[i]`` is the place in the user's data of the i-th example, counted through all batches."""

    def __init__(self, batches: Iterable[Batch], order: Sequence[int]):
        super().__init__(batches)
        self.order = list(order)


def listed(data: Any) -> Any:
    """A list of what a generator or a ``DataLoader`` gives, which can be read only once; other data as it is."""
    once = hasattr(data, "__iter__") and not hasattr(data, "__getitem__") and not hasattr(data, "column_names")
    return list(data) if once else data


def given_batches(data: Any) -> list[Batch] | None:
    """The batches, if the data is a list of batches of model inputs already; None for any other kind of data.

    A batch is a tensor, or a mapping of tensors, at least one of which has two dimensions: rows of inputs have one.
    """
    if not isinstance(data, list | tuple) or not data or not _is_batch(data[0]):
        return None
    return [as_batch(batch) for batch in data]


def _is_batch(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return isinstance(value, Tensor)
    tensors = [tensor for tensor in value.values() if isinstance(tensor, Tensor)]
    return 0 < len(tensors) == len(value) and max(tensor.dim() for tensor in tensors) > 1


def in_input_order(rows: Tensor, batches: Sequence[BatchLike]) -> Tensor:
    """Rows that were computed batch by batch, (n, …), in the order of the user's data; unchanged for a plain list."""
    order = getattr(batches, "order", None)
    if order is None:
        return rows
    if len(order) != len(rows):
        raise HprError(f"{len(rows)} rows for batches of {len(order)} examples: give one row for each example")
    restored = torch.empty_like(rows)
    restored[torch.tensor(order, device=rows.device)] = rows
    return restored


def first_batches(batches: Sequence[Batch], examples: int) -> list[Batch]:
    """The batches, whole, that hold at least the first ``examples``."""
    kept, count = [], 0
    for batch in batches:
        if count >= examples:
            break
        kept.append(batch)
        count += examples_in(batch)
    return kept


def text_batches(
    texts: Sequence[str],
    tokenizer: Any,
    batch_size: int = 64,
    max_length: int = 256,
    windows: int | None = None,
    ratio: float = 2.0,
) -> Batches:
    """Tokenised batches of ``input_ids``, ``attention_mask`` and what else the tokenizer gives, int64 (batch, positions).

    A text of more than ``max_length`` tokens loses its end; or, with ``windows``, it goes on in further examples of about
    equal length, so many in all at most (``order`` then counts these).

    Texts of like length stand together, so little is padded (a batch is smaller where the next text is over ``ratio`` times
    as long as its first); the batches are shuffled, always in the same way, so that any few are a fair sample. Padding is
    on the right and masked; a tokenizer without a padding token is left as it is. Raises ``DataError`` for no texts, for what
    is no string, and for a text without tokens.
    """
    if isinstance(texts, str):
        raise DataError("texts is one string: give a list of strings")
    if batch_size < 1 or max_length < 1:
        raise HprError(f"batch_size {batch_size} and max_length {max_length} must both be at least 1")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} is a {type(text).__name__}, not a string: convert or remove it")
    if not len(texts):
        raise DataError("there are no texts: at least one is needed")
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    if windows is None:
        rows = dict(tokenizer(list(texts), truncation=True, max_length=limit))
        if full := sum(len(ids) >= limit for ids in rows["input_ids"]):
            _log.info("%d of %d texts have %d tokens or more: what goes beyond that is cut off", full, len(texts), limit)
    else:
        rows = _windows(dict(tokenizer(list(texts), truncation=False, verbose=False)), limit, windows)
        _log.info("%d texts are read as %d examples of at most %d tokens", len(texts), len(rows["input_ids"]), limit)
    lengths = [len(ids) for ids in rows["input_ids"]]
    if 0 in lengths:
        empty = lengths.index(0)
        shown = f" ({texts[empty]!r:.60})" if windows is None else ""
        raise DataError(f"text {empty}{shown} has no tokens: remove it")
    groups = _groups(lengths, batch_size, ratio)
    random.Random(0).shuffle(groups)
    padding = _padding(tokenizer)
    rows.setdefault("attention_mask", [[1] * length for length in lengths])
    rows = {key: row for key, row in rows.items() if [len(values) for values in row] == lengths}
    batches = [{key: _padded([row[i] for i in group], padding.get(key, 0)) for key, row in rows.items()} for group in groups]
    return Batches(batches, [index for group in groups for index in group])


def labelled(batches: Batches, labels: Sequence[float]) -> Batches:
    """The same batches with ``labels``, (batch,): one for each example, in the order of the user's data.

    Raises ``DataError`` if there is not one label for each example.
    """
    if len(labels) != len(batches.order):
        raise DataError(f"{len(labels)} labels for {len(batches.order)} examples: give one label for each example")
    places = iter(batches.order)
    rows = [torch.tensor([labels[next(places)] for _ in range(examples_in(batch))]) for batch in batches]
    return Batches([{**batch, "labels": row} for batch, row in zip(batches, rows, strict=True)], batches.order)


def array_batches(
    source: Source | np.ndarray, key: str | None = None, batch_size: int = 64, argument: str | None = None
) -> Batches:
    """Tensor batches of an array whose first axis counts examples, in its own order: float32, or int64 for integers.

    ``key`` names the array in an ``.npz``; ``argument`` names the model's input (``input_values``), by default the positional
    one.
    """
    if batch_size < 1:
        raise HprError(f"batch_size {batch_size} must be at least 1")
    array = read_array(source, key)
    with np.errstate(over="ignore"):  # what overflows is found below
        tensor = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    if not torch.isfinite(tensor).all():
        raise DataError("the array has values beyond the range of float32 (3.4e38): scale it")
    parts = tensor.split(batch_size)
    return Batches([{argument or POSITIONAL: part} for part in parts], range(len(tensor)))


def _windows(rows: Mapping[str, list[list[int]]], limit: int, most: int) -> dict[str, list[list[int]]]:
    """Rows cut into the fewest parts of at most ``limit``, as equal as they can be; the first ``most`` parts of all."""
    parts: dict[str, list[list[int]]] = {key: [] for key in rows}
    for place, ids in enumerate(rows["input_ids"]):
        if len(parts["input_ids"]) >= most:
            break
        count = -(-len(ids) // limit) or 1
        cuts = [len(ids) * number // count for number in range(count + 1)]
        for key, row in rows.items():
            parts[key] += [row[place][start:stop] for start, stop in pairwise(cuts)]
    return {key: row[:most] for key, row in parts.items()}


def _groups(lengths: Sequence[int], batch_size: int, ratio: float) -> list[list[int]]:
    """Places of texts that go into one batch, by length. A few very long ones would otherwise pad a whole batch."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) == batch_size or lengths[place] > ratio * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(place)
    return groups


def _padding(tokenizer: Any) -> dict[str, int]:
    """What fills up each kind of row. Without a padding token any id does, as it is masked; the end token is always valid."""
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "unk_token_id"))
    token = next((candidate for candidate in candidates if candidate is not None), 0)
    if getattr(tokenizer, "pad_token_id", None) is None:
        _log.info("the tokenizer has no padding token: masked positions are filled with token %d", token)
    return {"input_ids": token, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def input_batches(rows: Sequence[Mapping[str, Any]], batch_size: int = 64) -> Batches:
    """Rows of model inputs in their own order; what differs in length is filled up on the right: with 0, labels with −100.

    A row of ids without an ``attention_mask`` gets one. Raises ``DataError`` for rows with different columns.
    """
    for index, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise DataError(f"row {index} has columns {sorted(row)}, row 0 {sorted(rows[0])}: give all rows the same")
    if rows and "input_ids" in rows[0] and "attention_mask" not in rows[0]:
        _log.info("rows have no attention_mask: every given token counts as real")
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
