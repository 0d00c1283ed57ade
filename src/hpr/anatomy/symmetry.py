"""Symmetries: changes of several weights at once that do not change what a model computes.

The neurons of a feed-forward network may be permuted (rows of the projections into them, columns of the projection out of
them), and so may attention heads. Within a head the values may be rotated if the output projection is rotated back. Queries may
be rotated together with keys, unless the model changes them in between (rotary embeddings, norms of queries).

All transforms are orthogonal. So second moments can be transformed exactly, and their damping stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at, weight_at
from hpr.anatomy.model import Anatomy, Site

Kind = Literal["order", "rotation"]
AlignTo = Literal["layer below", "principal axes"]
SIDES = ("rows", "columns")


class AxisSlice(NamedTuple):
    """Rows [start, stop) of the weights and biases of a slot, or columns of its weights."""

    slot: str
    side: Literal["rows", "columns"]
    start: int
    stop: int


@dataclass(frozen=True)
class Symmetry:
    """Slices of one layer that may be transformed together, in every layer of a stack.

    Each slice is cut into ``blocks`` equal parts. ``order``: the parts may be permuted, in all slices alike. ``rotation``:
    each part may be multiplied by an orthogonal matrix, the same one in all slices. If a slice is g times as long as the
    shortest (queries that share a key), each matrix serves g consecutive parts.
    """

    stack: str
    kind: Kind
    blocks: int
    slices: tuple[AxisSlice, ...]

    @property
    def size(self) -> int:
        """Rows and columns of one rotation."""
        return min(part.stop - part.start for part in self.slices) // self.blocks

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(part.slot for part in self.slices)

    def to_list(self) -> list[Any]:
        """As JSON values: stack, kind, blocks, slices."""
        return [self.stack, self.kind, self.blocks, [list(part) for part in self.slices]]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Symmetry:
        """The inverse of ``to_list``. Raises ``ValueError`` or ``TypeError`` for anything else."""
        stack, kind, blocks, slices = values
        symmetry = cls(str(stack), kind, int(blocks), tuple(AxisSlice(str(a), b, int(c), int(d)) for a, b, c, d in slices))
        lengths = [part.stop - part.start for part in symmetry.slices]
        fits = symmetry.blocks > 0 and all(length > 0 and length % symmetry.blocks == 0 for length in lengths)
        if kind not in ("order", "rotation") or not (lengths and fits) or {part.side for part in symmetry.slices} - {*SIDES}:
            raise ValueError(f"{values} is no symmetry")
        return symmetry


SymmetryGroup = tuple[Symmetry, ...]  # symmetries of one attention or one feed-forward network: they have slots in common


@dataclass(frozen=True)
class AlignTarget:
    """A symmetry to use, and what to align the layers to.

    ``layer below``: each layer is made like the one below it, which lowers the damage of a matrix that both use. ``principal
    axes`` (rotations only): each layer is rotated to its own principal axes, the most important first, which lowers the damage
    of a basis that layers share.
    """

    symmetry: Symmetry
    align_to: AlignTo

    def touches(self, site: Site) -> bool:
        """Whether it transforms this site."""
        return site.stack == self.symmetry.stack and site.slot in self.symmetry.slots

    def to_list(self) -> list[Any]:
        """As JSON values: what to align to, then the symmetry."""
        return [self.align_to, *self.symmetry.to_list()]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> AlignTarget:
        """The inverse of ``to_list``. Raises ``ValueError`` or ``TypeError`` for anything else."""
        align_to, *rest = values
        target = cls(Symmetry.from_list(rest), align_to)
        if align_to not in ("layer below", "principal axes"):
            raise ValueError(f"{align_to!r} is neither 'layer below' nor 'principal axes'")
        if align_to == "principal axes" and target.symmetry.kind != "rotation":
            raise ValueError("only a rotation can align layers to principal axes")
        return target


def transformed(matrix: Tensor, axis_slice: AxisSlice, transform: Tensor) -> Tensor:
    """A copy of (n, …) whose rows in a slice are transformed, by an order of blocks (blocks,) or rotations (blocks, k, k)."""
    part = matrix[axis_slice.start : axis_slice.stop]
    if transform.dim() == 1:
        part = part.reshape(len(transform), -1)[transform.to(part.device)].reshape(part.shape)
    else:
        blocks, size, _ = transform.shape
        users = len(part) // (blocks * size)
        part = (transform.repeat_interleave(users, 0).to(part) @ part.reshape(blocks * users, size, -1)).reshape(part.shape)
    return torch.cat([matrix[: axis_slice.start], part, matrix[axis_slice.stop :]])


def transform_site(model: nn.Module, site: Site, axis_slice: AxisSlice, transform: Tensor) -> None:
    """Transform a slice of the weight of a site in place; rows of the bias follow the rows of the weight."""
    weight = weight_at(model, site).data
    if axis_slice.side == "columns":
        weight.copy_(transformed(weight.T.double(), axis_slice, transform).T)
        return
    weight.copy_(transformed(weight.double(), axis_slice, transform))
    if site.has_bias:
        bias: Tensor = module_at(model, site.name).bias.data  # type: ignore[union-attr, assignment]
        bias.copy_(transformed(bias.double(), axis_slice, transform))


def layers_of(anatomy: Anatomy, symmetry: Symmetry) -> dict[int, dict[str, Site]]:
    """Layer → slot → site, for the layers that have all its slots at full width: pruned layers may be narrower."""
    found: dict[int, dict[str, Site]] = {}
    for site in anatomy.sites:
        if site.stack == symmetry.stack and site.layer is not None and site.slot in symmetry.slots and site.expert is None:
            found.setdefault(site.layer, {})[site.slot] = site
    fitting = {layer: sites for layer, sites in found.items() if sites.keys() == symmetry.slots}
    return {
        layer: sites
        for layer, sites in sorted(fitting.items())
        if all(_covers(part, sites[part.slot]) for part in symmetry.slices)
    }


def _covers(part: AxisSlice, site: Site) -> bool:
    """Whether a slice fits into a site. One that leaves the rest of a row or column alone was found in a fused projection."""
    length = site.out_features if part.side == "rows" else site.in_features
    return part.stop <= length
