"""Find the transform that makes the weights of one layer most similar to those of another layer.

``best_order`` and ``best_rotation`` prepare layers that are tied; ``principal_rotation`` prepares layers that share a basis.

Tying two weight rows x and y costs ½ · ab/(a + b) · (x − y)ᵀ A (x − y) nats. Here a and b are the importances of the rows
(their diagonal entries of the output moments, times ``Measured.rows``) and A is the moment of the inputs. Matching minimises
the sum of this cost over all slices that are transformed together. Model merging also matches neurons by assignment (Singh &
Jaggi 2020; Ainsworth et al. 2023), but in another metric.

Suffixes of tensor names: B blocks of a slice, U parts of a block that share one transform, K rows of a part, M inputs of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hpr.anatomy.symmetry import AxisSlice
from hpr.operators.metric import Measured


class Pair(NamedTuple):
    """A slice of one slot in two layers. Matching transforms ``moved`` to make it similar to ``fixed``."""

    axis_slice: AxisSlice
    fixed: Measured
    moved: Measured


def best_order(rotating: Sequence[Sequence[Pair]], staying: Sequence[Pair], blocks: int) -> Int[Tensor, " blocks"]:
    """The order (B,) of the blocks of the moved layer: entry i is the block that moves to place i.

    The assignment minimises the cost of tying both layers. ``rotating``: groups of pairs whose blocks may also be rotated after
    they are ordered, all pairs of a group by the same rotation. ``staying``: pairs whose blocks can only be ordered.
    """
    weight = next(pair.fixed.weight for pairs in (*rotating, staying) for pair in pairs)
    cost_BB = weight.new_zeros(blocks, blocks)
    for pair in staying:
        part = _Blocks(pair, blocks, 1)
        cost_BB += part.squares() - 2 * part.weights * (part.fixed.flatten(1) @ part.weighted.flatten(1).T)
    for pairs in rotating:
        parts = [_Blocks(pair, blocks, _size(pairs, blocks)) for pair in pairs]
        cost_BB += sum(part.squares() for part in parts)
        products = [
            part.weights[..., None, None] * torch.einsum("iukm,julm->ijkl", part.fixed, part.weighted) for part in parts
        ]
        product_BBKK = torch.stack(products).sum(0)
        gained_BB = (
            product_BBKK.abs().sum((2, 3)) if product_BBKK.shape[-1] == 1 else torch.linalg.matrix_norm(product_BBKK, "nuc")
        )
        cost_BB -= 2 * gained_BB
    return torch.as_tensor(linear_sum_assignment(cost_BB.cpu().numpy())[1])


def best_rotation(pairs: Sequence[Pair], blocks: int) -> Float[Tensor, "blocks k k"]:
    """Orthogonal matrices (B, K, K) that rotate each block of the moved layer to the most similar position.

    Block i is compared with block i of the fixed layer. This is the orthogonal Procrustes problem (Schönemann 1966).
    """
    parts = [_Blocks(pair, blocks, _size(pairs, blocks)) for pair in pairs]
    products = [
        part.weights.diagonal()[:, None, None] * torch.einsum("bukm,bulm->bkl", part.fixed, part.weighted) for part in parts
    ]
    left, _, right = torch.linalg.svd(torch.stack(products).sum(0))
    return left @ right


def principal_rotation(sites: Sequence[tuple[AxisSlice, Measured]], blocks: int) -> Float[Tensor, "blocks k k"]:
    """Orthogonal matrices (B, K, K) that rotate each block to its principal axes, the largest first.

    The axes are the eigenvectors of the sum of the weighted Gram matrices (K, K) of a block over all ``sites``. If all layers
    are rotated in this way, their axes agree, so a shared basis costs little more damage than a basis per layer.
    """
    size = min(axis_slice.stop - axis_slice.start for axis_slice, _ in sites) // blocks
    gram_BKK = sites[0][1].weight.new_zeros(blocks, size, size)
    for axis_slice, site in sites:
        member = _side(site, axis_slice)
        rows_BUKM = member.weight[axis_slice.start : axis_slice.stop].reshape(blocks, -1, size, member.weight.shape[1])
        weighted_BUKM = member.right.times(rows_BUKM.flatten(0, 2).T).T.reshape(rows_BUKM.shape)
        roots_BUKK = _root(_parts(member, axis_slice, size)).reshape(blocks, -1, size, size)
        whitened_BUKM = roots_BUKK @ rows_BUKM
        gram_BKK += member.rows * (whitened_BUKM @ (roots_BUKK @ weighted_BUKM).transpose(2, 3)).sum(1)
    return torch.linalg.eigh(gram_BKK)[1].flip(2).transpose(1, 2)


def _parts(member: Measured, axis_slice: AxisSlice, size: int) -> Tensor:
    """The diagonal blocks (B·U, K, K) of the output moment."""
    moment = member.left.part(axis_slice.start, axis_slice.stop).moment
    if member.left.diagonal:
        return torch.diag_embed(moment.reshape(-1, size))
    count = len(moment) // size
    blocks = torch.arange(count)
    return moment.reshape(count, size, count, size)[blocks, :, blocks, :]


def _root(moments: Tensor) -> Tensor:
    """The symmetric square roots (…, K, K) of positive semidefinite matrices (…, K, K)."""
    values, vectors = torch.linalg.eigh(moments)
    return vectors @ (values.clamp(min=0).sqrt()[..., None] * vectors.transpose(-1, -2))


class _Blocks:
    """A pair cut into blocks.

    ``fixed`` and ``moved`` are (B, U, K, M). ``weighted`` is ``moved`` times the mean input moment of both layers.
    ``weights`` (B, B) holds ab/(a + b) for each fixed and each moved block.
    """

    def __init__(self, pair: Pair, blocks: int, size: int):
        fixed, moved = (_side(member, pair.axis_slice) for member in (pair.fixed, pair.moved))
        a, b = (
            member.rows * _diagonal(member)[pair.axis_slice.start : pair.axis_slice.stop].reshape(blocks, -1).mean(1)
            for member in (fixed, moved)
        )
        self.weights = a[:, None] * b / (a[:, None] + b)
        self.fixed, self.moved = (
            member.weight[pair.axis_slice.start : pair.axis_slice.stop].reshape(blocks, -1, size, member.weight.shape[1])
            for member in (fixed, moved)
        )
        self.inner = [fixed.right, moved.right]
        self.weighted = self._times(self.moved)

    def squares(self) -> Tensor:
        """The sums (B, B) of the weighted squared norms of a fixed and a moved block. No transform changes them."""
        fixed = (self.fixed * self._times(self.fixed)).sum((1, 2, 3))
        moved = (self.moved * self.weighted).sum((1, 2, 3))
        return self.weights * (fixed[:, None] + moved)

    def _times(self, rows_BUKM: Tensor) -> Tensor:
        flat = rows_BUKM.flatten(0, 2).T
        first, second = (side.times(flat) for side in self.inner)
        return ((first + second) / 2).T.reshape(rows_BUKM.shape)


def _side(member: Measured, axis_slice: AxisSlice) -> Measured:
    return member if axis_slice.side == "rows" else member.transposed


def _diagonal(member: Measured) -> Tensor:
    return member.left.moment if member.left.diagonal else member.left.moment.diagonal()


def _size(pairs: Sequence[Pair], blocks: int) -> int:
    return min(pair.axis_slice.stop - pair.axis_slice.start for pair in pairs) // blocks
