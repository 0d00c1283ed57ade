"""Healing of a model that was opened by name: what the recipe, the augmentation and the data are by default."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from hpr.anatomy import describe
from hpr.healing.amounts import amount, steps_within
from hpr.healing.augmentation import Augmentation, augmentation
from hpr.healing.claim import steps_begun
from hpr.healing.losses import GlobalLoss
from hpr.healing.recipe import Healing, Recipe, heal
from hpr.healing.trainer import Watch
from hpr.models import OpenModel, Splits
from hpr.profiling.curvature import Progress, silent
from hpr.profiling.objectives import objective_for

HEALED = 65536  # examples to open splits with, so that nearly all of the user's data trains


def heal_opened(
    student: nn.Module,
    teacher: OpenModel,
    splits: Splits,
    how_long: str = "300steps",
    recipe: Recipe | None = None,
    folder: Path | None = None,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> tuple[Healing, Recipe]:
    """Heal a student in place on the calibration part of opened data; the re-scoring part is the guard.

    ``how_long``: ``500steps`` or ``10min``, which is turned into steps by timing a few. Returns the recipe that was used, too.
    """
    steps, seconds = amount(how_long)
    goal, recipe = objective_for(teacher.model, teacher.objective), recipe or Recipe()
    steps = steps or steps_begun(folder)  # another timing would make another run of it
    if steps is None:
        assert seconds is not None
        loss = GlobalLoss(teacher.model, describe(teacher.model), goal, recipe.weights)
        steps = steps_within(seconds, student, loss, splits.calibration)
    recipe = replace(recipe, steps=steps)
    found = heal(
        student,
        teacher.model,
        splits.calibration,
        splits.rescoring,
        recipe,
        goal,
        changes_for(teacher),
        folder=folder,
        progress=progress,
        watch=watch,
    )
    return found, recipe


def changes_for(opened: OpenModel) -> Augmentation:
    """How to change the inputs of a model: any token but the special ones may stand for another."""
    if opened.tokenizer is None or opened.objective in ("causal-lm", "seq2seq"):
        return augmentation()
    special = set(opened.tokenizer.all_special_ids)
    return augmentation([number for number in range(len(opened.tokenizer)) if number not in special])


def as_metrics(found: Healing, recipe: Recipe) -> dict[str, Any]:
    """What metrics.json keeps of it."""
    return {
        "before": found.before.mean,
        "after": found.after.mean,
        "best_step": found.best_step,
        "seconds": found.seconds,
        "recipe": asdict(recipe),
        "history": found.history,
        "stages": found.gains,
    }
