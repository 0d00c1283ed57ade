"""How a plan rounds the weights: one step size for the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from hpr.errors import PlanError


@dataclass(frozen=True)
class Rounding:
    """The whole plan of a coded model.

    ``step``: the step size in whitened coordinates, in √nats: each number that is not rounded to zero costs about step² / 12
    nats per example, whatever its site, row and column. ``output_damping`` and ``input_damping``: the shares of their mean
    diagonal that are added to the moments of output gradients and of inputs; more protects directions that calibration
    text rarely shows.
    """

    step: float
    output_damping: float = 0.15
    input_damping: float = 0.15

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise PlanError(f"the rounding's {name} is {value!r}: give a positive number")
