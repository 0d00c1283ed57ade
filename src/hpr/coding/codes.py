"""The integers of one weight with the scales that turn them into numbers again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """weight[i, j] = values[i, j] · scale · 2^(rows[i] / 2) · 2^(columns[j] / 2).

    ``values``: (out, in), int32. ``rows`` (out,) and ``columns`` (in,): exponents in half octaves, int32.

    >>> Codes(np.array([[2, -1]], "int32"), np.array([2], "int32"), np.array([0, -2], "int32"), 0.25).weight()
    tensor([[ 1.0000, -0.2500]])
    """

    values: Int[np.ndarray, "out in"]
    rows: Int[np.ndarray, " out"]
    columns: Int[np.ndarray, " in"]
    scale: float

    @property
    def numbers(self) -> int:
        """How many numbers the weight has."""
        return int(self.values.size)

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight in float32. Products of single numbers only, so every machine computes the same bits."""
        rows = torch.from_numpy((self.scale * half_octaves(self.rows)).astype(np.float32))
        columns = torch.from_numpy(half_octaves(self.columns).astype(np.float32))
        return torch.from_numpy(self.values).to(torch.float32).mul_(rows[:, None]).mul_(columns)


@dataclass(frozen=True, eq=False)
class Product:
    """A weight of low rank, as the codes of its factors ``u`` (out, rank) and ``v`` (rank, in).

    >>> u = Codes(np.array([[3], [-1]], "int32"), np.zeros(2, "int32"), np.zeros(1, "int32"), 0.5)
    >>> v = Codes(np.array([[2, 4]], "int32"), np.zeros(1, "int32"), np.zeros(2, "int32"), 0.5)
    >>> Product(u, v).weight()
    tensor([[ 1.5000,  3.0000],
            [-0.5000, -1.0000]])
    """

    u: Codes
    v: Codes

    @property
    def rank(self) -> int:
        """How many columns ``u`` and rows ``v`` have."""
        return len(self.v.rows)

    @property
    def numbers(self) -> int:
        """How many numbers the weight has; its factors have fewer."""
        return len(self.u.rows) * len(self.v.columns)

    @property
    def is_exact(self) -> bool:
        """Whether codes are so small that the scales between the factors keep 16 bits."""
        sizes = [float(np.abs(part.values).max()) for part in (self.u, self.v)]
        return sizes[0] * sizes[1] * self.rank < 2.0**36

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight in float32. The sums are whole numbers below 2^53, so every machine computes the same bits."""
        whole, bits = self.between()
        sums = (self.u.values * whole.astype(np.float64)) @ self.v.values.astype(np.float64)
        scaled = np.ldexp(sums, -bits) * self.rows()[:, None] * half_octaves(self.v.columns)
        return torch.from_numpy(scaled.astype(np.float32))

    def between(self) -> tuple[Int[np.ndarray, " rank"], int]:
        """The scales between the factors as whole numbers, int64, and the power of two that each is too large by.

        Relative to the largest one they have as many bits as the sums leave.
        """
        between = self._between() / self._between().max()
        sizes = np.abs(self.u.values).max(0).astype(np.float64) * np.abs(self.v.values).max(1)
        most = float(np.ldexp(1.0, 52)) / max(1.0, float((sizes * between).sum()) + float(sizes.sum()) / 2)
        bits = min(40, math.frexp(most)[1] - 1)
        return np.rint(np.ldexp(between, bits)).astype(np.int64), bits

    def rows(self) -> Float[np.ndarray, " out"]:
        """The scales of the rows of ``weight``, float64, with all that is common to the product."""
        return self.u.scale * self.v.scale * self._between().max() * half_octaves(self.u.rows)

    def _between(self) -> Float[np.ndarray, " rank"]:
        return half_octaves(self.u.columns + self.v.rows)


def part_names(name: str, codes: Codes | Product) -> list[str]:
    """A name for each of the parts of a weight: its own, or one for each factor."""
    return [name] if isinstance(codes, Codes) else [f"{name}.u", f"{name}.v"]


def parts_of(codes: Codes | Product) -> list[Codes]:
    """What a stream holds of a weight: its codes, or those of both factors."""
    return [codes] if isinstance(codes, Codes) else [codes.u, codes.v]


def joined(parts: Sequence[Codes]) -> Codes | Product:
    """The weight that ``parts_of`` took apart."""
    return parts[0] if len(parts) == 1 else Product(*parts)


def half_octaves(exponents: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """2^(e / 2) in float64: an exact power of two, times √2 for odd exponents."""
    return np.ldexp(np.where(exponents % 2, math.sqrt(2), 1.0), exponents // 2)
