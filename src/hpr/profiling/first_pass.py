"""The first pass under guard: what a model cannot read is said in words before minutes are spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpr.errors import DataError, HprError
from hpr.profiling.objectives import Objective
from hpr.profiling.outputs import first_not_finite
from hpr.runtime.batch import POSITIONAL, Batch, examples_in, first_examples
from hpr.runtime.hooks import eval_mode, run, to_device_of
from hpr.runtime.torch_errors import brief, lacks_memory

REFUSALS = (  # what models of transformers and torch raise for inputs that do not fit
    RuntimeError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    NotImplementedError,
    ZeroDivisionError,
)
_IDS = ("input_ids", "decoder_input_ids")
_TRIED = 2  # examples of a batch that are run: some models refuse more than one


def check_weights(model: nn.Module) -> None:
    """Raise ``HprError`` for a weight that is not finite, or that is on the meta device."""
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise HprError(f"the weight {path} has no numbers (it is on the meta device): load the model's weights first")
    if (name := not_finite(model)) is not None:
        parameter = model.get_parameter(name)
        place = tuple(int(part) for part in (~torch.isfinite(parameter)).nonzero()[0])
        value = float(parameter.detach()[place])
        raise HprError(f"the weight {name} is not finite at {list(place)} ({value}): load or train the model again")


def not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter with a number that is not finite, None if there is none."""
    return next((name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())), None)


def check_batches(model: nn.Module, batches: Sequence[Batch], objective: Objective) -> None:
    """Raise ``DataError`` if the model cannot read a batch, and ``HprError`` if the objective cannot read its outputs.

    Every batch is looked at. A few examples of the first and of the longest one are run.
    """
    if not len(batches):
        raise DataError("there are no batches: give at least one")
    longest = max(range(len(batches)), key=lambda index: _positions(batches[index]))
    with torch.no_grad(), eval_mode(model):
        for index, batch in enumerate(batches):
            if wrong := _wrong(batch):
                raise DataError(f"the model cannot read batch {index} ({_described(batch)}): {wrong}")
            outside = _outside(model, batch)
            if outside and any(parameter.device.type != "cpu" for parameter in model.parameters()):
                raise DataError(f"the model cannot read batch {index}: {outside}")  # on a device this would end the process
            if outside or index in (0, longest):
                count = examples_in(batch) if outside else _TRIED
                _try(model, to_device_of(batch, model), index, objective, count)


def readable_part(model: nn.Module, batch: Batch, count: int) -> tuple[Batch, Any]:
    """The first examples of a batch, at most ``count``, and the model's outputs for them.

    Some inputs are packed in ways that only their model knows: if it cannot read a part, it gets the whole batch.
    """
    part = first_examples(batch, count)
    try:
        return part, run(model, part)
    except REFUSALS as error:
        if lacks_memory(error):
            raise
    return batch, run(model, batch)


def _try(model: nn.Module, batch: Batch, index: int, objective: Objective, count: int) -> None:
    with reading(model, batch, index):
        part, outputs = readable_part(model, batch, count)
    predictions, weight = objective.read(outputs, part)
    if weight.shape != predictions.shape[:-1]:
        raise HprError(
            f"objective {objective.name!r} does not fit the outputs of {type(model).__name__}, of shape "
            f"{tuple(predictions.shape)}: give another objective"
        )
    if (example := first_not_finite(predictions, weight)) is not None:
        check_weights(model)
        dtype = next(model.parameters()).dtype
        mend = "remove the example" if dtype == torch.float32 else f"load the model in float32 instead of {dtype}"
        raise DataError(
            f"the output of {type(model).__name__} is not finite on batch {index}, example {example}, although its inputs and "
            f"weights are: {mend}"
        )


@contextmanager
def reading(model: nn.Module, batch: Batch, index: int) -> Iterator[None]:
    """Turn what a model raises for a batch inside the block into a ``DataError`` with the batch, the value and the mend."""
    try:
        yield
    except HprError:
        raise
    except REFUSALS as error:
        if lacks_memory(error):
            raise
        why = _outside(model, batch) or (
            f"{type(error).__name__}, {brief(error)}: give inputs as the forward method of {type(model).__name__} takes them"
        )
        raise DataError(f"the model cannot read batch {index} ({_described(batch)}): {why}") from error


def _wrong(batch: Batch) -> str:
    """What no model can read in a batch, with the mend; empty if there is nothing of the kind."""
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            row = int((~torch.isfinite(value)).nonzero()[0][0])
            return f"{name} is not finite in example {row}: remove or correct the example"
    for name in _IDS:
        ids = batch.get(name)
        if not isinstance(ids, Tensor):
            continue
        if ids.is_floating_point() or ids.is_complex():
            return f"{name} is {ids.dtype}, token ids are whole numbers: convert it to int64"
        if ids.dim() < 2:
            return f"{name} has shape {tuple(ids.shape)}: give (examples, positions)"
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.dim() == ids.dim() and mask.shape != ids.shape:
        return f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: give each position one number"
    return ""


def _outside(model: nn.Module, batch: Batch) -> str:
    """Which token id lies outside the model's table, with the mend; empty if none does. Few models read such ids."""
    size = _table_size(model)
    for name in _IDS:
        ids = batch.get(name)
        if size is None or not isinstance(ids, Tensor) or not ids.numel():
            continue
        if not (int(ids.min()) >= 0 and int(ids.max()) < size):
            first = ids[(ids < 0) | (ids >= size)][0]
            return (
                f"{name} has the id {int(first)}, but the table of {type(model).__name__} has ids from 0 to {size - 1}: "
                f"use the tokenizer that belongs to the model"
            )
    return ""


def _table_size(model: nn.Module) -> int | None:
    """The number of rows of the model's table of tokens, None if it has none."""
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return None
    try:
        table = get()
    except (NotImplementedError, AttributeError):  # models of images and sounds
        return None
    size = getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _positions(batch: Batch) -> int:
    sizes = [value[0].numel() for value in batch.values() if isinstance(value, Tensor) and value.dim() and len(value)]
    return max(sizes, default=0)


def _described(batch: Batch) -> str:
    """The names, types and shapes of a batch's tensors."""
    parts = []
    for name, value in batch.items():
        kind = (
            f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}" if isinstance(value, Tensor) else str(type(value))
        )
        parts.append(kind if name == POSITIONAL else f"{name} {kind}")
    return ", ".join(parts)
