"""The integers of one weight with the scales that turn them into numbers again."""

from __future__ import annotations

import math
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

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight in float32. Products of single numbers only, so every machine computes the same bits."""
        rows = torch.from_numpy((self.scale * half_octaves(self.rows)).astype(np.float32))
        columns = torch.from_numpy(half_octaves(self.columns).astype(np.float32))
        return torch.from_numpy(self.values).to(torch.float32).mul_(rows[:, None]).mul_(columns)


def half_octaves(exponents: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """2^(e / 2) in float64: an exact power of two, times √2 for odd exponents."""
    return np.ldexp(np.where(exponents % 2, math.sqrt(2), 1.0), exponents // 2)
