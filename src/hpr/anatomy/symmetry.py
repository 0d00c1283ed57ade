"""Symmetries: changes of several weights at once that leave what a model computes as it is.

The neurons of a feed-forward may stand in any order (rows of the projections into them, columns of the one out of them), and so
may attention heads. Within a head the values may be rotated if the output projection is rotated back, and, unless something
stands between them (rotary embeddings, norms of queries), queries together with keys.

All turns are orthogonal, so that second moments turn along exactly and every damping of theirs stays what it was.
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
Goal = Literal["match", "principal"]
SIDES = ("rows", "columns")


class Stretch(NamedTuple):
    """Rows [start, stop) of a slot's weights and biases, or columns of its weights."""

    slot: str
    side: Literal["rows", "columns"]
    start: int
    stop: int


@dataclass(frozen=True)
class Symmetry:
    """Stretches of one layer that may be turned together, in every layer of a stack.

    Each stretch is cut into ``blocks`` equal parts. ``order``: the parts may be permuted, all stretches alike.
    ``rotation``: each part may be multiplied by an orthogonal matrix, all stretches by the same; in a stretch that is g
    times as long as the shortest (queries that share a key) each matrix serves g parts in a row.
    """

    stack: str
    kind: Kind
    blocks: int
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        """Rows and columns of one rotation."""
        return min(one.stop - one.start for one in self.stretches) // self.blocks

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(one.slot for one in self.stretches)

    def to_list(self) -> list[Any]:
        """As JSON values: stack, kind, blocks, stretches."""
        return [self.stack, self.kind, self.blocks, [list(one) for one in self.stretches]]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Symmetry:
        """The inverse of ``to_list``. Raises ``ValueError`` or ``TypeError`` for anything else."""
        stack, kind, blocks, stretches = values
        found = cls(str(stack), kind, int(blocks), tuple(Stretch(str(a), b, int(c), int(d)) for a, b, c, d in stretches))
        lengths = [one.stop - one.start for one in found.stretches]
        fits = found.blocks > 0 and all(length > 0 and length % found.blocks == 0 for length in lengths)
        if kind not in ("order", "rotation") or not (lengths and fits) or {one.side for one in found.stretches} - {*SIDES}:
            raise ValueError(f"{values} is no symmetry")
        return found


@dataclass(frozen=True)
class Aim:
    """A symmetry to use, and to what end.

    ``match``: each layer is made like the one below, which lowers the damage of a matrix that both use. ``principal``
    (rotations only): each layer is turned into its own principal axes, most important first, which lowers that of a basis.
    """

    symmetry: Symmetry
    goal: Goal

    def touches(self, site: Site) -> bool:
        """Whether it turns this site."""
        return site.stack == self.symmetry.stack and site.slot in self.symmetry.slots

    def to_list(self) -> list[Any]:
        """As JSON values: goal, then the symmetry's."""
        return [self.goal, *self.symmetry.to_list()]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Aim:
        """The inverse of ``to_list``. Raises ``ValueError`` or ``TypeError`` for anything else."""
        goal, *rest = values
        found = cls(Symmetry.from_list(rest), goal)
        if goal not in ("match", "principal") or (goal == "principal" and found.symmetry.kind != "rotation"):
            raise ValueError(f"{goal!r} is no goal of this symmetry")
        return found


def turned(matrix: Tensor, stretch: Stretch, turn: Tensor) -> Tensor:
    """A copy of (n, …) with the rows of a stretch turned, by an order of its blocks (blocks,) or rotations (blocks, k, k)."""
    part = matrix[stretch.start : stretch.stop]
    if turn.dim() == 1:
        part = part.reshape(len(turn), -1)[turn.to(part.device)].reshape(part.shape)
    else:
        blocks, size, _ = turn.shape
        users = len(part) // (blocks * size)
        part = (turn.repeat_interleave(users, 0).to(part) @ part.reshape(blocks * users, size, -1)).reshape(part.shape)
    return torch.cat([matrix[: stretch.start], part, matrix[stretch.stop :]])


def turn_site(model: nn.Module, site: Site, stretch: Stretch, turn: Tensor) -> None:
    """Turn a stretch of a site's weight, and its bias with the rows, in place."""
    weight = weight_at(model, site).data
    if stretch.side == "columns":
        weight.copy_(turned(weight.T.double(), stretch, turn).T)
        return
    weight.copy_(turned(weight.double(), stretch, turn))
    if site.has_bias:
        bias: Tensor = module_at(model, site.name).bias.data  # type: ignore[union-attr, assignment]
        bias.copy_(turned(bias.double(), stretch, turn))


def layers_of(anatomy: Anatomy, symmetry: Symmetry) -> dict[int, dict[str, Site]]:
    """Layer → slot → site, for the layers that have all its slots."""
    found: dict[int, dict[str, Site]] = {}
    for site in anatomy.sites:
        if site.stack == symmetry.stack and site.layer is not None and site.slot in symmetry.slots and site.expert is None:
            found.setdefault(site.layer, {})[site.slot] = site
    return {layer: sites for layer, sites in sorted(found.items()) if sites.keys() == symmetry.slots}
