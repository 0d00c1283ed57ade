"""The metric of all operators: a change Δ of a weight costs ½ · N · tr(left Δ right Δᵀ) nats per example.

``left`` is the second moment of the gradients at the site's outputs, ``right`` the second moment of its inputs, and N the
number of input vectors per example. For an embedding table ``left`` holds token frequencies and ``right`` is the second moment
of the gradients. Both moments are damped: a share of their mean diagonal is added to the diagonal. Each is factorised as
L·Lᵀ. The whitened change L_leftᵀ Δ L_right has the damage ½ · N · (sum of its squared entries), so a truncated SVD of the
whitened weight is the optimal low-rank approximation. All tensors here are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from scipy.ndimage import uniform_filter1d
from torch import Tensor, nn

from hpr.anatomy.lookup import weight_at
from hpr.anatomy.model import Anatomy, Site
from hpr.operators import damping
from hpr.profiling.profile import Profile, SiteStatistics


class Side:
    """One damped second moment and its square root. ``moment`` is full, (n, n), or a diagonal, (n,)."""

    def __init__(self, moment: Float[Tensor, "n n"] | Float[Tensor, " n"], share: float = damping.INPUT):
        self.moment = damping.damped(moment, share)
        self.diagonal = moment.dim() == 1

    @property
    def diagonal_values(self) -> Float[Tensor, " n"]:
        """The moment's diagonal, (n,)."""
        return self.moment if self.diagonal else self.moment.diagonal()

    @cached_property
    def root(self) -> Float[Tensor, "n n"] | Float[Tensor, " n"]:
        """L with L Lᵀ = moment: lower triangular (n, n), or the square roots (n,) of a diagonal moment."""
        return self.moment.sqrt() if self.diagonal else damping.cholesky(self.moment)

    def times(self, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """moment · matrix, (n, k)."""
        return self.moment[:, None] * matrix if self.diagonal else self.moment @ matrix

    def whiten(self, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Lᵀ · matrix, (n, k)."""
        return self.root[:, None] * matrix if self.diagonal else self.root.T @ matrix

    def unwhiten(self, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """L⁻ᵀ · matrix, (n, k)."""
        if self.diagonal:
            return matrix / self.root[:, None]
        return torch.linalg.solve_triangular(self.root.T, matrix, upper=True)

    def solve(self, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """moment⁻¹ · matrix, (n, k)."""
        return matrix / self.moment[:, None] if self.diagonal else torch.cholesky_solve(matrix, self.root)

    def part(self, start: int, stop: int) -> Side:
        """The side for the coordinates [start, stop): the diagonal block of the moment. It is not damped again."""
        side = Side.__new__(Side)
        side.moment = self.moment[start:stop] if self.diagonal else self.moment[start:stop, start:stop]
        side.diagonal = self.diagonal
        return side


@dataclass(frozen=True, eq=False)
class Measured:
    """A site with its weight (out, in), float64, and its metric, which gives the damage of every change of the weight.

    ``left`` (outputs) and ``right`` (inputs) are the damped moments. ``rows`` is N in the damage: the mean number of input
    vectors (tokens) that the site processes per example. It does not count rows of the weight; ``segment`` selects such rows.
    ``rows`` is 0 if the site has no gradient. ``mean`` (in,) is the mean input E[x] if the site has a bias that can compensate
    a change of the mean output, otherwise None.
    """

    site: Site
    weight: Float[Tensor, "out in"]
    left: Side
    right: Side
    rows: float
    mean: Float[Tensor, " in"] | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether the objective depends on this site."""
        return self.rows > 0

    @cached_property
    def left_whitened(self) -> Float[Tensor, "out in"]:
        """L_leftᵀ W, (out, in). Every group that the site may join needs this product, so it is cached."""
        return self.left.whiten(self.weight)

    @cached_property
    def normal_rhs(self) -> Float[Tensor, "out in"]:
        """left · W · right, (out, in): the right-hand side of the normal equations for a shared matrix."""
        return self.right.times(self.left.times(self.weight).T).T

    def whitened(self, matrix: Float[Tensor, "out in"] | None = None) -> Float[Tensor, "out in"]:
        """L_leftᵀ M L_right, (out, in), for a matrix M (out, in), by default the weight."""
        return self.right.whiten((self.left_whitened if matrix is None else self.left.whiten(matrix)).T).T

    @cached_property
    def squared_norm(self) -> Float[Tensor, ""]:
        """The sum of the squared entries of the whitened weight, a scalar.

        ½ · ``rows`` · ``squared_norm`` is the damage (nats per example) of replacing the whole weight by zeros.
        """
        return self.whitened().square().sum()

    def damage(self, change: Float[Tensor, "out in"]) -> float:
        """The damage, in nats per example, if the weight becomes W + change; ``change`` is (out, in)."""
        return 0.5 * self.rows * float(self.whitened(change).square().sum())

    @cached_property
    def transposed(self) -> Measured:
        """The site with the transposed weight (in, out) and swapped sides, so that code for inputs also serves outputs."""
        return Measured(self.site, self.weight.T, self.right, self.left, self.rows)

    def segment(self, start: int, stop: int) -> Measured:
        """The site with only the rows [start, stop) of its weight. Products with other rows in ``left`` are ignored."""
        return Measured(self.site, self.weight[start:stop], self.left.part(start, stop), self.right, self.rows)


@dataclass(frozen=True, eq=False)
class Metric:
    """The metric of one site: the fields of ``Measured`` without the weight."""

    left: Side
    right: Side
    rows: float
    mean: Float[Tensor, " in"] | None = None

    def of(self, site: Site, weight: Float[Tensor, "out in"]) -> Measured:
        """``Measured`` for a weight (out, in), float64, in this metric."""
        return Measured(site, weight, self.left, self.right, self.rows, self.mean)


def measure(model: nn.Module, anatomy: Anatomy, profile: Profile | None) -> dict[str, Measured]:
    """``Measured`` for every site of a model, by site name. Without a profile the metric is the plain Frobenius norm.

    The tensors of a site are on the GPU of its weight, or on the CPU if the weight is not on a GPU.
    """
    measured = {}
    for site in anatomy.sites:
        weight = weight64(model, site)
        measured[site.name] = metric_of(site, profile, weight).of(site, weight)
    return measured


def weight64(model: nn.Module, site: Site) -> Float[Tensor, "out in"]:
    """The weight (out, in) of a site in float64: on its GPU, otherwise on the CPU, because other accelerators lack float64."""
    weight = weight_at(model, site).detach()
    return weight.to(weight.device if weight.is_cuda else "cpu", torch.float64)


def metric_of(site: Site, profile: Profile | None, weight: Float[Tensor, "out in"]) -> Metric:
    """The metric of a site from its profile, on the device of ``weight``. Without a profile it is the plain Frobenius norm."""
    statistics = profile.sites[site.name] if profile else plain_statistics(site)
    if profile and site.kind == "embedding" and statistics.has_gradient:
        statistics = replace(statistics, left=smooth_frequencies(statistics.left))
    return _metric(site, weight, statistics)


def measured_site(site: Site, weight: Float[Tensor, "out in"], known: SiteStatistics) -> Measured:
    """``Measured`` for a weight (out, in), float64, in the metric of the statistics ``known``, on the device of the weight."""
    return _metric(site, weight, known).of(site, weight)


def _metric(site: Site, weight: Tensor, statistics: SiteStatistics) -> Metric:
    left = Side(statistics.left.to(weight), damping.OUTPUT if site.kind == "linear" else damping.INPUT)
    mean = None if statistics.mean is None else statistics.mean.to(weight)
    return Metric(left, Side(statistics.right.to(weight)), statistics.rows, mean)


def smooth_frequencies(counts: Float[Tensor, " tokens"], window: int = 255) -> Float[Tensor, " tokens"]:
    """Estimate token frequencies outside the calibration text from its counts: (V,) → (V,), with sum 1.

    The estimate is a mixture of three distributions. One fifth is the distribution of the calibration text. Three fifths are
    the mean over ``window`` neighbouring token numbers, because vocabularies are built in order of frequency and neighbours are
    about equally frequent; this mean caps frequencies at the 98th percentile, so that one frequent word of the calibration
    domain does not raise its neighbours. One fifth is uniform, so that no token has frequency 0.
    """
    seen = counts / counts.sum()
    cap = float(torch.quantile(seen[seen > 0], 0.98)) if len(seen) > window else float(seen.max())
    around = torch.as_tensor(uniform_filter1d(seen.clamp(max=cap).numpy(), min(window, len(seen)), mode="nearest"))
    return 0.2 * seen + 0.6 * around / around.sum() + 0.2 / len(seen)


def plain_statistics(site: Site) -> SiteStatistics:
    """Statistics with identity moments and one row per example: the damage is then half the squared Frobenius norm."""
    return SiteStatistics(torch.ones(site.out_features).double(), torch.ones(site.in_features).double(), 1.0)


def eigenvectors(whitened: Float[Tensor, "n m"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """The squared singular values (n,) and left singular vectors (n, n) of a matrix (n, m), n ≤ m, largest first."""
    values, vectors = torch.linalg.eigh(whitened @ whitened.T)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def tails(values: Float[Tensor, " n"]) -> Float[Tensor, " n_plus_1"]:
    """The sum of all but the first r values, for r = 0 … n: (n,) → (n + 1,)."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
