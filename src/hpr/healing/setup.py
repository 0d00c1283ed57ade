"""Everything that decides the weights of a run, besides the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpr.healing.loss import GlobalLoss
from hpr.healing.recipe import Recipe
from hpr.runtime.batch import Batch


@dataclass(frozen=True)
class TrainingSetup:
    """The recipe, its duration in ``steps``, the loss, and the data.

    ``seconds``: the time that the steps were counted for, if the user asked for a time. ``sources``: batches by the name of
    their source. ``shares``: the fraction of steps for each source; None for equal fractions. ``validation``: batches that are
    not trained on.
    """

    recipe: Recipe
    steps: int
    seconds: float | None
    loss: GlobalLoss
    sources: Mapping[str, Sequence[Batch]]
    shares: Mapping[str, float] | None
    validation: Sequence[Batch]

    def settings(self) -> dict[str, Any]:
        """The recipe as JSON, with the duration in steps."""
        return {"steps": self.steps, "seconds": self.seconds, **self.recipe.to_dict()}
