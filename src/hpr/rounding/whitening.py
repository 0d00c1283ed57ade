"""A site prepared for rounding: its metric as triangular factors, and the grid that every number is rounded to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.metric import smooth_frequencies
from hpr.profiling.profile import SiteStatistics

_UNREAD = 0.5  # step of a site without gradient, as a share of its root mean square: about 3 bits a number
_RANGE = 31  # half octaves that a scale may lie from the median of its side


@dataclass(frozen=True, eq=False)
class Whitened:
    """A weight (out, in) in float64 with the two sides of its metric.

    ``left`` (out, out) and ``right`` (in, in): lower Cholesky factors of the damped moments with unit diagonals, None for a
    diagonal moment. ``rows`` and ``columns``: exponents of the grid in half octaves, int32. The grid of entry (i, j) at a
    step δ is ``scale(δ)`` · 2^((rows[i] + columns[j]) / 2).
    """

    site: Site
    weight: Float[Tensor, "out in"]
    left: Float[Tensor, "out out"] | None
    right: Float[Tensor, "in in"] | None
    rows: np.ndarray
    columns: np.ndarray
    unit: float
    read: bool = True

    def scale(self, step: float) -> float:
        """The grid at exponents 0. That of a site that the objective does not read is the same at every step."""
        return step * self.unit if self.read else self.unit

    @property
    def kind(self) -> tuple[object, ...]:
        """Sites of one kind can be rounded together."""
        return (*self.weight.shape, self.left is None, self.right is None)


class Roots:
    """Cholesky factors of the profile's moments, each computed once: query, key and value read the same input."""

    def __init__(self, output_damping: float, input_damping: float):
        self.dampings = {"left": output_damping, "right": input_damping}
        self._known: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}  # moment, so that its id stays taken, and root

    def root(self, moment: Tensor, damping: float) -> Tensor:
        """The lower Cholesky factor of a moment (n, n), or the square roots of a diagonal one (n,), damped."""
        key = (id(moment), damping)
        if key not in self._known:
            self._known[key] = (moment, _root(moment, damping))
        return self._known[key][1]

    def whiten(self, site: Site, weight: Tensor, statistics: SiteStatistics) -> Whitened:
        """A site's weight (out, in), float64, prepared for rounding."""
        rows, left, right = statistics.rows, statistics.left, statistics.right
        dampings = dict(self.dampings)
        if not statistics.has_gradient:
            flat = np.zeros(site.out_features, np.int32), np.zeros(site.in_features, np.int32)
            size = float(weight.square().mean().sqrt())
            return Whitened(site, weight, None, None, *flat, max(_UNREAD * size, torch.finfo(torch.float32).tiny), read=False)
        if site.kind == "embedding":
            left, dampings["left"] = smooth_frequencies(left), 0.0  # no token's frequency is 0 any more
        roots = [self.root(left, dampings["left"]), self.root(right, dampings["right"])]
        diagonals = [root if root.dim() == 1 else root.diagonal() for root in roots]
        (row_unit, row_exponents), (column_unit, column_exponents) = (_scales(1 / diagonal) for diagonal in diagonals)
        left_unit, right_unit = (
            None if root.dim() == 1 else root / diagonal for root, diagonal in zip(roots, diagonals, strict=True)
        )
        unit = math.sqrt(2 / rows) * row_unit * column_unit
        return Whitened(site, weight, left_unit, right_unit, row_exponents, column_exponents, unit)


def _root(moment: Tensor, damping: float) -> Tensor:
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    extra = damping * float(diagonal.mean()) + torch.finfo(torch.float64).tiny
    if moment.dim() == 1:
        return (moment + extra).sqrt()
    return torch.linalg.cholesky(moment + extra * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))


def _scales(values: Tensor) -> tuple[float, np.ndarray]:
    """The median of positive numbers, and their exponents in half octaves around it."""
    logs = values.log2()
    median = float(logs.median())
    exponents = ((logs - median) * 2).round().clamp(-_RANGE, _RANGE)
    return 2.0**median, exponents.cpu().numpy().astype(np.int32)
