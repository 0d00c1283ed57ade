"""Composites: a whole interval cut into groups that need not be contiguous, as one candidate among the others.

A cycle or a matching puts layers together that are no neighbours, which no segmentation of a track can. Each group chooses its
operator and rank by itself, so the curve of a composite is the sum of its groups' curves along one Lagrange multiplier
(Shoham & Gersho 1988): exact at every vertex of the lower convex hull.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hpr.plans.terms import KEEP
from hpr.solver.candidates import Candidate, Track

POINTS = 256  # of a composite's curve at most


class Hull(NamedTuple):
    """Vertices of the lower convex hull of several candidates' points, by parameters; damages fall, ever more slowly."""

    numbers: np.ndarray  # which candidate
    indices: np.ndarray  # which point of it
    parameters: np.ndarray
    damages: np.ndarray

    def damage_at(self, parameters: float) -> float:
        """Damage (nats) between vertices, on the straight line; beyond the ends that of the end."""
        return float(np.interp(parameters, self.parameters, self.damages))

    @property
    def rates(self) -> np.ndarray:
        """Nats gained per parameter on each edge, strictly falling: (vertices - 1,)."""
        return -np.diff(self.damages) / np.diff(self.parameters)


def compose(operator: str, partition: Sequence[int], parts: Sequence[tuple[Candidate, ...]]) -> Candidate:
    """One candidate for an interval of ``len(partition)`` positions, from the candidates of each group.

    ``partition``: the group of each position, from 0; ``parts[g]``: what group g may choose from, composites included.
    ``operator`` names the grouping. The curve has the vertices of the hull, thinned evenly to at most ``POINTS``.
    """
    hulls = [hull(options) for options in parts]
    rates = np.concatenate([one.rates for one in hulls])
    owners = np.repeat(np.arange(len(hulls)), [len(one.rates) for one in hulls])
    order = np.argsort(-rates, kind="stable")  # the best edge first; those of one group stay in their order
    steps = np.zeros((len(order) + 1, len(hulls)), np.int64)
    steps[np.arange(1, len(order) + 1), owners[order]] = 1
    vertices = steps.cumsum(axis=0)
    vertices = vertices[np.unique(np.linspace(0, len(vertices) - 1, POINTS).round().astype(int))]
    picks = [
        zip(one.numbers[at].tolist(), one.indices[at].tolist(), strict=True) for one, at in zip(hulls, vertices.T, strict=True)
    ]
    return Candidate(
        operator,
        tuple(site for options in parts for site in options[0].sites),
        ((),) * len(vertices),
        np.sum([one.parameters[at] for one, at in zip(hulls, vertices.T, strict=True)], axis=0),
        np.sum([one.damages[at] for one, at in zip(hulls, vertices.T, strict=True)], axis=0),
        parts=tuple(parts),
        partition=tuple(partition),
        picks=tuple(zip(*picks, strict=True)),
    )


@lru_cache(maxsize=1024)
def hull(options: tuple[Candidate, ...]) -> Hull:
    """The lower convex hull of all points of some candidates, from the fewest parameters to the least damage."""
    if len(options) > 1:
        each = [hull((one,)) for one in options]
        numbers = np.repeat(np.arange(len(each)), [len(one.indices) for one in each])
        indices, parameters, damages = (
            np.concatenate([getattr(one, field) for one in each]) for field in ("indices", "parameters", "damages")
        )
    else:
        (one,) = options
        numbers, indices = np.zeros(len(one.choices), np.int64), np.arange(len(one.choices))
        parameters, damages = one.parameters, one.damages
    order = np.lexsort((damages, parameters))
    least = np.minimum.accumulate(damages[order])
    order = order[np.concatenate([[True], least[1:] < least[:-1]])]
    kept: list[int] = []
    rates: list[float] = []
    for point, size, damage in zip(order.tolist(), parameters[order].tolist(), damages[order].tolist(), strict=True):
        while kept:
            rate = (damages[kept[-1]] - damage) / (size - parameters[kept[-1]])
            if not rates or rate < rates[-1]:
                rates.append(rate)
                break
            kept.pop()
            rates.pop()
        kept.append(point)
    return Hull(numbers[kept], indices[kept], parameters[kept], damages[kept])


def operators(tracks: Sequence[Track]) -> list[str]:
    """Names of all operators registered anywhere in the tracks, sorted; a composite has those of its groups."""
    candidates = (one for track in tracks for options in track.candidates.values() for one in options)
    return sorted({name for one in candidates for name in _operators(one)})


def restrict(tracks: Sequence[Track], operators: Set[str]) -> tuple[Track, ...]:
    """The same tracks with the candidates of these operators only; ``keep`` always stays.

    The groups of a composite choose among what is left, and a composite goes where one of them has nothing left.
    """
    allowed = {*operators, KEEP}
    restricted = []
    for track in tracks:
        candidates = {}
        for interval, several in track.candidates.items():
            if chosen := tuple(one for every in several if (one := _restricted(every, allowed)) is not None):
                candidates[interval] = chosen
        restricted.append(Track(track.name, track.length, candidates))
    return tuple(restricted)


def _operators(candidate: Candidate) -> set[str]:
    if not candidate.parts:
        return {candidate.operator}
    return {name for options in candidate.parts for one in options for name in _operators(one)}


def _restricted(candidate: Candidate, allowed: Set[str]) -> Candidate | None:
    if not candidate.parts:
        return candidate if candidate.operator in allowed else None
    parts = tuple(
        tuple(one for every in options if (one := _restricted(every, allowed)) is not None) for options in candidate.parts
    )
    if not all(parts):
        return None
    return candidate if parts == candidate.parts else compose(candidate.operator, candidate.partition, parts)
