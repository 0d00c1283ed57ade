"""How an online learner learns: every setting besides the models and the data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hpr.errors import HprError
from hpr.healing.loss import Weights
from hpr.runtime.seeds import check_seed


@dataclass(frozen=True)
class OnlineOptions:
    """The settings of an ``OnlineHealer``.

    ``learning_rate``: the highest learning rate of AdamW, relative to the scale of each parameter. It is halved after a check
    that is lost, and grows again, up to this value, after checks that are won. ``replay``: the number of past batches that are
    kept, each past batch with the same probability; one of them is learnt from together with each new batch. ``every``: batches
    between two checks on the validation set. ``tolerance``: how far the validation loss may rise above its best, as a fraction.
    ``weights``: the parts of the loss; by default the outputs of the teacher, or the labels if there is no teacher.
    ``objective``: a key of ``hpr.profiling.objectives.OBJECTIVES``; by default that of the model's class.

    Raises ``HprError`` for a value out of its range.

    >>> OnlineOptions(every=4).replay
    64
    """

    learning_rate: float = 1e-4
    replay: int = 64
    every: int = 8
    tolerance: float = 0.01
    seed: int = 0
    weights: Weights | None = None
    objective: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        if not (self.every >= 1 and self.replay >= 0 and 0 < self.learning_rate < math.inf and self.tolerance >= 0):
            raise HprError(
                f"every {self.every} must be at least 1, replay {self.replay} and tolerance {self.tolerance} 0 or more, "
                f"learning_rate {self.learning_rate} a finite number above 0"
            )

    def weights_for(self, teacher: Any) -> Weights:
        """The parts of the loss. Raises ``HprError`` if they need a teacher and there is none."""
        weights = self.weights or (Weights() if teacher is not None else Weights(outputs=0.0, labels=1.0))
        if teacher is None and (weights.outputs or weights.hidden or weights.relations):
            raise HprError(f"{weights} follow a teacher: give one, or let labels alone count")
        return weights

    def to_dict(self, weights: Weights) -> dict[str, Any]:
        """The settings that decide every step, as JSON."""
        names = ("learning_rate", "replay", "every", "tolerance", "seed")
        return {**{name: getattr(self, name) for name in names}, **asdict(weights)}
