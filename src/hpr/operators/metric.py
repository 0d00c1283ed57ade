"""The metric that every operator plans and fits in: damage = ½ · N · tr(left Δ right Δᵀ), in nats per example.

Moments are damped (a share of their mean diagonal is added) and factorised once as L Lᵀ; in the whitened coordinates
``L_leftᵀ W L_right`` damage is a plain sum of squares, so truncated SVDs are optimal there. Everything here is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from scipy.ndimage import uniform_filter1d
from torch import Tensor, nn

from hpr.anatomy.lookup import weight_at
from hpr.anatomy.model import Anatomy, Site
from hpr.profiling.profile import Profile, SiteStatistics

DAMPING = 1e-3
OUTPUT_DAMPING = 0.05  # output directions without gradient are flat to first order only: a fit must not run off along them


class Side:
    """One damped second moment, full (n, n) or diagonal (n,), with its square root."""

    def __init__(self, moment: Tensor, damping: float = DAMPING):
        diagonal = moment if moment.dim() == 1 else moment.diagonal()
        extra = damping * float(diagonal.mean()) + torch.finfo(torch.float64).tiny
        self.moment = moment + extra if moment.dim() == 1 else moment + extra * torch.eye(len(moment)).to(moment)
        self.diagonal = moment.dim() == 1

    @property
    def diagonal_values(self) -> Tensor:
        """The moment's diagonal, (n,)."""
        return self.moment if self.diagonal else self.moment.diagonal()

    @cached_property
    def root(self) -> Tensor:
        """L with L Lᵀ = moment: lower triangular, or the square roots of a diagonal."""
        return self.moment.sqrt() if self.diagonal else torch.linalg.cholesky(self.moment)

    def times(self, matrix: Tensor) -> Tensor:
        """moment · matrix, (n, k)."""
        return self.moment[:, None] * matrix if self.diagonal else self.moment @ matrix

    def whiten(self, matrix: Tensor) -> Tensor:
        """Lᵀ · matrix, (n, k)."""
        return self.root[:, None] * matrix if self.diagonal else self.root.T @ matrix

    def unwhiten(self, matrix: Tensor) -> Tensor:
        """L⁻ᵀ · matrix, (n, k)."""
        if self.diagonal:
            return matrix / self.root[:, None]
        return torch.linalg.solve_triangular(self.root.T, matrix, upper=True)

    def solve(self, matrix: Tensor) -> Tensor:
        """moment⁻¹ · matrix, (n, k)."""
        return matrix / self.moment[:, None] if self.diagonal else torch.cholesky_solve(matrix, self.root)

    def part(self, start: int, stop: int) -> Side:
        """The same moment on a range of coordinates."""
        side = Side.__new__(Side)
        side.moment = self.moment[start:stop] if self.diagonal else self.moment[start:stop, start:stop]
        side.diagonal = self.diagonal
        return side


@dataclass(frozen=True, eq=False)
class Measured:
    """A site with its weight (out, in), float64, and the two sides of its metric.

    ``rows`` per example; ``mean`` E[x] (in,) where the site's bias absorbs changes of the mean.
    """

    site: Site
    weight: Tensor
    left: Side
    right: Side
    rows: float
    mean: Tensor | None = None

    @property
    def has_gradient(self) -> bool:
        return self.rows > 0

    @cached_property
    def left_whitened(self) -> Tensor:
        """L_leftᵀ W, (out, in): every group that the site may join asks for it."""
        return self.left.whiten(self.weight)

    @cached_property
    def normal_rhs(self) -> Tensor:
        """left · W · right, (out, in): what the equations for a shared matrix are made of."""
        return self.right.times(self.left.times(self.weight).T).T

    def whitened(self, matrix: Tensor | None = None) -> Tensor:
        """L_leftᵀ M L_right of a matrix (out, in), by default of the weight."""
        return self.right.whiten((self.left_whitened if matrix is None else self.left.whiten(matrix)).T).T

    @cached_property
    def squared_norm(self) -> Tensor:
        """Squared norm of the whitened weight: what is lost, but for ½ · rows, where nothing is left of it."""
        return self.whitened().square().sum()

    def damage(self, change: Tensor) -> float:
        """Nats per example for W + change."""
        return 0.5 * self.rows * float(self.whitened(change).square().sum())

    @cached_property
    def transposed(self) -> Measured:
        """The same site read the other way round, so that input-side code serves the output side too."""
        return Measured(self.site, self.weight.T, self.right, self.left, self.rows)

    def segment(self, start: int, stop: int) -> Measured:
        """The rows [start, stop) alone (their coupling through ``left`` to other rows is left out)."""
        return Measured(self.site, self.weight[start:stop], self.left.part(start, stop), self.right, self.rows)


@dataclass(frozen=True, eq=False)
class Metric:
    """The metric of one site: ``Measured`` without the weight."""

    left: Side
    right: Side
    rows: float
    mean: Tensor | None = None

    def of(self, site: Site, weight: Tensor) -> Measured:
        """A weight (out, in), float64, in this metric."""
        return Measured(site, weight, self.left, self.right, self.rows, self.mean)


def measure(model: nn.Module, anatomy: Anatomy, profile: Profile | None) -> dict[str, Measured]:
    """Every site of a model in its metric, on its GPU if it has one; without a profile, in the plain Frobenius metric."""
    measured = {}
    for site in anatomy.sites:
        weight = weight64(model, site)
        measured[site.name] = metric_of(site, profile, weight).of(site, weight)
    return measured


def weight64(model: nn.Module, site: Site) -> Tensor:
    """The weight of a site (out, in), float64, on its GPU or on the CPU: other accelerators have no float64."""
    weight = weight_at(model, site).detach()
    return weight.to(weight.device if weight.is_cuda else "cpu", torch.float64)


def metric_of(site: Site, profile: Profile | None, weight: Tensor) -> Metric:
    """The metric of a site by its profile, on the device of ``weight``; plain Frobenius without a profile."""
    known = profile.sites[site.name] if profile else plain_statistics(site)
    if profile and site.kind == "embedding" and known.has_gradient:
        known = replace(known, left=smooth_frequencies(known.left))
    return _metric(site, weight, known)


def measured_site(site: Site, weight: Tensor, known: SiteStatistics) -> Measured:
    """A site's weight (out, in), float64, in the metric of its statistics, on the device of the weight."""
    return _metric(site, weight, known).of(site, weight)


def _metric(site: Site, weight: Tensor, known: SiteStatistics) -> Metric:
    left = Side(known.left.to(weight), OUTPUT_DAMPING if site.kind == "linear" else DAMPING)
    mean = None if known.mean is None else known.mean.to(weight)
    return Metric(left, Side(known.right.to(weight)), known.rows, mean)


def smooth_frequencies(counts: Tensor, window: int = 255) -> Tensor:
    """Token frequencies for text other than the calibration text: (V,) → (V,), summing to 1.

    A mixture of what was seen (a fifth), of what was seen around the token's number (three fifths; vocabularies are built
    in order of frequency, so neighbours are about as frequent; capped at the 98th percentile, so that one word of the
    calibration domain does not lift its neighbours), and of all tokens alike (a fifth), which no token falls below.
    """
    seen = counts / counts.sum()
    cap = float(torch.quantile(seen[seen > 0], 0.98)) if len(seen) > window else float(seen.max())
    around = torch.as_tensor(uniform_filter1d(seen.clamp(max=cap).numpy(), min(window, len(seen)), mode="nearest"))
    return 0.2 * seen + 0.6 * around / around.sum() + 0.2 / len(seen)


def plain_statistics(site: Site) -> SiteStatistics:
    """Identity moments: damage is half the squared Frobenius norm."""
    return SiteStatistics(torch.ones(site.out_features).double(), torch.ones(site.in_features).double(), 1.0)


def eigenvectors(whitened: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values and left singular vectors of a matrix with at most as many rows as columns, largest first."""
    values, vectors = torch.linalg.eigh(whitened @ whitened.T)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def tails(values: Tensor) -> Tensor:
    """Sum of what is left after the first r of n squared singular values, r = 0 … n: (n + 1,)."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
