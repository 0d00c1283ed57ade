"""How many bits the codes of a model take: predicted from a step before rounding, and estimated from codes before coding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from hpr.coding.codes import Codes, Product, half_octaves, parts_of
from hpr.coding.stream import estimate
from hpr.rounding.whitening import Whitened

_SAMPLE = 1 << 13  # numbers of a weight that stand for all of it in a prediction
_COUNTED = 1 << 20  # numbers of a weight whose codes are counted
SPREAD = 17.08  # 2πe: the entropy of a Gaussian of variance v at step 1 is about ½·log2(1 + 2πe·v)


class Rates:
    """Predicts the bits of all codes at a step, from sizes of rows and columns as if the weights were Gaussian.

    Its level may be a few per cent wrong, its slope is good: one measured size corrects it.
    """

    def __init__(self, sites: Sequence[Whitened]):
        self.numbers = sum(site.weight.numel() for site in sites)
        self._constant = 0.0  # bits of sites whose step is the same at every step size
        self._parts: list[tuple[float, torch.Tensor]] = []
        for whitened in sites:
            ratios = _ratios(whitened)
            each = whitened.weight.numel() / len(ratios)
            if whitened.read:
                self._parts.append((each, ratios))
            else:
                self._constant += each * float((1 + SPREAD * ratios).log2().sum()) / 2

    def bits(self, step: float) -> float:
        """The bits of all codes at a step size."""
        active = (each * float((1 + SPREAD / step**2 * ratios).log2().sum()) / 2 for each, ratios in self._parts)
        return self._constant + sum(active)

    def slope(self, step: float) -> float:
        """By how much the logarithm of the bits changes with that of the step; below 0."""
        return (math.log(self.bits(step * 1.01)) - math.log(self.bits(step))) / math.log(1.01)

    def step(self, bits: float, least: float, most: float) -> float:
        """The step size between two at which the codes take so many bits."""
        low, high = math.log(least), math.log(most)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(math.exp(middle)) > bits else (low, middle)
        return math.exp(high)


def _ratios(whitened: Whitened) -> torch.Tensor:
    """Mean squares of evenly spaced numbers over the squares of their grid at step 1, as rows and columns predict them."""
    squares = whitened.weight.square()
    rows, columns = (torch.from_numpy(half_octaves(part)).to(squares) for part in (whitened.rows, whitened.columns))
    height = squares.mean(1) / rows.square()
    width = squares.mean(0) / squares.mean().clamp(min=1e-30) / columns.square()
    places = torch.arange(0, squares.numel(), max(1, squares.numel() // _SAMPLE) | 1)  # an odd stride meets every column
    return height[places // len(width)] * width[places % len(width)]


def estimated_bytes(codes: Mapping[str, Codes | Product]) -> float:
    """About the bytes that the codes will be coded in, from evenly spaced rows of large weights.

    The coder comes within a few per cent of it, by nearly the same share at steps that are near each other.
    """
    parts = (part for one in codes.values() for part in parts_of(one))
    return sum(estimate(part, max(1, part.values.size // _COUNTED)) for part in parts)
