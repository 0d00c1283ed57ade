"""Round a weight to integers in the metric of its damage, each number with regard to the errors made before it.

With G = C_g C_gᵀ and A = C_a C_aᵀ (Cholesky, lower) the damage of an error E is ½ · N · ‖C_gᵀ E C_a‖². The map E → C_gᵀ E C_a
is triangular in both indices: entry (i, j) of the result depends on errors (k, l) with k ≥ i and l ≥ j only. Rounding
therefore starts at the last row and column. The target of entry (i, j) is its weight minus what the errors so far put on its
own whitened coordinate (successive cancellation, Babai 1986). GPTQ (Frantar et al., 2022) is the case G = 1; WaterSIC (arXiv
2603.04956) adds entropy coding to that case.

All arithmetic is in steps of the grid: weights are divided by it, and the sides are scaled to match, once for each call.

Entries with equal i + j do not touch one another, so an anti-diagonal is rounded at once. Blocks of the matrix have the same
property: errors reach other blocks by matrix products, and only the inside of a block goes anti-diagonal by anti-diagonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 32
_STRIP = 4096  # rows that are rounded together if they do not touch one another: a block of their columns stays in the cache
_BATCH = 64  # blocks that are rounded together, for the same reason


@dataclass(frozen=True)
class Rule:
    """Which whole number stands for a real one.

    ``threshold``: the fraction of a step from which a number is rounded away from zero; a half rounds to the nearest.
    ``largest``: the size that no code exceeds, because a runtime has only so many bits. What clipping leaves is an error like
    any other, so the numbers that are rounded later take it up.

    >>> Rule(largest=7).whole(torch.tensor([2.5, -9.2]))
    tensor([ 3., -7.])
    """

    threshold: float = 0.5
    largest: float = math.inf

    def whole(self, targets: Tensor) -> Tensor:
        """The whole numbers for ``targets``, of the same shape."""
        sizes = targets.abs().add_(1 - self.threshold).floor_()
        return (sizes if self.largest == math.inf else sizes.clamp_(max=self.largest)).copysign_(targets)


NEAREST = Rule()


def round_matrices(
    weights: Float[Tensor, "sites out in"],
    grids: tuple[Float[Tensor, "sites out"], Float[Tensor, "sites in"]],
    sides: tuple[Float[Tensor, "sites out out"] | None, Float[Tensor, "sites in in"] | None],
    rule: Rule = NEAREST,
) -> Float[Tensor, "sites out in"]:
    """The codes of several weights of one shape, as whole numbers: weight ≈ row grid · code · column grid.

    ``grids``: those of rows and of columns. ``sides``: the lower Cholesky factors of G and A, every column divided by its
    diagonal entry; None stands for a diagonal moment.
    """
    weights = weights / grids[0][:, :, None] / grids[1][:, None, :]
    left, right = (None if side is None else _in_steps(side, grid) for side, grid in zip(sides, grids, strict=True))
    if left is None:
        if right is None:
            return rule.whole(weights)
        return _columns_in_turn(weights.transpose(1, 2), right, rule).transpose(1, 2)
    if right is None:
        return _columns_in_turn(weights, left, rule)
    return _blocks_in_turn(weights, left, right, rule)


def _in_steps(side: Tensor, grid: Tensor) -> Tensor:
    """The factor of a side that acts on errors counted in steps, and gives targets in steps."""
    return side * grid[:, :, None] / grid[:, None, :]


def _columns_in_turn(weights: Tensor, side: Tensor, rule: Rule) -> Tensor:
    """The codes if one moment is diagonal; ``weights`` (sites, n, others) have that moment's coordinates last.

    These do not touch one another. So the others are rounded in turn, from the last to the first.
    """
    codes = torch.empty_like(weights)
    for one, factor, found in zip(weights, side, codes, strict=True):
        for start in range(0, one.shape[1], _STRIP):
            found[:, start : start + _STRIP] = _strip(one[:, start : start + _STRIP].contiguous(), factor, rule)
    return codes


def _strip(weights: Tensor, side: Tensor, rule: Rule) -> Tensor:
    codes, targets = torch.empty_like(weights), weights.clone()
    for stop in range(len(weights), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        for j in range(stop - 1, start - 1, -1):
            codes[j] = rule.whole(targets[j])
            targets[start:j].addr_(side[j, start:j], codes[j] - weights[j], alpha=-1)
        targets[:start].addmm_(side[start:stop, :start].T, codes[start:stop] - weights[start:stop], alpha=-1)
    return codes


def _blocks_in_turn(weights: Tensor, left: Tensor, right: Tensor, rule: Rule) -> Tensor:
    """Blocks with equal sum of their block indices at once, from the last to the first."""
    sites, height, width = weights.shape
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    below, beside = rows * _BLOCK - height, columns * _BLOCK - width
    weights = F.pad(weights, (0, beside, 0, below))
    left, right = F.pad(left, (0, below, 0, below)), F.pad(right, (0, beside, 0, beside))
    codes, spread = torch.zeros_like(weights), torch.zeros_like(weights)  # spread: errors so far · right
    together = max(1, _BATCH // sites)

    def cut(index: int) -> slice:
        return slice(index * _BLOCK, (index + 1) * _BLOCK)

    for wave in range(rows + columns - 2, -1, -1):
        pairs = [(i, wave - i) for i in range(max(0, wave - columns + 1), min(rows - 1, wave) + 1)]
        for some in (pairs[start : start + together] for start in range(0, len(pairs), together)):
            reached = [left[:, i * _BLOCK :, cut(i)].transpose(1, 2) @ spread[:, i * _BLOCK :, cut(j)] for i, j in some]
            own = torch.cat([weights[:, cut(i), cut(j)] for i, j in some])
            lefts = torch.cat([left[:, cut(i), cut(i)] for i, _ in some])
            rights = torch.cat([right[:, cut(j), cut(j)] for _, j in some])
            code = _inside(own, own - torch.cat(reached), lefts, rights, rule)
            for (i, j), block, error in zip(some, code.split(sites), (code - own).split(sites), strict=True):
                codes[:, cut(i), cut(j)] = block
                stop = (j + 1) * _BLOCK
                spread[:, cut(i), :stop] += error @ right[:, cut(j), :stop]
    return codes[:, :height, :width]


def _inside(weights: Tensor, targets: Tensor, left: Tensor, right: Tensor, rule: Rule) -> Tensor:
    """Codes of blocks (B, b, b), anti-diagonal by anti-diagonal; mirrored columns make these diagonals."""
    size = weights.shape[-1]
    weights, targets, right = weights.flip(2), targets.flip(2), right.flip(1, 2)
    codes = torch.empty_like(weights)
    for wave in range(2 * size - 2, -1, -1):
        offset = size - 1 - wave
        top, bottom = max(0, -offset), min(size, size - offset)
        code = rule.whole(targets.diagonal(offset, 1, 2))
        codes.diagonal(offset, 1, 2).copy_(code)
        error = code.sub_(weights.diagonal(offset, 1, 2))
        sent = (left[:, top:bottom] * error[:, :, None]).transpose(1, 2)
        targets.baddbmm_(sent, right[:, top + offset : bottom + offset], alpha=-1)
    return codes.flip(2)
