"""A site prepared for rounding: its metric as triangular factors, and the grid that every number is rounded to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.damping import cholesky, damped
from hpr.operators.metric import smooth_frequencies
from hpr.profiling.profile import SiteStatistics

_UNREAD = 0.5  # step of a site without gradient, as a share of its root mean square: about 3 bits a number
_RANGE = 31  # half octaves that a scale may lie from the median of its side


@dataclass(frozen=True, eq=False)
class Whitened:
    """A weight (out, in) in float64 with the two sides of its metric.

    ``left`` (out, out) and ``right`` (in, in): lower Cholesky factors of the damped moments with unit diagonals, None for a
    diagonal moment. ``rows`` and ``columns``: exponents of the grid in half octaves, int32. The grid of entry (i, j) at a
    step δ is δ · 2^((rows[i] + columns[j]) / 2), and without δ for a site that the objective does not ``read``.
    """

    site: Site
    weight: Float[Tensor, "out in"]
    left: Float[Tensor, "out out"] | None
    right: Float[Tensor, "in in"] | None
    rows: np.ndarray
    columns: np.ndarray
    read: bool = True

    def scale(self, step: float) -> float:
        """The grid at exponents 0. That of a site that the objective does not read is the same at every step."""
        return step if self.read else 1.0

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
        """``root_of`` a moment, computed once."""
        key = (id(moment), damping)
        if key not in self._known:
            self._known[key] = (moment, root_of(moment, damping))
        return self._known[key][1]

    def whiten(self, site: Site, weight: Tensor, statistics: SiteStatistics) -> Whitened:
        """A site's weight (out, in), float64, prepared for rounding."""
        rows, left, right = statistics.rows, statistics.left, statistics.right
        dampings = dict(self.dampings)
        if not statistics.has_gradient:
            size = max(_UNREAD * float(weight.square().mean().sqrt()), torch.finfo(torch.float32).tiny)
            flat = np.full(site.out_features, half_octave(size)), np.zeros(site.in_features, np.int32)
            return Whitened(site, weight, None, None, *flat, read=False)
        if site.kind == "embedding":
            left, dampings["left"] = smooth_frequencies(left), 0.0  # no token's frequency is 0 any more
        return prepared(site, weight, rows, (self.root(left, dampings["left"]), self.root(right, dampings["right"])))


def prepared(site: Site, weight: Tensor, rows: float, roots: tuple[Tensor, Tensor]) -> Whitened:
    """A weight (out, in) whose damage is ½ · ``rows`` · ‖left rootᵀ · E · right root‖² (see ``root_of``)."""
    roots = roots[0].to(weight), roots[1].to(weight)  # a profile lies in main memory, a model may be on a GPU
    diagonals = [root if root.dim() == 1 else root.diagonal() for root in roots]
    row_exponents, column_exponents = _exponents(math.sqrt(2 / rows) / diagonals[0], 1 / diagonals[1])
    left_unit, right_unit = (
        None if root.dim() == 1 else root / diagonal for root, diagonal in zip(roots, diagonals, strict=True)
    )
    return Whitened(site, weight, left_unit, right_unit, row_exponents, column_exponents)


def damped_moments(kind: str, statistics: SiteStatistics, dampings: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The moments of a site's outputs and inputs as rounding sees them; ``kind``: linear or embedding."""
    left, right = statistics.left, damped(statistics.right, dampings[1])
    return (smooth_frequencies(left) if kind == "embedding" else damped(left, dampings[0])), right


def times(moment: Tensor, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """A moment (n, n), or a diagonal one (n,), times a matrix."""
    return moment[:, None] * matrix if moment.dim() == 1 else moment @ matrix


def damage(left: Tensor, right: Tensor, rows: float, change: Float[Tensor, "out in"]) -> float:
    """½ · rows · tr(left E right Eᵀ), the nats per example that a change E of a weight costs."""
    return 0.5 * rows * float((times(left, change) * times(right, change.T).T).sum())


def root_of(moment: Tensor, damping: float = 0.0) -> Tensor:
    """The lower Cholesky factor of a moment (n, n), or the square roots of a diagonal one (n,), damped."""
    moment = damped(moment, damping)
    return moment.sqrt() if moment.dim() == 1 else cholesky(moment)


def half_octave(number: float) -> np.int32:
    """The nearest exponent in half octaves: number ≈ 2^(e / 2)."""
    return np.int32(round(2 * math.log2(number)))


def _exponents(rows: Tensor, columns: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The exponents of two vectors of positive numbers, of which only products count.

    Columns are taken around their median. The rest of the median goes into the rows before they are rounded.
    """
    row_logs, column_logs = 2 * rows.log2(), 2 * columns.log2()
    median = column_logs.median()
    row_logs = row_logs + median
    middle = row_logs.median().round()
    rounded = middle + (row_logs - middle).round().clamp(-_RANGE, _RANGE), (column_logs - median).round().clamp(-_RANGE, _RANGE)
    row_exponents, column_exponents = (part.cpu().numpy().astype(np.int32) for part in rounded)
    return row_exponents, column_exponents
