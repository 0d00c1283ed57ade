"""How a plan rounds the weights: one step size for the whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpr.errors import PlanError

_LARGEST = 1e6  # of a step or damping, far above any that a plan needs
BITS = (8, 4)  # integer types that runtimes have kernels for


@dataclass(frozen=True)
class Rounding:
    """The whole plan of a coded model.

    ``step``: the step size in whitened coordinates, in √nats: each number that is not rounded to zero costs about step² / 12
    nats per example, whatever its site, row and column. ``output_damping`` and ``input_damping``: the shares of their mean
    diagonal that are added to the moments of output gradients and of inputs; more protects directions that calibration
    text rarely shows. ``bits``: the codes are −127 to 127 with 8 and −7 to 7 with 4, for runtimes; None leaves them as large as
    they come. ``factors``: layers share as the plan says, and what is rounded are their factors; else the terms of a plan say
    which weights are rounded as products.
    """

    step: float
    output_damping: float = 0.15
    input_damping: float = 0.15
    bits: int | None = None
    factors: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for name in ("step", "output_damping", "input_damping"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < _LARGEST:
                raise PlanError(f"the rounding's {name} is {value!r}: give a number above 0 and below {_LARGEST:g}")


def check_bits(bits: int | None) -> None:
    """Raise ``PlanError`` for a range of codes that is not offered."""
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise PlanError(f"bits is {bits!r}: give 8 (codes −127 to 127) or 4 (codes −7 to 7), or leave it out")


def largest_code(bits: int | None) -> float:
    """The size that no code of so many bits exceeds, without end for None.

    >>> largest_code(8), largest_code(4), largest_code(None)
    (127, 7, inf)
    """
    return math.inf if bits is None else 2 ** (bits - 1) - 1
