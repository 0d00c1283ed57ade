"""Healing from what a user has: models and data of any kind, an amount, and defaults for all the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hpr.anatomy.describe import describe
from hpr.data.loaded_model import LoadedModel, as_loaded
from hpr.data.sources import fractions, named
from hpr.data.splits import Splits, open_splits
from hpr.errors import HprError
from hpr.healing.augmentation import Augmentation, augmentation
from hpr.healing.duration import amount, steps_within
from hpr.healing.history import Watch
from hpr.healing.loss import GlobalLoss
from hpr.healing.recipe import Recipe
from hpr.healing.resume import steps_begun
from hpr.healing.train import Healing, train
from hpr.profiling.objectives import objective_for
from hpr.runtime.batch import Batch, as_batch

HEALED = 65536  # examples of a source at most
WRITTEN = 4096  # the same where the teacher first has to write what is to be answered
_GUARDED = 8  # of so many batches that come as they are, one is a guard


def heal(
    student: nn.Module,
    teacher: nn.Module | LoadedModel,
    data: Any = None,
    how_long: str = "300steps",
    *,
    tokenizer: Any = None,
    objective: str | None = None,
    shares: Mapping[str, float] | None = None,
    recipe: Recipe | None = None,
    augment: Augmentation | Literal["auto"] | None = "auto",
    folder: str | Path | None = None,
    original: nn.Module | None = None,
    watch: Watch | None = None,
) -> Healing:
    """Train a student in place until it does again what its teacher does; it is left with the best weights that were met.

    ``data``: texts (with the ``tokenizer``), a file of them (.txt, .jsonl, .csv, .tsv), an array or its ``.npy`` or ``.npz``
    file, a ``datasets.Dataset``, batches of model inputs, ``Splits``, or None for the standard library's docstrings; or several
    of these by name, with ``shares`` of the steps. An eighth of it is a guard, which is not trained on: the weights of least
    divergence there are kept, those of the start among them. ``how_long``: ``500steps`` or ``10min``, which is turned into
    steps by timing a few. ``recipe`` says all else; its ``steps`` and ``seconds`` do not count. ``augment``: how inputs are
    changed at random, by default as suits the model (see ``augmentation``). ``folder``: where checkpoints go; the same call
    goes on from the last of them. ``original``: see ``training.train``. Raises ``HprError`` as that does, and as reading data
    does.
    """
    if isinstance(teacher, nn.Module):
        teacher = as_loaded(teacher, tokenizer, objective)
    goal, recipe = objective_for(teacher.model, objective or teacher.objective), recipe or Recipe()
    place = None if folder is None else Path(folder)
    steps, seconds = amount(how_long)
    batches, guard = opened_data(data, teacher, labels=recipe.weights.labels > 0, shares=shares)
    steps = steps or steps_begun(place)  # another timing would make another run of it
    if steps is None:
        assert seconds is not None
        loss = GlobalLoss(teacher.model, describe(teacher.model), goal, recipe.weights)
        steps = steps_within(seconds, student, loss, list(chain(*batches.values())), recipe.accumulate)
    if augment == "auto":  # a label says nothing about changed inputs
        augment = None if recipe.weights.labels else changes_for(teacher)
    recipe = replace(recipe, steps=steps, seconds=seconds)
    return train(student, teacher.model, batches, guard, recipe, goal, augment, shares, place, original, watch)


def opened_data(
    data: Any, teacher: LoadedModel, labels: bool = False, shares: Mapping[str, float] | None = None
) -> tuple[dict[str, list[Batch]], list[Batch]]:
    """Batches to train on, by source, and those of all sources that guard."""
    batches: dict[str, list[Batch]] = {}
    guard: list[Batch] = []
    parts = fractions(named(data), shares)
    for name, source in named(data).items():
        if hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            source = list(source)
        if isinstance(source, list | tuple) and source and _is_batch(source[0]):
            if len(source) < _GUARDED:
                raise HprError(f"{len(source)} batches in {name!r}: at least {_GUARDED} are needed, one of them to guard")
            batches[name] = [as_batch(batch) for place, batch in enumerate(source) if place % _GUARDED]
            guard += [as_batch(batch) for batch in source[::_GUARDED]]
            continue
        most = WRITTEN if teacher.objective == "seq2seq" else HEALED
        found = source if isinstance(source, Splits) else open_splits(source, teacher, most, labels, parts[name])
        batches[name] = found.calibration
        guard += found.rescoring
    return batches, guard


def changes_for(opened: LoadedModel) -> Augmentation | None:
    """How to change the inputs of a model: numbers vary, texts stay as they are.

    A teacher's answers to texts with strange tokens in them teach less than its answers to more texts (``experiments.md``).
    """
    return augmentation() if opened.tokenizer is None else None


def _is_batch(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else [value]
    return bool(values) and all(isinstance(one, torch.Tensor) for one in values)
