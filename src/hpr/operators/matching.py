"""Which transform of one layer's weights makes them most like another's: orders by assignment, rotations by Procrustes.

To be tied, or to share a basis: two ends, two transforms.

Two rows x, y of weights a, b (the diagonal of the output moment, times rows per example) that read inputs of moment A cost
½ · ab/(a + b) · ‖x − y‖²_A nats if they are tied. Matching minimises the sum of
that over all slices that are transformed together.
Matching neurons by assignment is known from model merging (Singh & Jaggi 2020; Ainsworth et al. 2023); this metric is not.

Suffixes: B blocks of a slice, U parts of a block with one transform, K rows of such a part, M what the rows multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hpr.anatomy.symmetry import AxisSlice
from hpr.operators.metric import Measured


class Pair(NamedTuple):
    """A slice of one site in two layers: ``moved`` is to become like ``fixed``."""

    axis_slice: AxisSlice
    fixed: Measured
    moved: Measured


def best_order(rotating: Sequence[Sequence[Pair]], staying: Sequence[Pair], blocks: int) -> Tensor:
    """(B,) for each place the block of the moved layer that goes there.

    Pairs of one group in ``rotating`` can be rotated besides, block by block and all alike; those ``staying`` cannot.
    """
    where = next(pair.fixed.weight for pairs in (*rotating, staying) for pair in pairs)
    cost_BB = where.new_zeros(blocks, blocks)
    for pair in staying:
        one = _Blocks(pair, blocks, 1)
        cost_BB += one.squares() - 2 * one.weights * (one.fixed.flatten(1) @ one.weighted.flatten(1).T)
    for pairs in rotating:
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


def principal_rotation(sites: Sequence[tuple[AxisSlice, Measured]], blocks: int) -> Tensor:
    """(B, K, K) orthogonal matrices that rotate each block to the principal axes of what all its users weigh, largest first.

    Bases of the transformed layers then have their axes in common: sharing one loses little against a basis for each.
    """
    size = min(axis_slice.stop - axis_slice.start for axis_slice, _ in sites) // blocks
    gram_BKK = sites[0][1].weight.new_zeros(blocks, size, size)
    for axis_slice, site in sites:
        one = _side(site, axis_slice)
        rows_BUKM = one.weight[axis_slice.start : axis_slice.stop].reshape(blocks, -1, size, one.weight.shape[1])
        weighted_BUKM = one.right.times(rows_BUKM.flatten(0, 2).T).T.reshape(rows_BUKM.shape)
        roots_BUKK = _root(_parts(one, axis_slice, size)).reshape(blocks, -1, size, size)
        whitened_BUKM = roots_BUKK @ rows_BUKM
        gram_BKK += one.rows * (whitened_BUKM @ (roots_BUKK @ weighted_BUKM).transpose(2, 3)).sum(1)
    return torch.linalg.eigh(gram_BKK)[1].flip(2).transpose(1, 2)


def _parts(one: Measured, axis_slice: AxisSlice, size: int) -> Tensor:
    """The blocks (B·U, K, K) on the diagonal of the output moment."""
    moment = one.left.part(axis_slice.start, axis_slice.stop).moment
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
        fixed, moved = (_side(one, pair.axis_slice) for one in (pair.fixed, pair.moved))
        a, b = (
            one.rows * _diagonal(one)[pair.axis_slice.start : pair.axis_slice.stop].reshape(blocks, -1).mean(1)
            for one in (fixed, moved)
        )
        self.weights = a[:, None] * b / (a[:, None] + b)
        self.fixed, self.moved = (
            one.weight[pair.axis_slice.start : pair.axis_slice.stop].reshape(blocks, -1, size, one.weight.shape[1])
            for one in (fixed, moved)
        )
        self.inner = [fixed.right, moved.right]
        self.weighted = self._times(self.moved)

    def squares(self) -> Tensor:
        """(B, B) weighted squared lengths of both, which no transform changes."""
        fixed = (self.fixed * self._times(self.fixed)).sum((1, 2, 3))
        moved = (self.moved * self.weighted).sum((1, 2, 3))
        return self.weights * (fixed[:, None] + moved)

    def _times(self, rows_BUKM: Tensor) -> Tensor:
        flat = rows_BUKM.flatten(0, 2).T
        first, second = (side.times(flat) for side in self.inner)
        return ((first + second) / 2).T.reshape(rows_BUKM.shape)


def _side(one: Measured, axis_slice: AxisSlice) -> Measured:
    return one if axis_slice.side == "rows" else one.transposed


def _diagonal(one: Measured) -> Tensor:
    return one.left.moment if one.left.diagonal else one.left.moment.diagonal()


def _size(pairs: Sequence[Pair], blocks: int) -> int:
    return min(pair.axis_slice.stop - pair.axis_slice.start for pair in pairs) // blocks
