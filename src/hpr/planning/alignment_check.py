"""Decides whether alignment of layers pays, from measurements at a few layers.

Curves are the slowest part of planning, so the planner measures all of them again only if alignment promises a gain. The check
takes one pair of layers for each attention and each feed-forward. It compares the least damage that any operator gives in this
pair before and after alignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np

from hpr.anatomy.model import Anatomy, Site
from hpr.anatomy.symmetry import AlignTarget, SymmetryGroup, layers_of
from hpr.operators import low_rank
from hpr.operators.alignment import align_options, symmetry_groups, transform_all
from hpr.operators.metric import Measured
from hpr.operators.registry import OPERATORS
from hpr.profiling.profile import Profile

SHARES = (0.5, 0.25)  # of a pair's parameters
MARGIN = 0.02
Damages = dict[str, np.ndarray]


def alignment_targets(
    anatomy: Anatomy,
    profile: Profile,
    measured: Mapping[str, Measured],
    chosen: Set[str],
    operators: Set[str],
    margin: float = MARGIN,
) -> tuple[AlignTarget, ...]:
    """The best targets of every attention and feed-forward whose damage (nats per example) they lower enough.

    ``chosen``: names of the sites that are planned. ``operators``: names of the operators that may be used. ``margin``: the
    least relative decrease of the damage. The check measures the pair of layers in the middle of a stack. Its damage is the
    least at half and at a quarter of the pair's parameters, summed over its slots.
    """
    sharing = [operator for name, operator in OPERATORS.items() if operator.shared and name in operators]
    tried = [operator for operator in sharing if operator.quick] or sharing
    names = [operator.name for operator in tried]
    all_targets: list[AlignTarget] = []
    for symmetries in symmetry_groups(profile.symmetries):
        pairs = [] if _unlike(anatomy, symmetries) else _middle_pairs(anatomy, symmetries, chosen)
        if not pairs:
            continue
        layers = [site.layer for site in pairs[0] if site.layer is not None]
        groups = [[measured[site.name] for site in pair] for pair in pairs]
        alone = [_alone(group, operators) for group in groups]
        shared = [_least(group, names) for group in groups]
        before = _total(shared, alone)
        best = 1 - margin
        targets: tuple[AlignTarget, ...] = ()
        for option in align_options(symmetries):
            state = dict(measured)
            transform_all(anatomy, state, dict(profile.sites), option, layers)
            helped = [operator.name for operator in tried if option[0].align_to in operator.helped_by] or names
            transformed = [_least([state[site.name] for site in pair], helped) for pair in pairs]
            after = _total([old | new for old, new in zip(shared, transformed, strict=True)], alone)
            comparable = np.isfinite(before) & (before > 0)
            ratio = float((after[comparable] / before[comparable]).mean()) if comparable.any() else 1.0
            if ratio < best:
                best, targets = ratio, option
        all_targets += targets
    return tuple(all_targets)


def _middle_pairs(anatomy: Anatomy, symmetries: SymmetryGroup, chosen: Set[str]) -> list[tuple[Site, Site]]:
    """The chosen sites of each slot of a group in two neighbouring layers, those nearest to the middle of the stack."""
    sites: dict[int, dict[str, Site]] = {}
    for symmetry in symmetries:
        for layer, slots in layers_of(anatomy, symmetry).items():
            sites.setdefault(layer, {}).update({slot: site for slot, site in slots.items() if site.name in chosen})
    couples = [(layer, layer + 1) for layer in sorted(sites) if sites[layer].keys() & sites.get(layer + 1, {}).keys()]
    if not couples:
        return []
    lower, upper = couples[(len(couples) - 1) // 2]
    return [(sites[lower][slot], sites[upper][slot]) for slot in sites[lower] if slot in sites[upper]]


def _unlike(anatomy: Anatomy, symmetries: SymmetryGroup) -> bool:
    """Whether a slot has several shapes, as in hierarchical and pruned models: such layers cannot be made like one another."""
    shapes: dict[str, set[tuple[int, int]]] = {}
    for symmetry in symmetries:
        for slots in layers_of(anatomy, symmetry).values():
            for slot, site in slots.items():
                shapes.setdefault(slot, set()).add((site.out_features, site.in_features))
    return any(len(several) > 1 for several in shapes.values())


def _alone(group: Sequence[Measured], operators: Set[str]) -> np.ndarray:
    """Damage at each share of the parameters if nothing is shared, (shares,). Alignment does not change it."""
    if low_rank.NAME not in operators:
        return np.full(len(SHARES), np.inf)
    return np.sum([_least([site], [low_rank.NAME])[low_rank.NAME] for site in group], axis=0)


def _least(group: Sequence[Measured], names: Sequence[str]) -> Damages:
    """Operator → its least damage at each share of a group's parameters, (shares,); inf if it needs more parameters."""
    damages = {}
    for name in names:
        curve = OPERATORS[name].candidate(group)
        limits = [share * sum(measured.site.parameters for measured in group) for share in SHARES]
        if curve is not None:
            damages[name] = np.array([curve.damages[curve.parameters <= limit].min(initial=np.inf) for limit in limits])
    return damages


def _total(shared: Sequence[Damages], alone: Sequence[np.ndarray]) -> np.ndarray:
    """The least damage of all operators at each share, summed over slots: (shares,)."""
    pairs = zip(shared, alone, strict=True)
    return np.sum([np.min([private, *by_operator.values()], axis=0) for by_operator, private in pairs], axis=0)
