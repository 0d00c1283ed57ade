"""Round a weight to integers in the metric of its damage, each number with regard to the errors made before it.

With G = C_g C_gᵀ and A = C_a C_aᵀ (Cholesky, lower) the damage of an error E is ½ · N · ‖C_gᵀ E C_a‖². The map E → C_gᵀ E C_a
is triangular in both indices: entry (i, j) of the result depends on errors (k, l) with k ≥ i and l ≥ j only. Rounding
therefore starts at the last row and column. The target of entry (i, j) is its weight minus what the errors so far put on its
own whitened coordinate (successive cancellation, Babai 1986). GPTQ (Frantar et al., 2022) is the case G = 1; WaterSIC (arXiv
2603.04956) adds entropy coding to that case.

Entries with equal i + j do not touch one another, so an anti-diagonal is rounded at once. Blocks of the matrix have the same
property: errors reach other blocks by matrix products, and only the inside of a block goes anti-diagonal by anti-diagonal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 32


def round_matrices(
    weights: Float[Tensor, "sites out in"],
    grids: tuple[Float[Tensor, "sites out"], Float[Tensor, "sites in"]],
    sides: tuple[Float[Tensor, "sites out out"] | None, Float[Tensor, "sites in in"] | None],
    threshold: float = 0.5,
) -> Float[Tensor, "sites out in"]:
    """The codes of several weights of one shape, as whole numbers: weight ≈ row grid · code · column grid.

    ``grids``: those of rows and of columns. ``sides``: the lower Cholesky factors of G and A, every column divided by its
    diagonal entry; None stands for a diagonal moment. ``threshold``: the fraction of a step from which a number is rounded
    away from zero; a half rounds to the nearest.
    """
    left, right = sides
    if left is None:
        if right is None:
            return rounded(weights / (grids[0][:, :, None] * grids[1][:, None, :]), threshold)
        return _columns_in_turn(weights, grids, right, threshold)
    if right is None:
        return _columns_in_turn(weights.transpose(1, 2), (grids[1], grids[0]), left, threshold).transpose(1, 2)
    return _blocks_in_turn(weights, grids, left, right, threshold)


def rounded(targets: Tensor, threshold: float) -> Tensor:
    """Whole numbers next to ``targets``: the one nearer to zero below the threshold, else the other."""
    return targets.sign() * (targets.abs() + (1 - threshold)).floor()


def _columns_in_turn(weights: Tensor, grids: tuple[Tensor, Tensor], right: Tensor, threshold: float) -> Tensor:
    """Rows do not touch one another if the left moment is diagonal. A column is rounded at once, from the last to the first."""
    width = weights.shape[2]
    codes = torch.empty_like(weights)
    spread = torch.zeros_like(weights)  # errors so far · right
    row, column = grids
    for stop in range(width, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        targets = weights[:, :, start:stop] - spread[:, :, start:stop]
        errors = torch.empty_like(targets)
        for j in range(stop - 1, start - 1, -1):
            grid = row * column[:, j, None]
            code = rounded(targets[:, :, j - start] / grid, threshold)
            codes[:, :, j] = code
            error = code * grid - weights[:, :, j]
            errors[:, :, j - start] = error
            targets[:, :, : j - start] -= error[:, :, None] * right[:, j, None, start:j]
        spread[:, :, :start] += errors @ right[:, start:stop, :start]
    return codes


def _blocks_in_turn(weights: Tensor, grids: tuple[Tensor, Tensor], left: Tensor, right: Tensor, threshold: float) -> Tensor:
    """Blocks with equal sum of their block indices at once, from the last to the first."""
    sites, height, width = weights.shape
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    below, beside = rows * _BLOCK - height, columns * _BLOCK - width
    weights = F.pad(weights, (0, beside, 0, below))
    row, column = F.pad(grids[0], (0, below), value=1.0), F.pad(grids[1], (0, beside), value=1.0)
    left, right = F.pad(left, (0, below, 0, below)), F.pad(right, (0, beside, 0, beside))
    codes, spread = torch.zeros_like(weights), torch.zeros_like(weights)  # spread: errors so far · right

    def cut(index: int) -> slice:
        return slice(index * _BLOCK, (index + 1) * _BLOCK)

    for wave in range(rows + columns - 2, -1, -1):
        pairs = [(i, wave - i) for i in range(max(0, wave - columns + 1), min(rows - 1, wave) + 1)]

        def blocks(matrix: Tensor) -> Tensor:
            return torch.cat([matrix[:, cut(i), cut(j)] for i, j in pairs])  # noqa: B023

        own = blocks(weights)
        reached = torch.cat([left[:, i * _BLOCK :, cut(i)].transpose(1, 2) @ spread[:, i * _BLOCK :, cut(j)] for i, j in pairs])
        grid = torch.cat([row[:, cut(i), None] * column[:, None, cut(j)] for i, j in pairs])
        code, error = _inside(
            own,
            own - reached,
            grid,
            torch.cat([left[:, cut(i), cut(i)] for i, _ in pairs]),
            torch.cat([right[:, cut(j), cut(j)] for _, j in pairs]),
            threshold,
        )
        for (i, j), block, change in zip(pairs, code.split(sites), error.split(sites), strict=True):
            codes[:, cut(i), cut(j)] = block
            stop = (j + 1) * _BLOCK
            spread[:, cut(i), :stop] += change @ right[:, cut(j), :stop]
    return codes[:, :height, :width]


def _inside(
    weights: Tensor, targets: Tensor, grid: Tensor, left: Tensor, right: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Codes and errors of blocks (B, b, b), anti-diagonal by anti-diagonal; mirrored columns make these diagonals."""
    size = weights.shape[-1]
    weights, targets, grid = (matrix.flip(2).contiguous() for matrix in (weights, targets, grid))
    right = right.flip(1, 2).contiguous()
    codes, errors = torch.zeros_like(weights), torch.zeros_like(weights)
    for wave in range(2 * size - 2, -1, -1):
        offset = size - 1 - wave
        top, bottom = max(0, -offset), min(size, size - offset)

        def diagonal(matrix: Tensor) -> Tensor:
            return matrix.diagonal(offset, 1, 2)  # noqa: B023

        steps = diagonal(grid)
        code = rounded(diagonal(targets) / steps, threshold)
        error = code * steps - diagonal(weights)
        diagonal(codes).copy_(code)
        diagonal(errors).copy_(error)
        sent = (left[:, top:bottom] * error[:, :, None]).transpose(1, 2)
        targets.baddbmm_(sent, right[:, top + offset : bottom + offset], alpha=-1)
    return codes.flip(2), errors.flip(2)
