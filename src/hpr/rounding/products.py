"""Weights of low rank at the same step: a site as a product of two rounded factors, where that costs less.

At the step δ one bit is worth λ = (ln 2 / 6) · δ² nats, the slope of damage over bits of every number that is rounded. So a
site costs J = damage + λ · bits, whichever way it is stored, and the way of least J is taken. Where a few directions hold most
of a weight, two thin factors need fewer numbers, and what they leave out costs less than rounding all of it.

The factors are those of the truncated singular value decomposition of the weight in its metric, W ≈ U V. The error of V is read
through Uᵀ G U, which is diagonal. Once V is rounded, U is fitted to it anew, and its error is read through V A Vᵀ.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.coding.codes import Codes, Product
from hpr.coding.stream import estimate
from hpr.errors import PlanError
from hpr.operators.damping import solve
from hpr.profiling.profile import SiteStatistics
from hpr.rounding.matrices import Rule
from hpr.rounding.rates import SPREAD
from hpr.rounding.sites import THRESHOLD, round_sites
from hpr.rounding.whitening import Whitened, damage, damped_moments, prepared, root_of, times

_log = logging.getLogger(__name__)
_RIDGE = 1e-4  # of the diagonal, at most
_GAIN = 0.02  # of J: a product that saves less is not worth its code
_HOPE = 1.2  # a predicted J up to so many times that of the whole weight is tried
_AROUND = (0.6, 1.0, 1.5, 2.2)  # ranks that are tried, relative to the one of least predicted J
_ROWS = 4096  # of a table that are rounded for a trial, about


def price(step: float) -> float:
    """Nats that one bit is worth at a step size: the slope of step² / 12 nats over the bits of a number."""
    return math.log(2) / 6 * step**2


@dataclass(frozen=True, eq=False)
class Factoring:
    """A site (out, in) that may become a product, in float64. At full rank the product is another basis for its rows.

    ``left`` (out, out) and ``right`` (in, in): its damped moments, 1-dimensional if diagonal, and ``roots``, those of both.
    ``values`` (n,): the singular values of the whitened weight, in √nats. ``basis`` (n, in): its right singular vectors,
    unwhitened.
    """

    site: Site
    weight: Float[Tensor, "out in"]
    left: Tensor
    right: Tensor
    roots: tuple[Tensor, Tensor]
    rows: float
    values: Float[Tensor, " n"]
    basis: Float[Tensor, "n in"]

    @classmethod
    def of(cls, whitened: Whitened, statistics: SiteStatistics, dampings: tuple[float, float]) -> Factoring:
        """The factoring of a site that has a gradient."""
        weight = whitened.weight
        left, right = (moment.to(weight) for moment in damped_moments(whitened.site.kind, statistics, dampings))
        outer, inner = root_of(left), root_of(right)
        seen = times(outer.T if outer.dim() > 1 else outer, weight)
        seen = (seen @ inner if inner.dim() > 1 else seen * inner) * math.sqrt(statistics.rows / 2)
        squares, vectors = torch.linalg.eigh(seen.T @ seen if weight.shape[1] <= weight.shape[0] else seen @ seen.T)
        values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
        if weight.shape[1] > weight.shape[0]:
            vectors = (seen.T @ vectors) / values.clamp(min=1e-12 * float(values[0]) + torch.finfo(torch.float64).tiny)
        if inner.dim() > 1:
            basis = torch.linalg.solve_triangular(inner.T, vectors, upper=True).T
        else:
            basis = (vectors / inner[:, None]).T
        return cls(whitened.site, weight, left, right, (outer, inner), statistics.rows, values, basis)

    def codes(self, rank: int, step: float) -> Product:
        """Both factors, rounded at a step size."""
        return self.fitted(self.right_factor(rank, step), self.values[:rank], step)

    def right_factor(self, rank: int, step: float) -> Codes:
        """V (rank, in). It has the sizes with which U and V are alike: its error is read through diag(values)."""
        scale = self._positive(self.values[:rank])
        return self._round(scale.sqrt()[:, None] * self.basis[:rank], (scale.sqrt(), self.roots[1]), 2.0, step)

    def fitted(self, v: Codes, values: Float[Tensor, " rank"], step: float) -> Product:
        """The product of U, fitted, and a rounded V with the singular ``values`` of its rows. Rows of zeros are left out."""
        kept = (v.values != 0).any(1)
        is_zero = not kept.any()
        kept[0] |= is_zero
        v = Codes(v.values[kept], v.rows[kept], v.columns, v.scale)
        found, values = v.weight().to(self.weight), self._positive(values)[torch.from_numpy(kept).to(values.device)]
        reads = times(self.right, found.T)
        inner = found @ reads
        ridge = _RIDGE * (step / values).clamp(max=1)  # coarse rows may nearly depend on one another, fine ones do not
        inner = inner + torch.diag(ridge * inner.diagonal() + (1.0 if is_zero else torch.finfo(torch.float64).tiny))
        fitted = solve(inner, reads.T @ self.weight.T).T
        u = self._round(fitted, (self.roots[0], root_of(inner)), self.rows, step)
        return Product(u, v)

    def _positive(self, values: Tensor) -> Tensor:
        return values.clamp(min=1e-9 * float(self.values[0]) + torch.finfo(torch.float64).tiny)

    def damage(self, codes: Codes | Product) -> float:
        """Nats per example, in the damped metric."""
        change = codes.weight().to(self.weight) - self.weight
        return damage(self.left, self.right, self.rows, change)

    def sample(self) -> tuple[int, Factoring]:
        """Evenly spaced rows that stand for all of a tall weight, and for how many each of them stands.

        If the left moment is diagonal, rows do not touch one another, so their codes are those that they have among all.
        """
        every = len(self.weight) // _ROWS if self.left.dim() == 1 else 1
        if every < 2:
            return 1, self
        roots = (self.roots[0][::every], self.roots[1])
        return every, replace(self, weight=self.weight[::every], left=self.left[::every], roots=roots)

    def likely(self, step: float) -> tuple[int, float]:
        """The rank of least predicted J, and that J, as if the entries of both factors were Gaussian."""
        squares, noise = self.values.square(), step**2 / 12
        costs = torch.zeros_like(squares)
        for height in self.weight.shape:
            spread = squares / height
            costs += height * (spread * noise / (spread + noise) + price(step) * 0.5 * (1 + SPREAD * spread / step**2).log2())
        left_out = squares.sum() - squares.cumsum(0)
        total = costs.cumsum(0) + left_out.clamp(min=0)
        return int(total.argmin()) + 1, float(total.min())

    def _round(self, matrix: Tensor, roots: tuple[Tensor, Tensor], rows: float, step: float) -> Codes:
        site = replace(self.site, kind="linear", out_features=matrix.shape[0], in_features=matrix.shape[1])
        return round_sites([prepared(site, matrix, rows, roots)], step, Rule(THRESHOLD))[0]


@dataclass(frozen=True)
class Saving:
    """The rank of a product, and by how many bytes it is smaller than the whole weight at the same step."""

    rank: int
    bytes: float


def worthwhile(sites: Iterable[Factoring], codes: Mapping[str, Codes | Product], step: float) -> dict[str, Saving]:
    """The sites that are cheaper as products at a step size. ``codes``: those of the whole weights."""
    found = {}
    for one in sites:
        every, rows = one.sample()
        name, most = one.site.name, min(one.weight.shape)
        kept = _thinned(codes[name], every)
        whole = every * estimate(kept)
        costs = {0: every * rows.damage(kept) + 8 * price(step) * whole}
        rank, predicted = one.likely(step)
        if predicted > _HOPE * costs[0]:
            continue
        sizes = {0: whole}
        for rank in sorted({max(1, min(round(factor * rank), most)) for factor in _AROUND}):
            try:
                product = rows.codes(rank, step)
            except PlanError:  # the step is so fine that codes of factors leave their range
                continue
            if product.is_exact:
                sizes[rank] = every * estimate(product.u) + estimate(product.v)
                costs[rank] = every * rows.damage(product) + 8 * price(step) * sizes[rank]
        best = min(costs, key=lambda rank: costs[rank])
        if costs[best] < (1 - _GAIN) * costs[0]:
            _log.debug("%s: rank %d saves %.1f %% of its cost", one.site.label, best, 100 * (1 - costs[best] / costs[0]))
            found[name] = Saving(best, whole - sizes[best])
    return found


def _thinned(codes: Codes | Product, every: int) -> Codes:
    assert isinstance(codes, Codes)
    return Codes(codes.values[::every], codes.rows[::every], codes.columns, codes.scale)
