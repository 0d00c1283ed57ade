"""Healing: train a compressed model to imitate its original, from data of any kind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hpr.data.batches import given_batches, listed
from hpr.data.loaded_model import LoadedModel, as_loaded
from hpr.data.sources import fractions, sources_of
from hpr.data.splits import TRAINED, Splits, prepare
from hpr.errors import DataError
from hpr.healing.augmentation import Augmentation, augmentation
from hpr.healing.recipe import Recipe
from hpr.healing.setup import TrainingSetup
from hpr.healing.train import Healing, run, set_up
from hpr.nn.bank import recorded_objective
from hpr.nn.coded import refuse_coded
from hpr.profiling.first_pass import check_batches
from hpr.profiling.objectives import objective_for
from hpr.runtime.batch import Batch

WRITTEN = 4096  # the same if the teacher first has to write the targets
_VALIDATION_EVERY = 8  # one of so many batches is for validation, if the user gives batches
_log = logging.getLogger(__name__)


def heal(student: nn.Module, teacher: nn.Module | LoadedModel, data: Any = None, recipe: Recipe | None = None) -> Healing:
    """Train a student in place to imitate its teacher (distillation), and return what came of it.

    The student ends with the weights of least validation loss; it keeps its own if no check was better than the start.

    ``teacher``: a module, or a ``LoadedModel`` (``open_model``), whose tokenizer reads texts. ``data``: texts, a file (see
    ``hpr.data.files.FORMATS``), an array, a ``datasets.Dataset``, batches of model inputs, ``Splits`` that were read before, or
    None for the standard library's docstrings; or several of these by name, as a mapping or as a ``Mixture`` with shares of
    the steps. One eighth of the data is for validation;
    ``Splits`` have a validation part.
    ``recipe``: everything else, see ``Recipe``. Without ``recipe.objective`` the objective is that of the profile that the
    student was fitted with, else the teacher's.

    Raises ``HprError`` if the data cannot be read, for a loss that is not finite, and for a folder with the checkpoints of
    another run.

    >>> healing = heal(student, teacher, "texts.txt", Recipe(duration="500steps"))
    >>> healing.before.mean, healing.after.mean
    (0.137, 0.0698)
    """
    refuse_coded(student, "healed")
    return run(student, ready(student, teacher, data, recipe or Recipe()))


def ready(student: nn.Module, teacher: nn.Module | LoadedModel, data: Any, recipe: Recipe) -> TrainingSetup:
    """Everything that a run needs, from data of any kind. Raises ``HprError`` as ``heal`` does."""
    goal = recipe.objective or recorded_objective(student)
    if isinstance(teacher, nn.Module):
        teacher = as_loaded(teacher, None, goal)
    elif goal is not None:
        teacher = replace(teacher, objective=objective_for(teacher.model, goal).name)
    sources, shares = _sources(data)
    batches, validation = batches_of(sources, teacher, recipe.weights.labels > 0, shares)
    if recipe.weights.outputs or recipe.weights.relations:  # else nothing reads the teacher's outputs
        for read in (*batches.values(), validation):
            check_batches(teacher.model, read, teacher.goal)
    augment = recipe.augment
    if augment == "auto":
        augment = None if recipe.weights.labels else changes_for(teacher)  # a label says nothing about changed inputs
        _log.info("inputs are %s", "shown unchanged" if augment is None else "mixed, shifted and made noisy")
    recipe = replace(recipe, augment=augment, objective=teacher.objective)
    return set_up(student, teacher.model, batches, validation, recipe, shares)


def batches_of(
    sources: Mapping[str, Any], teacher: LoadedModel, labels: bool = False, shares: Mapping[str, float] | None = None
) -> tuple[dict[str, list[Batch]], list[Batch]]:
    """Return the batches to train on, by source, and the validation batches of all sources.

    ``Splits`` are used as they are: nothing is read or tokenised again. Raises ``DataError`` for fewer than eight batches.
    """
    batches: dict[str, list[Batch]] = {}
    validation: list[Batch] = []
    parts = fractions(sources, shares)
    for name, source in sources.items():
        source = listed(source)
        if (given := given_batches(source)) is not None:
            if len(given) < _VALIDATION_EVERY:
                raise DataError(
                    f"{len(given)} batches in {name!r}: at least {_VALIDATION_EVERY} are needed, one of them for validation"
                )
            batches[name] = [batch for place, batch in enumerate(given) if place % _VALIDATION_EVERY]
            validation += given[::_VALIDATION_EVERY]
            continue
        most = WRITTEN if teacher.goal.writes_targets else TRAINED
        splits = prepare(source, teacher, most, labels, parts[name])
        batches[name] = splits.training
        validation += splits.validation
    return batches, validation


def changes_for(teacher: LoadedModel) -> Augmentation | None:
    """Return the augmentation that suits a model: numbers vary, texts stay as they are.

    A teacher's answers to random tokens teach less than its answers to more texts (``docs/experiments.md``).
    """
    return augmentation() if teacher.tokenizer is None else None


def _sources(data: Any) -> tuple[dict[str, Any], Mapping[str, float] | None]:
    """The sources of data by name, and the share of each if the data is a mixture."""
    if isinstance(data, Splits) and data.parts:
        return dict(data.parts), data.shares
    return sources_of(data)
