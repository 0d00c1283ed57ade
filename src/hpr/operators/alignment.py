"""Alignment: turn the layers of a model, without changing what it computes, so that what they share has more in common.

The symmetries that a profile found say what may be turned. The profile turns along in closed form, so no new pass over data is
needed; and as turns are orthogonal, what a site may become alone (kept, low rank) costs the same before and after.
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
from hpr.anatomy.symmetry import Aim, Stretch, Symmetry, layers_of, turn_site, turned
from hpr.operators.matching import Pair, best_order, best_rotation, principal_rotation
from hpr.operators.metric import Measured, measure, measured_site
from hpr.profiling.profile import Profile, SiteStatistics


class Turn(NamedTuple):
    """What is done to the stretches of a symmetry in one layer: an order (blocks,) or rotations (blocks, k, k)."""

    symmetry: Symmetry
    layer: int
    turn: Tensor


class Alignment(NamedTuple):
    """A copy of a model that computes the same with turned weights, its profile, and the turns in the order they were made."""

    model: nn.Module
    profile: Profile
    turns: tuple[Turn, ...]


def align(model: nn.Module, profile: Profile, aims: Iterable[Aim]) -> Alignment:
    """Turn a copy of a model, and its profile with it. Depends on weights, profile and aims alone.

    Outputs stay the same but for rounding. Raises ``HprError`` for a profile of another model.
    """
    anatomy = describe(model)
    profile.check(anatomy)
    return align_measured(model, anatomy, measure(model, anatomy, profile), profile, aims)


def align_measured(
    model: nn.Module, anatomy: Anatomy, measured: Mapping[str, Measured], profile: Profile, aims: Iterable[Aim]
) -> Alignment:
    """``align`` for a model whose sites are measured, as far as the aims touch them. ``measured`` stays as it is."""
    statistics = dict(profile.sites)
    turns = turn_all(anatomy, dict(measured), statistics, aims)
    aligned = copy.deepcopy(model)
    for symmetry, layer, turn in turns:
        sites = layers_of(anatomy, symmetry)[layer]
        for stretch in symmetry.stretches:
            turn_site(aligned, sites[stretch.slot], stretch, turn)
    return Alignment(aligned, replace(profile, fingerprint=describe(aligned).fingerprint, sites=statistics), tuple(turns))


def turn_all(
    anatomy: Anatomy,
    measured: dict[str, Measured],
    statistics: dict[str, SiteStatistics],
    aims: Iterable[Aim],
    only: Sequence[int] | None = None,
) -> list[Turn]:
    """Find the turns of all layers, or of some, and carry them out on sites in their metric and on their statistics, in place.

    A layer that is matched is matched to the one below as that was turned, so any run of layers is aligned.
    """
    wanted = sorted(aims, key=lambda aim: aim.symmetry.kind)  # orders first, so that rotations find their places
    turns = []
    for aim in wanted:
        layers = [layer for layer in layers_of(anatomy, aim.symmetry) if only is None or layer in only]
        steps = [(None, layer) for layer in layers] if aim.goal == "principal" else itertools.pairwise(layers)
        for below, layer in steps:
            turn = _turn(anatomy, measured, wanted, aim, below, layer)
            if turn is None:
                continue
            turns.append(Turn(aim.symmetry, layer, turn))
            for stretch in aim.symmetry.stretches:
                site = layers_of(anatomy, aim.symmetry)[layer][stretch.slot]
                weight = measured[site.name].weight
                weight = turned(weight, stretch, turn) if stretch.side == "rows" else turned(weight.T, stretch, turn).T
                statistics[site.name] = _turned_statistics(statistics[site.name], stretch, turn)
                measured[site.name] = measured_site(site, weight, statistics[site.name])
    return turns


def units(symmetries: Sequence[Symmetry]) -> list[tuple[Symmetry, ...]]:
    """Symmetries that have stretches in common (one attention, one feed-forward) together."""
    found: list[list[Symmetry]] = []
    for symmetry in symmetries:
        touched = [unit for unit in found if any(_meet(symmetry, one) for one in unit)]
        found = [unit for unit in found if unit not in touched] + [[*itertools.chain(*touched), symmetry]]
    return [tuple(unit) for unit in found]


def goals(unit: Sequence[Symmetry]) -> list[tuple[Aim, ...]]:
    """What may be aimed at with a unit: principal axes of its heads, or layers that match."""
    rotations = [one for one in unit if one.kind == "rotation" and one.size > 1]
    principal = tuple(Aim(one, "principal") for one in rotations)
    return [*([principal] if principal else []), tuple(Aim(one, "match") for one in unit)]


def _meet(one: Symmetry, other: Symmetry) -> bool:
    return one.stack == other.stack and bool(one.slots & other.slots)


def _turn(
    anatomy: Anatomy, measured: Mapping[str, Measured], aims: Sequence[Aim], aim: Aim, below: int | None, layer: int
) -> Tensor | None:
    """The best turn of one layer; None where the objective does not depend on it."""
    symmetry, layers = aim.symmetry, layers_of(anatomy, aim.symmetry)
    moved = {stretch: measured[layers[layer][stretch.slot].name] for stretch in symmetry.stretches}
    if not all(one.live for one in moved.values()):
        return None
    if below is None:
        return principal_rotation(list(moved.items()), symmetry.blocks)
    fixed = {stretch: measured[layers[below][stretch.slot].name] for stretch in symmetry.stretches}
    pairs = {stretch: Pair(stretch, fixed[stretch], moved[stretch]) for stretch in symmetry.stretches}
    if not all(one.live for one in fixed.values()):
        return None
    if symmetry.kind == "rotation":
        return best_rotation(list(pairs.values()), symmetry.blocks)
    rotations = [one.symmetry for one in aims if one.symmetry.kind == "rotation" and one.symmetry.stack == symmetry.stack]
    inside = [one.stretches for one in rotations if one.blocks == symmetry.blocks and pairs.keys() >= set(one.stretches)]
    turning = [[pairs[stretch] for stretch in stretches] for stretches in inside]
    staying = [pair for stretch, pair in pairs.items() if not any(stretch in stretches for stretches in inside)]
    return best_order(turning, staying, symmetry.blocks)


def _turned_statistics(known: SiteStatistics, stretch: Stretch, turn: Tensor) -> SiteStatistics:
    """Gradients of turned outputs turn with them, inputs of turned columns likewise; the other side sees nothing."""
    if stretch.side == "rows":
        return replace(known, left=_turned_moment(known.left, stretch, turn))
    mean = None if known.mean is None else turned(known.mean, stretch, turn)
    return replace(known, right=_turned_moment(known.right, stretch, turn), mean=mean)


def _turned_moment(moment: Tensor, stretch: Stretch, turn: Tensor) -> Tensor:
    if moment.dim() == 1 and turn.dim() > 1:  # a diagonal cannot follow a rotation
        moment = moment.diag()
    moment = turned(moment, stretch, turn)
    return moment if moment.dim() == 1 else turned(moment.T, stretch, turn).T
