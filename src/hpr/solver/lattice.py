"""The paths over a track: the cheapest one (semi-Markov Viterbi) and all of them in order of cost (lazy K-best).

The lattice has a node for each cut of the track, 0 to ``length``, and an arc [start, stop) for each interval with candidates. A
path from 0 to ``length`` covers every position once; with one candidate per arc it is a structure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hpr.errors import HprError
from hpr.solver.candidates import Table, Track

Structure = tuple[tuple[Table, int], ...]  # the candidates of a path: (table, number of the candidate in it)
Stream = Iterator[tuple[float, Structure]]  # (cost, structure), cheapest first


@dataclass(frozen=True, eq=False)
class Costs:
    """Least costs of a table's points, arcs and paths at one multiplier.

    Costs are complex because numpy orders complex numbers lexicographically: the real part is minimised, the imaginary part
    (parameters, or damage if only parameters count) breaks ties exactly, so that no epsilon has to be chosen.
    """

    table: Table
    points: np.ndarray  # (points,)
    arcs: np.ndarray  # (length + 1, length + 1): the cheapest candidate of [i, j), infinite if there is none
    paths: np.ndarray  # (length + 1,): the cheapest path over the first j positions


def least_costs(table: Table, damage_weight: float, parameter_weight: float) -> Costs:
    """Minimise ``damage_weight · damage + parameter_weight · parameters`` over the paths of a table.

    The semi-Markov (segmental) Viterbi recursion, Sarawagi & Cohen 2004. Raises ``HprError`` if no path covers the track.
    """
    tie_breaker = table.parameters if damage_weight else table.damages
    points = (damage_weight * table.damages + parameter_weight * table.parameters) + 1j * tie_breaker
    length = table.track.length
    arcs, paths = np.full((length + 1, length + 1), np.inf, dtype=complex), np.full(length + 1, np.inf, dtype=complex)
    if len(points):
        arcs[table.intervals[:, 0], table.intervals[:, 1]] = np.minimum.reduceat(points, table.interval_points[:-1])
    paths[0] = 0
    for stop in range(1, length + 1):
        paths[stop] = (paths[:stop] + arcs[:stop, stop]).min()
    if not np.isfinite(paths[-1]):
        raise uncovered(table.track, np.isfinite(paths))
    return Costs(table, points, arcs, paths)


def trace(costs: Costs) -> list[tuple[Table, int]]:
    """The points (table, number of the point) of a cheapest path, from the last to the first."""
    table, path, stop = costs.table, [], costs.table.track.length
    while stop > 0:
        start = int((costs.paths[:stop] + costs.arcs[:stop, stop]).argmin())
        interval = int(np.flatnonzero((table.intervals == (start, stop)).all(axis=1))[0])
        first, last = table.interval_points[interval : interval + 2]
        path.append((table, int(first + costs.points[first:last].argmin())))
        stop = start
    return path


def uncovered(track: Track, reached: np.ndarray) -> HprError:
    """The error for a track that no path covers; ``reached`` (length + 1,) says which cuts a path reaches."""
    position = int(np.flatnonzero(reached)[-1])
    return HprError(
        f"track {track.name!r}: no candidates cover position {position} after a full cover of those before it: add a keep"
    )


class _Lazy:
    """A stream that remembers what it gave, so that many readers share it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._seen: list[tuple[float, Structure]] = []

    def get(self, number: int) -> tuple[float, Structure] | None:
        while len(self._seen) <= number:
            item = next(self._stream, None)
            if item is None:
                return None
            self._seen.append(item)
        return self._seen[number]

    def __iter__(self) -> Stream:
        number = 0
        while (item := self.get(number)) is not None:
            yield item
            number += 1


def structures(tracks: Sequence[Costs]) -> Stream:
    """Structures of all tracks together, cheapest first: segmentation and operators, at the best ranks for these costs.

    Lazy K-best (Huang & Chiang 2005, algorithm 3): the exact least costs say when a path is worth opening at all.
    """
    return _all_of([_paths(costs) for costs in tracks])


def _paths(costs: Costs) -> _Lazy:
    """All paths over a track, cheapest first; the streams for its prefixes are shared."""
    prefixes = [_Lazy(iter([(0.0, ())]))]
    for stop in range(1, costs.table.track.length + 1):
        prefixes.append(_Lazy(_merge(_last_arcs(costs, prefixes, stop))))
    return prefixes[-1]


def _last_arcs(costs: Costs, prefixes: Sequence[_Lazy], stop: int) -> Iterator[tuple[float, Callable[[], Stream]]]:
    """(least cost, how to open the stream) of the paths over the first ``stop`` positions, by their last arc."""

    def open_stream(start: int) -> Stream:
        return _sums(prefixes[start], _Lazy(_candidates(costs, start, stop)))

    for start in range(stop):
        if np.isfinite(first := costs.paths[start] + costs.arcs[start, stop]):
            yield float(first.real), partial(open_stream, start)


def _candidates(costs: Costs, start: int, stop: int) -> Stream:
    """The candidates of one arc, cheapest first."""
    table = costs.table
    numbers = np.flatnonzero((table.intervals[table.intervals_of] == (start, stop)).all(axis=1))
    prices = [float(costs.points[table.first_points[n] : table.first_points[n + 1]].real.min()) for n in numbers]
    return iter(
        sorted(((price, ((table, int(n)),)) for price, n in zip(prices, numbers, strict=True)), key=lambda pair: pair[0])
    )


def _merge(sources: Iterator[tuple[float, Callable[[], Stream]]]) -> Stream:
    """The union of streams in order of cost; a stream stays closed until its least cost comes up."""
    heap: list = [(first, number, None, opener) for number, (first, opener) in enumerate(sources)]
    heapq.heapify(heap)
    while heap:
        _, number, item, opened = heapq.heappop(heap)
        stream = opened() if item is None else opened
        if item is not None:
            yield item
        if (following := next(stream, None)) is not None:
            heapq.heappush(heap, (following[0], number, following, stream))


def _sums(left: _Lazy, right: _Lazy) -> Stream:
    """All pairs in order of cost: each pair (l, r) is reached from (l, r - 1), or from (l - 1, 0) if r is 0."""
    heap: list = []

    def push(l_number: int, r_number: int) -> None:
        if (l_item := left.get(l_number)) is not None and (r_item := right.get(r_number)) is not None:
            heapq.heappush(heap, (l_item[0] + r_item[0], l_number, r_number, l_item[1] + r_item[1]))

    push(0, 0)
    while heap:
        cost, l_number, r_number, structure = heapq.heappop(heap)
        yield cost, structure
        push(l_number, r_number + 1)
        if r_number == 0:
            push(l_number + 1, 0)


def _all_of(parts: Sequence[_Lazy]) -> Stream:
    """One structure of every part, in order of total cost; by halves, so that the recursion stays shallow."""
    if len(parts) == 1:
        return iter(parts[0])
    half = len(parts) // 2
    return _sums(_Lazy(_all_of(parts[:half])), _Lazy(_all_of(parts[half:])))
