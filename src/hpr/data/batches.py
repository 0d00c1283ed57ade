"""Makes batches of model inputs from texts, arrays and rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hpr.data.files import Source, read_array
from hpr.errors import DataError, HprError
from hpr.runtime.batch import IGNORED, POSITIONAL, Batch, BatchLike, as_batch, examples_in
from hpr.runtime.torch_errors import lacks_memory

_log = logging.getLogger(__name__)


class Batches(list[Batch]):
    """A list of batches that knows the order of its examples.

    ``order[i]`` is the index, in the user's data, of the i-th example of all batches together.
    """

    def __init__(self, batches: Iterable[Batch], order: Sequence[int]):
        super().__init__(batches)
        self.order = list(order)


def listed(data: Any) -> Any:
    """The elements of a generator or a ``DataLoader`` as a list, because they can be read only once; other data unchanged."""
    once = hasattr(data, "__iter__") and not hasattr(data, "__getitem__") and not hasattr(data, "column_names")
    return list(data) if once else data


def given_batches(data: Any) -> list[Batch] | None:
    """The batches as mappings if the data is a list of batches of model inputs; None for any other kind of data.

    A batch is a tensor, or a mapping of tensors of which at least one has two dimensions. Tensors of rows have one dimension.
    """
    if not isinstance(data, list | tuple) or not data or not _is_batch(data[0]):
        return None
    return [as_batch(batch) for batch in data]


def _is_batch(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return isinstance(value, Tensor)
    tensors = [tensor for tensor in value.values() if isinstance(tensor, Tensor)]
    return 0 < len(tensors) == len(value) and max(tensor.dim() for tensor in tensors) > 1


def in_input_order(rows: Shaped[Tensor, "examples ..."], batches: Sequence[BatchLike]) -> Shaped[Tensor, "examples ..."]:
    """Rows that were computed batch by batch, sorted into the order of the user's data.

    The rows come back unchanged if ``batches`` is a plain list. Raises ``HprError`` if there is not one row for each example.
    """
    order = getattr(batches, "order", None)
    if order is None:
        return rows
    if len(order) != len(rows):
        raise HprError(f"{len(rows)} rows for batches of {len(order)} examples: give one row for each example")
    restored = torch.empty_like(rows)
    restored[torch.tensor(order, device=rows.device)] = rows
    return restored


def first_batches(batches: Sequence[Batch], examples: int) -> list[Batch]:
    """The fewest whole batches from the start that hold at least ``examples`` examples, or all batches."""
    chosen, count = [], 0
    for batch in batches:
        if count >= examples:
            break
        chosen.append(batch)
        count += examples_in(batch)
    return chosen


def text_batches(
    texts: Sequence[str],
    tokenizer: Any,
    batch_size: int = 64,
    max_length: int = 256,
    windows: int | None = None,
    ratio: float = 2.0,
) -> Batches:
    """Batches of tokenised texts: ``input_ids``, ``attention_mask`` and the tokenizer's further rows, int64 (batch, positions).

    A text of more than ``max_length`` tokens loses its end. If ``windows`` is given, the text is cut into several examples of
    about equal length instead. ``windows`` is then the highest number of examples in all, and ``order`` counts these examples.

    A batch holds texts of similar length, so that it needs little padding: no text is more than ``ratio`` times as long as the
    shortest one. The batches are shuffled with a fixed seed, so that the first few are a fair sample. Padding is on the right
    and masked. The tokenizer is not changed, even if it has no padding token.

    Raises ``DataError`` if there are no texts, if a text is no string, and if a text has no tokens; ``HprError`` for a
    ``batch_size`` or ``max_length`` below 1.
    """
    if isinstance(texts, str):
        raise DataError("texts is one string: give a list of strings")
    if batch_size < 1 or max_length < 1:
        raise HprError(f"batch_size is {batch_size} and max_length is {max_length}: give at least 1 for both")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} is a {type(text).__name__}, not a string: convert or remove it")
    if not len(texts):
        raise DataError("there are no texts: give at least one")
    longest = getattr(tokenizer, "model_max_length", max_length)
    if not (isinstance(longest, int | float) and longest >= 1):
        raise HprError(f"the tokenizer's model_max_length is {longest!r}: correct it to the number of tokens the model takes")
    limit = int(min(max_length, longest))
    if windows is None:
        rows = _tokenized(tokenizer, texts, truncation=True, max_length=limit)
        if full := sum(len(ids) >= limit for ids in rows["input_ids"]):
            _log.info("%d of %d texts have %d tokens or more: the tokenizer cuts off the rest", full, len(texts), limit)
    else:
        rows = _windows(_tokenized(tokenizer, texts, truncation=False, verbose=False), limit, windows)
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


def _tokenized(tokenizer: Any, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
    try:
        return dict(tokenizer(list(texts), **options))
    except Exception as error:  # tokenizers raises the bare class, for a vocabulary without its own unknown token for one
        if lacks_memory(error):
            raise
        message = " ".join(str(error).split())
        raise DataError(
            f"{type(tokenizer).__name__} cannot read the texts ({message:.200}): give a tokenizer that does, or save it again"
        ) from error


def labelled(batches: Batches, labels: Sequence[float]) -> Batches:
    """The same batches with ``labels`` of shape (batch,).

    ``labels`` has one label for each example, in the order of the user's data. Raises ``DataError`` if there is not one
    label for each example.
    """
    if len(labels) != len(batches.order):
        raise DataError(f"{len(labels)} labels for {len(batches.order)} examples: give one label for each example")
    places = iter(batches.order)
    rows = [torch.tensor([labels[next(places)] for _ in range(examples_in(batch))]) for batch in batches]
    return Batches([{**batch, "labels": row} for batch, row in zip(batches, rows, strict=True)], batches.order)


def array_batches(
    source: Source | Shaped[np.ndarray, "examples ..."],
    key: str | None = None,
    batch_size: int = 64,
    argument: str | None = None,
) -> Batches:
    """Batches of an array whose first axis counts examples, in the order of the array: float32, or int64 for integers.

    ``key`` names the array in an ``.npz``. ``argument`` names the model's input, such as ``input_values``; by default it is
    the positional input. Raises ``DataError`` for a damaged or empty array and for values that are not finite in float32, and
    ``HprError`` for a ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise HprError(f"batch_size is {batch_size}: give at least 1")
    array = read_array(source, key)
    with np.errstate(over="ignore"):  # the check below finds values that overflow
        tensor = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    if not torch.isfinite(tensor).all():
        raise DataError("the array has values beyond the range of float32 (3.4e38): scale it")
    parts = tensor.split(batch_size)
    return Batches([{argument or POSITIONAL: part} for part in parts], range(len(tensor)))


def _windows(rows: Mapping[str, list[list[int]]], limit: int, most: int) -> dict[str, list[list[int]]]:
    """Cut rows into the fewest parts of at most ``limit`` tokens and of about equal length; return the first ``most`` parts."""
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
    """The indices of the texts of each batch, by length. Without ``ratio`` one very long text would pad a whole batch."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) == batch_size or lengths[place] > ratio * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(place)
    return groups


def _padding(tokenizer: Any) -> dict[str, int]:
    """The padding value of each kind of row.

    A tokenizer without a padding token pads with its end token, which is a valid id. Its value has no effect, because padding
    is masked.
    """
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "unk_token_id"))
    token = next((candidate for candidate in candidates if candidate is not None), 0)
    if getattr(tokenizer, "pad_token_id", None) is None:
        _log.info("the tokenizer has no padding token: masked positions are filled with token %d", token)
    return {"input_ids": token, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of token ids as one tensor (batch, positions), filled up on the right with ``value``."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def input_batches(rows: Sequence[Mapping[str, Any]], batch_size: int = 64) -> Batches:
    """Batches of rows of model inputs, in the order of the rows.

    A row is a mapping of input names to values. Values of different length are filled up on the right: labels with −100, other
    inputs with 0. Rows of ``input_ids`` without an ``attention_mask`` get one. Raises ``DataError`` for rows with different
    columns.
    """
    for index, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise DataError(
                f"row {index} has columns {sorted(row)}, row 0 has {sorted(rows[0])}: give all rows the same columns"
            )
    if rows and "input_ids" in rows[0] and "attention_mask" not in rows[0]:
        _log.info("rows have no attention_mask: every token of a row counts as real, and padding is masked")
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = {name: _stacked([torch.as_tensor(row[name]) for row in part], name) for name in rows[0]}
        if "input_ids" in batch and "attention_mask" not in batch:
            batch["attention_mask"] = _stacked([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in part], "")
        batches.append(batch)
    return Batches(batches, range(len(rows)))


def _stacked(values: list[Tensor], name: str) -> Tensor:
    """The values of one column as one tensor; ``name`` decides about the padding value."""
    values = [value.float() if value.is_floating_point() else value for value in values]
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return pad_sequence(values, batch_first=True, padding_value=IGNORED if name == "labels" else 0)
