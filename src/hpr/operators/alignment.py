"""Alignment: transform the layers of a model so that they have more in common, without changing what the model computes.

The symmetries of a profile say which transforms are possible. The profile is transformed in closed form, so no new pass over
data is needed. Transforms are orthogonal, so the damage of a site that shares nothing (kept, low rank) stays the same.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.model import Anatomy
from hpr.anatomy.symmetry import AlignTarget, AxisSlice, Symmetry, SymmetryGroup, layers_of, transform_site, transformed
from hpr.operators.matching import Pair, best_order, best_rotation, principal_rotation
from hpr.operators.metric import Measured, measure, measured_site
from hpr.profiling.profile import Profile, SiteStatistics


class Transform(NamedTuple):
    """What is done to the slices of a symmetry in one layer: an order (blocks,) or rotations (blocks, k, k)."""

    symmetry: Symmetry
    layer: int
    transform: Tensor


class Alignment(NamedTuple):
    """A copy of a model that computes the same with transformed weights, its profile, and the transforms in order."""

    model: nn.Module
    profile: Profile
    transforms: tuple[Transform, ...]


def align(model: nn.Module, profile: Profile, targets: Iterable[AlignTarget]) -> Alignment:
    """Transform a copy of a model, and its profile with it. Depends on weights, profile and targets alone.

    Outputs stay the same but for rounding. Raises ``HprError`` for a profile of another model.
    """
    anatomy = describe(model)
    profile.check(anatomy)
    return align_measured(model, anatomy, measure(model, anatomy, profile), profile, targets)


def align_measured(
    model: nn.Module, anatomy: Anatomy, measured: Mapping[str, Measured], profile: Profile, targets: Iterable[AlignTarget]
) -> Alignment:
    """``align`` for a model whose sites are measured, as far as the targets touch them. ``measured`` stays as it is."""
    statistics = dict(profile.sites)
    transforms = transform_all(anatomy, dict(measured), statistics, targets)
    aligned = copy.deepcopy(model)
    for symmetry, layer, transform in transforms:
        sites = layers_of(anatomy, symmetry)[layer]
        for axis_slice in symmetry.slices:
            transform_site(aligned, sites[axis_slice.slot], axis_slice, transform)
    return Alignment(aligned, replace(profile, fingerprint=describe(aligned).fingerprint, sites=statistics), tuple(transforms))


def transform_all(
    anatomy: Anatomy,
    measured: dict[str, Measured],
    statistics: dict[str, SiteStatistics],
    targets: Iterable[AlignTarget],
    only: Sequence[int] | None = None,
) -> list[Transform]:
    """Find the transforms of all layers (or of ``only`` some) and apply them to weights and statistics, in place.

    Each layer is matched to the transformed layer below, so any run of layers is aligned.
    """
    wanted = sorted(targets, key=lambda target: target.symmetry.kind)  # orders first, so that rotations find their places
    transforms = []
    for target in wanted:
        layers = [layer for layer in layers_of(anatomy, target.symmetry) if only is None or layer in only]
        steps = [(None, layer) for layer in layers] if target.align_to == "principal axes" else itertools.pairwise(layers)
        for below, layer in steps:
            transform = _transform(anatomy, measured, wanted, target, below, layer)
            if transform is None:
                continue
            transforms.append(Transform(target.symmetry, layer, transform))
            for axis_slice in target.symmetry.slices:
                site = layers_of(anatomy, target.symmetry)[layer][axis_slice.slot]
                weight = measured[site.name].weight
                weight = (
                    transformed(weight, axis_slice, transform)
                    if axis_slice.side == "rows"
                    else transformed(weight.T, axis_slice, transform).T
                )
                statistics[site.name] = _transformed_statistics(statistics[site.name], axis_slice, transform)
                measured[site.name] = measured_site(site, weight, statistics[site.name])
    return transforms


def symmetry_groups(symmetries: Sequence[Symmetry]) -> list[SymmetryGroup]:
    """Symmetries that have slices in common (one attention, one feed-forward) together."""
    found: list[list[Symmetry]] = []
    for symmetry in symmetries:
        touched = [group for group in found if any(_meet(symmetry, one) for one in group)]
        found = [group for group in found if group not in touched] + [[*itertools.chain(*touched), symmetry]]
    return [tuple(group) for group in found]


def align_options(group: SymmetryGroup) -> list[tuple[AlignTarget, ...]]:
    """The ways to align a group: each layer to the principal axes of its heads, or each layer to the layer below."""
    rotations = [one for one in group if one.kind == "rotation" and one.size > 1]
    principal = tuple(AlignTarget(one, "principal axes") for one in rotations)
    return [*([principal] if principal else []), tuple(AlignTarget(one, "layer below") for one in group)]


def _meet(one: Symmetry, other: Symmetry) -> bool:
    return one.stack == other.stack and bool(one.slots & other.slots)


def _transform(
    anatomy: Anatomy,
    measured: Mapping[str, Measured],
    targets: Sequence[AlignTarget],
    target: AlignTarget,
    below: int | None,
    layer: int,
) -> Tensor | None:
    """The best transform of one layer; None where the objective does not depend on it."""
    symmetry, layers = target.symmetry, layers_of(anatomy, target.symmetry)
    moved = {axis_slice: measured[layers[layer][axis_slice.slot].name] for axis_slice in symmetry.slices}
    if not all(one.has_gradient for one in moved.values()):
        return None
    if below is None:
        return principal_rotation(list(moved.items()), symmetry.blocks)
    fixed = {axis_slice: measured[layers[below][axis_slice.slot].name] for axis_slice in symmetry.slices}
    pairs = {axis_slice: Pair(axis_slice, fixed[axis_slice], moved[axis_slice]) for axis_slice in symmetry.slices}
    if not all(one.has_gradient for one in fixed.values()):
        return None
    if symmetry.kind == "rotation":
        return best_rotation(list(pairs.values()), symmetry.blocks)
    rotations = [one.symmetry for one in targets if one.symmetry.kind == "rotation" and one.symmetry.stack == symmetry.stack]
    inside = [one.slices for one in rotations if one.blocks == symmetry.blocks and pairs.keys() >= set(one.slices)]
    rotating = [[pairs[axis_slice] for axis_slice in slices] for slices in inside]
    staying = [pair for axis_slice, pair in pairs.items() if not any(axis_slice in slices for slices in inside)]
    return best_order(rotating, staying, symmetry.blocks)


def _transformed_statistics(known: SiteStatistics, axis_slice: AxisSlice, transform: Tensor) -> SiteStatistics:
    """Statistics of the transformed weight: its gradients change with its rows, its inputs with its columns."""
    if axis_slice.side == "rows":
        return replace(known, left=_transformed_moment(known.left, axis_slice, transform))
    mean = None if known.mean is None else transformed(known.mean, axis_slice, transform)
    return replace(known, right=_transformed_moment(known.right, axis_slice, transform), mean=mean)


def _transformed_moment(moment: Tensor, axis_slice: AxisSlice, transform: Tensor) -> Tensor:
    if moment.dim() == 1 and transform.dim() > 1:  # a diagonal cannot follow a rotation
        moment = moment.diag()
    moment = transformed(moment, axis_slice, transform)
    return moment if moment.dim() == 1 else transformed(moment.T, axis_slice, transform).T
