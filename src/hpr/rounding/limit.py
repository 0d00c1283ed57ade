"""How far a coded model stands above the least damage that any code of as many bits can do.

The bound is reverse water-filling (Cover and Thomas, 2006, section 10.3) for weights that are independent Gaussians, with the
variances of their rows r and columns c, in the metric of the damage ½ N tr(G E A Eᵀ). The damage is then a sum of independent
parts. Their variances λ are ½ N times the products of an eigenvalue of √r G √r and one of √c A √c. No code of R bits does less
damage than Σ min(θ, λ), with the θ for which Σ max(0, ½ log2(λ / θ)) is R. Rounding single numbers stays 1.53 decibels above it
at many bits, however well the numbers are coded. A code that knows how weights depend on one another may do better.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hpr.profiling.profile import SiteStatistics
from hpr.rounding.whitening import damage, damped_moments

_SAMPLE = 1 << 13  # products of eigenvalues that stand for all of a weight
_HALVINGS = 60
_TINY = torch.finfo(torch.float64).tiny


class Limit:
    """Collects what sites lose by rounding, and tells the least damage at a number of bits, both in nats per example.

    The dampings are those of the rounding, so both damages are in the metric that it was made for.
    """

    def __init__(self, output_damping: float, input_damping: float):
        self.dampings = output_damping, input_damping
        self.damage = 0.0  # of the changes so far
        self._counts: list[Tensor] = []  # for how many parts of the damage each variance stands
        self._variances: list[Tensor] = []

    def add(
        self, kind: str, statistics: SiteStatistics, weight: Float[Tensor, "out in"], change: Float[Tensor, "out in"]
    ) -> None:
        """Take in a site (``kind``: linear or embedding) with its weight and what rounding changes, both in float64.

        A site without gradient does no damage.
        """
        if not statistics.has_gradient:
            return
        left, right = (moment.to(weight) for moment in damped_moments(kind, statistics, self.dampings))
        self.damage += damage(left, right, statistics.rows, change)

        squares = weight.square()
        rows, columns = _spectrum(left, squares.mean(1)), _spectrum(right, squares.mean(0) / squares.mean().clamp(min=_TINY))
        places = torch.arange(0, weight.numel(), max(1, weight.numel() // _SAMPLE) | 1, device=weight.device)
        variances = 0.5 * statistics.rows * rows[places // len(columns)] * columns[places % len(columns)]
        self._counts.append(torch.full((len(places),), weight.numel() / len(places), dtype=torch.float64))
        self._variances.append(variances.clamp(min=_TINY).cpu())

    def least(self, bits: float) -> float:
        """The damage that the best code of so many bits does; 0 without sites."""
        if not self._variances:
            return 0.0
        counts, variances = torch.cat(self._counts), torch.cat(self._variances)
        logs = variances.log2()
        high = float(logs.max())
        low = high - 2 * bits / float(counts.min()) - 1  # the largest variance alone would take more bits
        for _ in range(_HALVINGS):
            level = (low + high) / 2
            taken = float((counts * (logs - level).clamp(min=0)).sum()) / 2
            low, high = (level, high) if taken > bits else (low, level)
        return float((counts * variances.clamp(max=2.0**high)).sum())

    def decibels(self, bits: float) -> float | None:
        """How far the damage lies above the least one at so many bits; None if either is 0."""
        least = self.least(bits)
        return 10 * math.log10(self.damage / least) if self.damage > 0 and least > 0 else None


def _spectrum(moment: Tensor, variances: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The eigenvalues of √v · moment · √v. Single precision is enough for a bound."""
    if moment.dim() == 1:
        return moment * variances
    sizes = variances.sqrt()
    return torch.linalg.eigvalsh((sizes[:, None] * moment * sizes).float()).to(moment).clamp(min=0)
