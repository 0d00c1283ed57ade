"""Coarser grids for rows and columns whose codes would leave a fixed range."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROUNDS = 3
_COARSEST = 80  # half octaves


def coarser(sizes: Float[Tensor, "out in"], largest: float) -> tuple[Int[np.ndarray, " out"], Int[np.ndarray, " in"]]:
    """By how many half octaves each row's and each column's grid is made coarser, 0 for most, int32.

    ``sizes``: those of the weights in steps of their grid, in which all errors cost the same. A grid that is 2^(e / 2) times as
    coarse clips fewer codes at ``largest``, and its rounding errors are larger: the loss of an entry is the square of what is
    clipped, plus a twelfth of its squared step. Rows and columns are chosen in turn, each the best one given the others.

    >>> coarser(torch.tensor([[1.0, -2.0], [90.0, 50.0]]).abs(), 7)
    (array([0, 8], dtype=int32), array([0, 0], dtype=int32))
    """
    found = sizes.detach().double().cpu()
    rows, columns = np.zeros(found.shape[0], np.int32), np.zeros(found.shape[1], np.int32)
    if not float(found.max()) > largest:
        return rows, columns
    logs = found.clamp(min=1e-6).log2().mean(0)  # an outlying column must not coarsen all rows, so it is told from the others
    columns = (2 * (logs - logs.median())).round().clamp(0, _COARSEST - 1).numpy().astype(np.int32)
    for _ in range(_ROUNDS):
        rows = _best(found, columns, largest)
        columns = _best(found.T, rows, largest)
    return rows, columns


def _best(sizes: Tensor, others: np.ndarray, largest: float) -> np.ndarray:
    """The exponents of least loss for the rows of ``sizes``, given those of its columns."""
    scales = torch.from_numpy(np.exp2(others / 2))
    line, place = torch.nonzero(sizes > largest * scales, as_tuple=True)  # the others are clipped by no grid
    excess, weight = sizes[line, place] / scales[place] / largest, scales[place].square()
    bins = (2 * excess.log2()).floor().clamp(0, _COARSEST - 1).long()  # clipped by the grids up to this exponent
    cells = line * _COARSEST + bins
    zeroth, first, second = (  # sums over what is clipped, by exponent
        torch.bincount(cells, weight * excess**power, len(sizes) * _COARSEST).view(-1, _COARSEST).flip(1).cumsum(1).flip(1)
        for power in range(3)
    )
    grids = torch.exp2(torch.arange(_COARSEST, dtype=torch.float64) / 2)
    clipped = largest**2 * (second - 2 * grids * first + grids.square() * zeroth)
    rounded = float(scales.square().sum()) / 12 * grids.square()
    return (clipped + rounded).argmin(1).numpy().astype(np.int32)
