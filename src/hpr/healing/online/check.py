"""Checks of a batch before an online learner learns from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hpr.data.targets import longest_input
from hpr.errors import DataError
from hpr.profiling.objectives import OBJECTIVES
from hpr.runtime.batch import IGNORED, Batch


def check_tensors(batch: Batch) -> None:
    """Raise ``DataError`` if a value of a batch is not a tensor."""
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{name!r} of a batch is a {type(value).__name__}, not a tensor: convert it")


class BatchCheck:
    """Compares a batch with the batches of the validation set, which the model has read, and with the model's limits."""

    def __init__(self, model: nn.Module, objective: str, validation: Sequence[Batch]):
        self._needed = [name for name in validation[0] if all(name in batch for batch in validation)]
        self._like = {name: value for batch in reversed(validation) for name, value in batch.items()}
        self._limits = _limits(model, objective)
        self._positions = longest_input(model)

    def __call__(self, batch: Batch) -> str | None:
        """Say what is wrong with a batch, None if nothing is."""
        if not batch:
            return "the batch is empty"
        for check in (self._finite, self._complete, self._sizes, self._short_enough, self._in_range):
            if fault := check(batch):
                return fault
        return None

    def _finite(self, batch: Batch) -> str | None:
        finite = all(torch.isfinite(value).all() for value in batch.values() if value.is_floating_point())
        return None if finite else "the batch is not finite"

    def _complete(self, batch: Batch) -> str | None:
        missing = next((name for name in self._needed if name not in batch), None)
        return None if missing is None else f"the batch has no {missing!r}, which every batch for validation has"

    def _sizes(self, batch: Batch) -> str | None:
        counts = {name: len(value) if value.dim() else 1 for name, value in batch.items()}
        if len(set(counts.values())) > 1:
            return "the inputs have different numbers of examples: " + ", ".join(
                f"{name} {count}" for name, count in counts.items()
            )
        for name, value in batch.items():
            if not value.numel():
                return f"{name} holds no values"
            like = self._like.get(name)
            if like is None:
                continue
            if value.dim() != like.dim():
                return f"{name} has {value.dim()} dimensions, and {like.dim()} in the batches for validation"
            if value.is_floating_point() != like.is_floating_point():
                return f"{name} is {_dtype(value)}, and {_dtype(like)} in the batches for validation"
        return None

    def _short_enough(self, batch: Batch) -> str | None:
        ids = batch.get("input_ids")
        if ids is None or ids.shape[-1] <= self._positions:
            return None
        return f"input_ids has {ids.shape[-1]} positions, and the model takes {self._positions}"

    def _in_range(self, batch: Batch) -> str | None:
        """The first id or class that the model has nothing for. On a GPU, reading it would end the process."""
        for name, limit in self._limits.items():
            value = batch.get(name)
            if value is None or value.is_floating_point():
                continue
            valid = (value >= 0) & (value < limit) | (value == IGNORED if name == "labels" else False)
            if not valid.all():
                return f"{name} holds {int(value[~valid][0])}, which is not one of 0 to {limit - 1}"
        return None


def _limits(model: nn.Module, objective: str) -> dict[str, int]:
    """The number of tokens or classes that an input may name, for token ids, and for labels that are tokens or classes."""
    labels = OBJECTIVES[objective].labels
    try:
        table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # a model of sound
        table = None
    tokens = getattr(table, "num_embeddings", None)
    classes = getattr(getattr(model, "config", None), "num_labels", None) if labels == "classes" else None
    limits = {"input_ids": tokens, "decoder_input_ids": tokens}
    limits["labels"] = tokens if labels == "tokens" else classes if classes is not None and classes > 1 else None
    return {name: limit for name, limit in limits.items() if limit is not None}


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
