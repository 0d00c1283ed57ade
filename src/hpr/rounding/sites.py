"""Round weights that are prepared for it, at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpr.coding.codes import Codes, half_octaves
from hpr.errors import PlanError
from hpr.rounding.matrices import Rule, round_matrices
from hpr.rounding.ranges import coarser
from hpr.rounding.whitening import Whitened

THRESHOLD = 0.55  # of a step: a little above a half, since the smaller code is the cheaper one
_LARGEST_CODE = 2**31 - 1

Grid = tuple[np.ndarray, np.ndarray]  # exponents of rows and columns


def round_sites(group: Sequence[Whitened], step: float, rule: Rule) -> list[Codes]:
    """The codes of sites of one kind at a step size. Raises ``PlanError`` for a step so fine that codes leave their range."""
    grids = [_grid(whitened, step, rule.largest) for whitened in group]
    return [
        Codes(_integers(values, whitened.site.name), *grid, whitened.scale(step))
        for whitened, grid, values in zip(group, grids, _rounded(group, grids, step, rule), strict=True)
    ]


def powers(exponents: np.ndarray, like: Tensor) -> Tensor:
    """The numbers for exponents in half octaves, with the dtype and device of ``like``."""
    return torch.from_numpy(half_octaves(exponents)).to(like)


def _grid(whitened: Whitened, step: float, largest: float) -> Grid:
    if largest == math.inf:
        return whitened.rows, whitened.columns
    like = whitened.weight
    sizes = like.abs() / whitened.scale(step) / powers(whitened.rows, like)[:, None] / powers(whitened.columns, like)
    rows, columns = coarser(sizes, largest)
    return whitened.rows + rows, whitened.columns + columns


def _rounded(group: Sequence[Whitened], grids: Sequence[Grid], step: float, rule: Rule) -> Tensor:
    weights = torch.stack([whitened.weight for whitened in group])
    rows = torch.stack([whitened.scale(step) * powers(grid[0], weights) for whitened, grid in zip(group, grids, strict=True)])
    columns = torch.stack([powers(grid[1], weights) for grid in grids])
    sides = (
        None if group[0].left is None else torch.stack([whitened.left for whitened in group]),  # type: ignore[misc]
        None if group[0].right is None else torch.stack([whitened.right for whitened in group]),  # type: ignore[misc]
    )
    return round_matrices(weights, (rows, columns), sides, rule)


def _integers(values: Tensor, site: str) -> np.ndarray:
    """Whole numbers as int32. Raises ``PlanError`` for numbers outside its range: the step is far too fine."""
    if not float(values.abs().max()) < _LARGEST_CODE:  # not finite is no code, either
        raise PlanError(f"codes of {site} are above {_LARGEST_CODE:,} at this step: give a larger step, or plan anew")
    return values.cpu().numpy().astype(np.int32)
