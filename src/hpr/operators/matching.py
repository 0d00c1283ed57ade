"""Which turn of one layer's weights makes them most like another's: orders by assignment, rotations by Procrustes.

To be tied, or to share a basis: two ends, two turns.

Two rows x, y of weights a, b (the diagonal of the output moment, times rows per example) that read inputs of moment A cost
½ · ab/(a + b) · ‖x − y‖²_A nats if they are tied. That, summed over all that turns together, is what matching makes least.
Matching neurons by assignment is known from model merging (Singh & Jaggi 2020; Ainsworth et al. 2023); this metric is not.

Suffixes: B blocks of a stretch, U parts of a block that turn alike, K rows of such a part, M what the rows multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hpr.anatomy.symmetry import Stretch
from hpr.operators.metric import Measured


class Pair(NamedTuple):
    """A stretch of one site in two layers: ``moved`` is to become like ``fixed``."""

    stretch: Stretch
    fixed: Measured
    moved: Measured


def best_order(turning: Sequence[Sequence[Pair]], staying: Sequence[Pair], blocks: int) -> Tensor:
    """(B,) for each place the block of the moved layer that goes there.

    Pairs of one group in ``turning`` can be rotated besides, block by block and all alike; those ``staying`` cannot.
    """
    where = next(pair.fixed.weight for pairs in (*turning, staying) for pair in pairs)
    cost_BB = where.new_zeros(blocks, blocks)
    for pair in staying:
        one = _Blocks(pair, blocks, 1)
        cost_BB += one.squares() - 2 * one.weights * (one.fixed.flatten(1) @ one.weighted.flatten(1).T)
    for pairs in turning:
        parts = [_Blocks(pair, blocks, _size(pairs, blocks)) for pair in pairs]
        cost_BB += sum(one.squares() for one in parts)
        products = [one.weights[..., None, None] * torch.einsum("iukm,julm->ijkl", one.fixed, one.weighted) for one in parts]
        product_BBKK = torch.stack(products).sum(0)
        gained_BB = (
            product_BBKK.abs().sum((2, 3)) if product_BBKK.shape[-1] == 1 else torch.linalg.matrix_norm(product_BBKK, "nuc")
        )
        cost_BB -= 2 * gained_BB
    return torch.as_tensor(linear_sum_assignment(cost_BB.cpu().numpy())[1])


def best_rotation(pairs: Sequence[Pair], blocks: int) -> Tensor:
    """(B, K, K) orthogonal matrices that bring the moved layer's blocks closest to those in their place (Schönemann 1966)."""
    parts = [_Blocks(pair, blocks, _size(pairs, blocks)) for pair in pairs]
    products = [
        one.weights.diagonal()[:, None, None] * torch.einsum("bukm,bulm->bkl", one.fixed, one.weighted) for one in parts
    ]
    left, _, right = torch.linalg.svd(torch.stack(products).sum(0))
    return left @ right


def principal_rotation(sites: Sequence[tuple[Stretch, Measured]], blocks: int) -> Tensor:
    """(B, K, K) orthogonal matrices that turn each block into the principal axes of what all its users weigh, largest first.

    Bases of the turned layers then have their axes in common: sharing one loses little against a basis for each.
    """
    size = min(stretch.stop - stretch.start for stretch, _ in sites) // blocks
    energy_BKK = sites[0][1].weight.new_zeros(blocks, size, size)
    for stretch, site in sites:
        one = _side(site, stretch)
        rows_BUKM = one.weight[stretch.start : stretch.stop].reshape(blocks, -1, size, one.weight.shape[1])
        weighted_BUKM = one.right.times(rows_BUKM.flatten(0, 2).T).T.reshape(rows_BUKM.shape)
        roots_BUKK = _root(_parts(one, stretch, size)).reshape(blocks, -1, size, size)
        whitened_BUKM = roots_BUKK @ rows_BUKM
        energy_BKK += one.rows * (whitened_BUKM @ (roots_BUKK @ weighted_BUKM).transpose(2, 3)).sum(1)
    return torch.linalg.eigh(energy_BKK)[1].flip(2).transpose(1, 2)


def _parts(one: Measured, stretch: Stretch, size: int) -> Tensor:
    """The blocks (B·U, K, K) on the diagonal of the output moment."""
    moment = one.left.part(stretch.start, stretch.stop).moment
    if one.left.diagonal:
        return torch.diag_embed(moment.reshape(-1, size))
    count = len(moment) // size
    blocks = torch.arange(count)
    return moment.reshape(count, size, count, size)[blocks, :, blocks, :]


def _root(moments: Tensor) -> Tensor:
    """Symmetric square roots."""
    values, vectors = torch.linalg.eigh(moments)
    return vectors @ (values.clamp(min=0).sqrt()[..., None] * vectors.transpose(-1, -2))


class _Blocks:
    """A pair cut into blocks: both (B, U, K, M), the moved one also times the inner moment; weights (B, B)."""

    def __init__(self, pair: Pair, blocks: int, size: int):
        fixed, moved = (_side(one, pair.stretch) for one in (pair.fixed, pair.moved))
        a, b = (
            one.rows * _diagonal(one)[pair.stretch.start : pair.stretch.stop].reshape(blocks, -1).mean(1)
            for one in (fixed, moved)
        )
        self.weights = a[:, None] * b / (a[:, None] + b)
        self.fixed, self.moved = (
            one.weight[pair.stretch.start : pair.stretch.stop].reshape(blocks, -1, size, one.weight.shape[1])
            for one in (fixed, moved)
        )
        self.inner = [fixed.right, moved.right]
        self.weighted = self._times(self.moved)

    def squares(self) -> Tensor:
        """(B, B) weighted squared lengths of both, which no turn changes."""
        fixed = (self.fixed * self._times(self.fixed)).sum((1, 2, 3))
        moved = (self.moved * self.weighted).sum((1, 2, 3))
        return self.weights * (fixed[:, None] + moved)

    def _times(self, rows_BUKM: Tensor) -> Tensor:
        flat = rows_BUKM.flatten(0, 2).T
        first, second = (side.times(flat) for side in self.inner)
        return ((first + second) / 2).T.reshape(rows_BUKM.shape)


def _side(one: Measured, stretch: Stretch) -> Measured:
    return one if stretch.side == "rows" else one.transposed


def _diagonal(one: Measured) -> Tensor:
    return one.left.moment if one.left.diagonal else one.left.moment.diagonal()


def _size(pairs: Sequence[Pair], blocks: int) -> int:
    return min(pair.stretch.stop - pair.stretch.start for pair in pairs) // blocks
