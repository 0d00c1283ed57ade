"""Transform the layers of a model so that their weights become more similar, while the model computes the same outputs.

The symmetries of a profile define the possible transforms. The profile is transformed in closed form, without new passes over
data. Transforms are orthogonal, so they do not change the damage of sites that share no factors (keep, low rank).
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
    """The transform of all slices of a symmetry in one layer: an order (blocks,) or rotations (blocks, k, k)."""

    symmetry: Symmetry
    layer: int
    transform: Tensor


class Alignment(NamedTuple):
    """A copy of a model with transformed weights and the same outputs, its profile, and the transforms in order."""

    model: nn.Module
    profile: Profile
    transforms: tuple[Transform, ...]


def align(model: nn.Module, profile: Profile, targets: Iterable[AlignTarget]) -> Alignment:
    """Return a copy of a model with aligned layers, and the profile of that copy.

    The outputs of the copy differ from those of the model only by rounding. The result depends on the weights, the profile and
    the targets, and on no data. Raises ``HprError`` if the profile belongs to another model.
    """
    anatomy = describe(model)
    profile.check(anatomy)
    return align_measured(model, anatomy, measure(model, anatomy, profile), profile, targets)


def align_measured(
    model: nn.Module, anatomy: Anatomy, measured: Mapping[str, Measured], profile: Profile, targets: Iterable[AlignTarget]
) -> Alignment:
    """Like ``align``, for sites that are measured already. ``measured`` needs the sites that the targets transform.

    The function does not change ``measured``.
    """
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
    """Find the transforms of all layers, apply them to ``measured`` and ``statistics`` in place, and return them in order.

    ``only``: the layers to transform, by default all. A layer with the target "layer below" is matched to the layer below it
    after that layer was transformed, so all layers of a run are aligned with each other.
    """
    wanted = sorted(targets, key=lambda target: target.symmetry.kind)  # orders first: a rotation compares blocks by place
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
    """Group the symmetries that transform the same slots, such as all symmetries of the attention of a layer."""
    groups: list[list[Symmetry]] = []
    for symmetry in symmetries:
        touched = [group for group in groups if any(_meet(symmetry, member) for member in group)]
        groups = [group for group in groups if group not in touched] + [[*itertools.chain(*touched), symmetry]]
    return [tuple(group) for group in groups]


def align_options(group: SymmetryGroup) -> list[tuple[AlignTarget, ...]]:
    """The ways to align a group of symmetries: each layer to the principal axes of its heads, or to the layer below.

    The first way exists only if the group has a rotation of more than one row.
    """
    rotations = [symmetry for symmetry in group if symmetry.kind == "rotation" and symmetry.size > 1]
    principal = tuple(AlignTarget(symmetry, "principal axes") for symmetry in rotations)
    return [*([principal] if principal else []), tuple(AlignTarget(symmetry, "layer below") for symmetry in group)]


def _meet(symmetry: Symmetry, other: Symmetry) -> bool:
    return symmetry.stack == other.stack and bool(symmetry.slots & other.slots)


def _transform(
    anatomy: Anatomy,
    measured: Mapping[str, Measured],
    targets: Sequence[AlignTarget],
    target: AlignTarget,
    below: int | None,
    layer: int,
) -> Tensor | None:
    """The best transform of one layer. None if a site of this layer or of the layer ``below`` has no gradient."""
    symmetry, layers = target.symmetry, layers_of(anatomy, target.symmetry)
    moved = {axis_slice: measured[layers[layer][axis_slice.slot].name] for axis_slice in symmetry.slices}
    if not all(site.has_gradient for site in moved.values()):
        return None
    if below is None:
        return principal_rotation(list(moved.items()), symmetry.blocks)
    fixed = {axis_slice: measured[layers[below][axis_slice.slot].name] for axis_slice in symmetry.slices}
    pairs = {axis_slice: Pair(axis_slice, fixed[axis_slice], moved[axis_slice]) for axis_slice in symmetry.slices}
    if not all(site.has_gradient for site in fixed.values()):
        return None
    if symmetry.kind == "rotation":
        return best_rotation(list(pairs.values()), symmetry.blocks)
    same_stack = [other.symmetry for other in targets if other.symmetry.stack == symmetry.stack]
    rotations = [other for other in same_stack if other.kind == "rotation" and other.blocks == symmetry.blocks]
    inside = [other.slices for other in rotations if pairs.keys() >= set(other.slices)]
    rotating = [[pairs[axis_slice] for axis_slice in slices] for slices in inside]
    staying = [pair for axis_slice, pair in pairs.items() if not any(axis_slice in slices for slices in inside)]
    return best_order(rotating, staying, symmetry.blocks)


def _transformed_statistics(statistics: SiteStatistics, axis_slice: AxisSlice, transform: Tensor) -> SiteStatistics:
    """The statistics of the transformed weight. Rows change the moment of the gradients, columns that of the inputs."""
    if axis_slice.side == "rows":
        return replace(statistics, left=_transformed_moment(statistics.left, axis_slice, transform))
    mean = None if statistics.mean is None else transformed(statistics.mean, axis_slice, transform)
    return replace(statistics, right=_transformed_moment(statistics.right, axis_slice, transform), mean=mean)


def _transformed_moment(moment: Tensor, axis_slice: AxisSlice, transform: Tensor) -> Tensor:
    if moment.dim() == 1 and transform.dim() > 1:  # the rotated moment is not diagonal
        moment = moment.diag()
    moment = transformed(moment, axis_slice, transform)
    return moment if moment.dim() == 1 else transformed(moment.T, axis_slice, transform).T
