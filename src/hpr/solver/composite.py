"""Composites: candidates that divide an interval into groups of positions that need not be adjacent.

A cycle or a matching groups layers that are not neighbours, which no segmentation of a track can do. Each group chooses its
operator and rank by itself, so the curve of a composite is the sum of its groups' curves along one Lagrange multiplier
(Shoham & Gersho 1988). It is exact at every vertex of the lower convex hull.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hpr.plans.terms import KEEP
from hpr.solver.candidates import Candidate, Track

POINTS = 256  # the most points of a composite's curve


class Hull(NamedTuple):
    """Vertices of the lower convex hull of the points of some candidates, in order of parameters; damages fall."""

    numbers: np.ndarray  # number of the vertex's candidate
    indices: np.ndarray  # number of the vertex among that candidate's points
    parameters: np.ndarray
    damages: np.ndarray

    def damage_at(self, parameters: float) -> float:
        """Damage (nats), interpolated between vertices; constant beyond the ends."""
        return float(np.interp(parameters, self.parameters, self.damages))

    @property
    def rates(self) -> np.ndarray:
        """Nats gained per parameter on each edge, strictly falling: (vertices - 1,)."""
        return -np.diff(self.damages) / np.diff(self.parameters)


def compose(operator: str, partition: Sequence[int], parts: Sequence[tuple[Candidate, ...]]) -> Candidate:
    """A composite candidate for an interval of ``len(partition)`` positions (see ``Candidate``).

    ``operator``: the name of the grouping. ``partition``: the group of each position, from 0. ``parts[g]``: the candidates for
    group g, which may be composites. The curve has the vertices of the lower convex hull, thinned evenly to at most ``POINTS``.

    >>> tie = Candidate("tie", ("s.0", "s.2"), ((),), [100], [0.3])
    >>> low_rank = Candidate("low rank", ("s.1",), ((2,), (4,)), [20, 40], [0.2, 0.1])
    >>> cycle = compose("cycle", (0, 1, 0), ((tie,), (low_rank,)))
    >>> cycle.parameters.tolist(), cycle.damages.tolist()
    ([120, 140], [0.5, 0.4])
    >>> cycle.picks
    (((0, 0), (0, 0)), ((0, 0), (0, 1)))
    """
    hulls = [hull(options) for options in parts]
    rates = np.concatenate([group.rates for group in hulls])
    owners = np.repeat(np.arange(len(hulls)), [len(group.rates) for group in hulls])
    order = np.argsort(-rates, kind="stable")  # the best edge first; the edges of a group are in this order already
    steps = np.zeros((len(order) + 1, len(hulls)), np.int64)
    steps[np.arange(1, len(order) + 1), owners[order]] = 1
    vertices = steps.cumsum(axis=0)
    vertices = vertices[np.unique(np.linspace(0, len(vertices) - 1, POINTS).round().astype(int))]
    chosen = list(zip(hulls, vertices.T, strict=True))  # (hull, number of its vertex at each point) of each group
    picks = [zip(group.numbers[at].tolist(), group.indices[at].tolist(), strict=True) for group, at in chosen]
    return Candidate(
        operator,
        tuple(site for options in parts for site in options[0].sites),
        ((),) * len(vertices),
        np.sum([group.parameters[at] for group, at in chosen], axis=0),
        np.sum([group.damages[at] for group, at in chosen], axis=0),
        parts=tuple(parts),
        partition=tuple(partition),
        picks=tuple(zip(*picks, strict=True)),
    )


@lru_cache(maxsize=1024)
def hull(options: tuple[Candidate, ...]) -> Hull:
    """The lower convex hull of all points of some candidates, from the fewest parameters to the least damage."""
    if len(options) > 1:
        hulls = [hull((candidate,)) for candidate in options]
        numbers = np.repeat(np.arange(len(hulls)), [len(each.indices) for each in hulls])
        indices, parameters, damages = (
            np.concatenate([getattr(each, field) for each in hulls]) for field in ("indices", "parameters", "damages")
        )
    else:
        (candidate,) = options
        numbers, indices = np.zeros(len(candidate.choices), np.int64), np.arange(len(candidate.choices))
        parameters, damages = candidate.parameters, candidate.damages
    order = np.lexsort((damages, parameters))
    least = np.minimum.accumulate(damages[order])
    order = order[np.concatenate([[True], least[1:] < least[:-1]])]
    vertices: list[int] = []
    rates: list[float] = []  # of the edge to each vertex but the first
    for point, size, damage in zip(order.tolist(), parameters[order].tolist(), damages[order].tolist(), strict=True):
        while vertices:
            rate = (damages[vertices[-1]] - damage) / (size - parameters[vertices[-1]])
            if not rates or rate < rates[-1]:
                rates.append(rate)
                break
            vertices.pop()
            rates.pop()
        vertices.append(point)
    return Hull(numbers[vertices], indices[vertices], parameters[vertices], damages[vertices])


def operators(tracks: Sequence[Track]) -> list[str]:
    """Names of all operators in the tracks, sorted; a composite has those of its groups."""
    candidates = (candidate for track in tracks for options in track.candidates.values() for candidate in options)
    return sorted({name for candidate in candidates for name in _operators(candidate)})


def restrict(tracks: Sequence[Track], operators: Set[str]) -> tuple[Track, ...]:
    """The same tracks with only the candidates of these operators and of ``keep``.

    The groups of a composite choose among their remaining candidates; a composite is left out if a group has none.
    """
    allowed = {*operators, KEEP}
    restricted = []
    for track in tracks:
        candidates = {}
        for interval, options in track.candidates.items():
            if remaining := _remaining(options, allowed):
                candidates[interval] = remaining
        restricted.append(Track(track.name, track.length, candidates))
    return tuple(restricted)


def mapped(tracks: Sequence[Track], change: Callable[[Candidate], Candidate]) -> tuple[Track, ...]:
    """The same tracks with every plain candidate changed, each once; composites are composed of the changed ones."""
    done: dict[int, Candidate] = {}

    def changed(candidate: Candidate) -> Candidate:
        if id(candidate) not in done:
            parts = tuple(tuple(changed(option) for option in options) for options in candidate.parts)
            done[id(candidate)] = compose(candidate.operator, candidate.partition, parts) if parts else change(candidate)
        return done[id(candidate)]

    return tuple(
        Track(
            track.name,
            track.length,
            {interval: tuple(changed(option) for option in options) for interval, options in track.candidates.items()},
        )
        for track in tracks
    )


def _operators(candidate: Candidate) -> set[str]:
    if not candidate.parts:
        return {candidate.operator}
    return {name for options in candidate.parts for option in options for name in _operators(option)}


def _remaining(options: Sequence[Candidate], allowed: Set[str]) -> tuple[Candidate, ...]:
    restricted = (_restricted(option, allowed) for option in options)
    return tuple(option for option in restricted if option is not None)


def _restricted(candidate: Candidate, allowed: Set[str]) -> Candidate | None:
    if not candidate.parts:
        return candidate if candidate.operator in allowed else None
    parts = tuple(_remaining(options, allowed) for options in candidate.parts)
    if not all(parts):
        return None
    return candidate if parts == candidate.parts else compose(candidate.operator, candidate.partition, parts)
