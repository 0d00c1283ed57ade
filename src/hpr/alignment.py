"""Alignment: turn each layer of a model towards the layer below, so that what they share has more in common.

The symmetries that a profile found say what may be turned without changing what the model computes. Layer by layer, each
towards the one below as that was turned, so that any run of layers is aligned. The profile turns along in closed form.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from hpr.anatomy import describe
from hpr.operators.align import Pair, best_order, best_rotation
from hpr.operators.metric import Measured, measure, measured_site
from hpr.profiling.profile import Profile, SiteStatistics
from hpr.profiling.symmetries import Stretch, Symmetry, layers_of, turn_site, turned


class Turn(NamedTuple):
    """What was done to the stretches of a symmetry in one layer: an order (blocks,) or rotations (blocks, k, k)."""

    symmetry: Symmetry
    layer: int
    turn: Tensor


@dataclass(frozen=True)
class Alignment:
    """A copy of a model that computes the same with turned weights, its profile, and the turns in the order they were made."""

    model: nn.Module
    profile: Profile
    turns: tuple[Turn, ...]


def align(model: nn.Module, profile: Profile, symmetries: Sequence[Symmetry] | None = None) -> Alignment:
    """Turn a copy of a model, and its profile, towards the lowest layer of each stack.

    ``symmetries``: those to use, all of the profile's by default. The result depends on weights and profile alone. Outputs
    stay the same but for rounding, and so does the damage of whatever a single site may become.
    """
    anatomy = describe(model)
    profile.check(anatomy)
    symmetries = profile.symmetries if symmetries is None else symmetries
    aligned = copy.deepcopy(model)
    measured = measure(model, anatomy, profile)
    statistics = dict(profile.sites)
    turns: list[Turn] = []

    def carry_out(symmetry: Symmetry, layer: int, turn: Tensor) -> None:
        turns.append(Turn(symmetry, layer, turn))
        for stretch in symmetry.stretches:
            site = layers_of(anatomy, symmetry)[layer][stretch.slot]
            turn_site(aligned, site, stretch, turn)
            weight = _turned_weight(measured[site.name].weight, stretch, turn)
            statistics[site.name] = _turned_statistics(statistics[site.name], stretch, turn)
            measured[site.name] = measured_site(site, weight, statistics[site.name])

    for symmetry in sorted(symmetries, key=lambda one: one.kind):  # orders first, so that rotations find their places
        layers = layers_of(anatomy, symmetry)
        for below, layer in itertools.pairwise(layers):
            pairs = {
                one: Pair(one, measured[layers[below][one.slot].name], measured[layers[layer][one.slot].name])
                for one in symmetry.stretches
            }
            if all(pair.fixed.live and pair.moved.live for pair in pairs.values()):
                carry_out(symmetry, layer, _best_turn(symmetry, symmetries, pairs))
    changed = describe(aligned)
    return Alignment(aligned, replace(profile, fingerprint=changed.fingerprint, sites=statistics), tuple(turns))


def _best_turn(symmetry: Symmetry, symmetries: Sequence[Symmetry], pairs: Mapping[Stretch, Pair]) -> Tensor:
    if symmetry.kind == "rotation":
        return best_rotation(list(pairs.values()), symmetry.blocks)
    rotations = [one for one in symmetries if one.kind == "rotation" and one.stack == symmetry.stack]
    inside = [one.stretches for one in rotations if one.blocks == symmetry.blocks and set(one.stretches) <= pairs.keys()]
    turning = [[pairs[one] for one in stretches] for stretches in inside]
    staying = [pair for one, pair in pairs.items() if not any(one in stretches for stretches in inside)]
    return best_order(turning, staying, symmetry.blocks)


def _turned_weight(weight: Tensor, stretch: Stretch, turn: Tensor) -> Tensor:
    return turned(weight, stretch, turn) if stretch.side == "rows" else turned(weight.T, stretch, turn).T


def _turned_statistics(known: SiteStatistics, stretch: Stretch, turn: Tensor) -> SiteStatistics:
    """Gradients of turned outputs turn with them, inputs of turned columns likewise; the other side sees nothing."""
    side = "left" if stretch.side == "rows" else "right"
    moment: Tensor = getattr(known, side)
    moment = turned(moment, stretch, turn)
    if moment.dim() == 2:
        moment = turned(moment.T, stretch, turn).T
    mean = known.mean if known.mean is None or side == "left" else turned(known.mean, stretch, turn)
    return replace(known, **{side: moment, "mean": mean})
