"""Whether aligning layers pays, from a look at a few of them.

Curves are the slowest part of planning, so they are not measured twice to find that out. Each attention and each feed-forward
is looked at in one pair of layers: the least damage that any operator gives there, before and after turning them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np

from hpr.alignment import goals, turn_all, units
from hpr.anatomy import Anatomy, Site
from hpr.operators import OPERATORS, basis, lowrank, tie
from hpr.operators.metric import Measured
from hpr.profiling.profile import Profile
from hpr.symmetries import Aim, Symmetry, layers_of

SHARES = (0.5, 0.25)  # of a pair's parameters
MARGIN = 0.02
_QUICK = (tie.TIE, basis.INPUT, basis.OUTPUT)  # others lie between these, and cost more to look at


def worthwhile(
    anatomy: Anatomy,
    profile: Profile,
    measured: Mapping[str, Measured],
    chosen: Set[str],
    operators: Set[str],
    margin: float = MARGIN,
) -> tuple[Aim, ...]:
    """For every attention and feed-forward the best aims, where they lower its damage by more than a share of ``margin``.

    ``chosen``: names of the sites that are planned; ``operators``: names of those that may be used. The pair is that in the
    middle of its stack. Damage is the least at half and at a quarter of the pair's parameters, summed over its slots.
    """
    names = [name for name in _QUICK if name in operators]
    names = names or [name for name, operator in OPERATORS.items() if operator.shared and name in operators]
    found: list[Aim] = []
    for unit in units(profile.symmetries):
        pairs = _middle_pairs(anatomy, unit, chosen)
        if not pairs:
            continue
        layers = [site.layer for site in pairs[0] if site.layer is not None]
        alone = [_alone([measured[site.name] for site in pair], operators) for pair in pairs]
        before = _damage(measured, pairs, alone, names)
        best = 1 - margin
        aims: tuple[Aim, ...] = ()
        for goal in goals(unit):
            state = dict(measured)
            turn_all(anatomy, state, dict(profile.sites), goal, layers)
            after = _damage(state, pairs, alone, names)
            known = np.isfinite(before) & (before > 0)
            ratio = float((after[known] / before[known]).mean()) if known.any() else 1.0
            if ratio < best:
                best, aims = ratio, goal
        found += aims
    return tuple(found)


def _middle_pairs(anatomy: Anatomy, unit: Sequence[Symmetry], chosen: Set[str]) -> list[tuple[Site, Site]]:
    """The sites of each slot of a unit in two neighbouring layers, as far as they are chosen."""
    sites: dict[int, dict[str, Site]] = {}
    for symmetry in unit:
        for layer, slots in layers_of(anatomy, symmetry).items():
            sites.setdefault(layer, {}).update({slot: site for slot, site in slots.items() if site.name in chosen})
    couples = [(layer, layer + 1) for layer in sorted(sites) if sites[layer].keys() & sites.get(layer + 1, {}).keys()]
    if not couples:
        return []
    lower, upper = couples[(len(couples) - 1) // 2]
    return [(sites[lower][slot], sites[upper][slot]) for slot in sites[lower] if slot in sites[upper]]


def _alone(pair: Sequence[Measured], operators: Set[str]) -> np.ndarray:
    """Damage of both sites at each share if nothing is shared; no turn changes it."""
    if lowrank.NAME not in operators:
        return np.full(len(SHARES), np.inf)
    return np.sum([_least([one], [lowrank.NAME]) for one in pair], axis=0)


def _damage(
    measured: Mapping[str, Measured], pairs: Sequence[tuple[Site, Site]], alone: Sequence[np.ndarray], names: Sequence[str]
) -> np.ndarray:
    shared = [_least([measured[site.name] for site in pair], names) for pair in pairs]
    return np.sum([np.minimum(one, other) for one, other in zip(shared, alone, strict=True)], axis=0)


def _least(group: Sequence[Measured], names: Sequence[str]) -> np.ndarray:
    """The least damage at each share of a group's parameters; inf where nothing is small enough."""
    curves = [curve for name in names if (curve := OPERATORS[name].candidate(group)) is not None]
    limits = [share * sum(one.site.parameters for one in group) for share in SHARES]
    return np.array(
        [
            min((curve.damages[curve.parameters <= limit].min(initial=np.inf) for curve in curves), default=np.inf)
            for limit in limits
        ]
    )
