"""Find the cheapest path over a track (semi-Markov Viterbi), or list all paths in order of cost (lazy K-best).

The lattice of a track has the nodes 0 to ``length``, one before, between and after the positions, and an arc [start, stop) for
each interval that has candidates. A path from 0 to ``length`` covers every position once. A *structure* is a path together with
one candidate for each of its arcs.
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
    """The least costs of the points, arcs and paths of a table for one Lagrange multiplier.

    A cost is a complex number. Its real part is the cost to minimise; its imaginary part is a tie-breaker. The tie-breaker is
    the number of parameters, or the damage if the real part counts parameters only. Numpy compares the real parts of complex
    numbers first and the imaginary parts only if the real parts are equal: np.min([2+9j, 2+5j, 3+0j]) is 2+5j. Of two solutions
    with equal cost the search therefore returns the one with the smaller tie-breaker, and no tolerance has to be chosen.
    """

    table: Table
    points: np.ndarray  # (points,)
    arcs: np.ndarray  # (length + 1, length + 1): the least cost of [i, j), infinite without candidates
    paths: np.ndarray  # (length + 1,): the least cost of a path over the first j positions


def least_costs(table: Table, damage_weight: float, parameter_weight: float) -> Costs:
    """The least costs damage_weight · damage + parameter_weight · parameters over all paths of a table.

    The recursion is the semi-Markov (segmental) Viterbi algorithm (Sarawagi & Cohen 2004). Raises ``HprError`` if no path
    covers the track.
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
    """The points of a cheapest path as (table, number of the point), from the last arc to the first."""
    table, path, stop = costs.table, [], costs.table.track.length
    while stop > 0:
        start = int((costs.paths[:stop] + costs.arcs[:stop, stop]).argmin())
        interval = int(np.flatnonzero((table.intervals == (start, stop)).all(axis=1))[0])
        first, last = table.interval_points[interval : interval + 2]
        path.append((table, int(first + costs.points[first:last].argmin())))
        stop = start
    return path


def uncovered(track: Track, reached: np.ndarray) -> HprError:
    """The error for a track that no path covers. ``reached`` (length + 1,): whether a path from node 0 reaches each node."""
    position = int(np.flatnonzero(reached)[-1])
    return HprError(
        f"track {track.name!r}: no candidates cover position {position} after a full cover of those before it: add a keep"
    )


class _Lazy:
    """A stream that stores the items it has produced, so that several readers can share it."""

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
    """Yield the structures of all tracks together as (cost, structure), cheapest first.

    A structure fixes the intervals and their candidates. Its cost is that of the best ranks for these costs. The algorithm is
    lazy K-best (Huang & Chiang 2005, algorithm 3): it opens the stream of an arc only when the least cost of that arc is next.
    """
    return _all_of([_paths(costs) for costs in tracks])


def _paths(costs: Costs) -> _Lazy:
    """All structures of a track, cheapest first. Longer prefixes of the track read the streams of shorter ones."""
    prefixes = [_Lazy(iter([(0.0, ())]))]
    for stop in range(1, costs.table.track.length + 1):
        prefixes.append(_Lazy(_merge(_last_arcs(costs, prefixes, stop))))
    return prefixes[-1]


def _last_arcs(costs: Costs, prefixes: Sequence[_Lazy], stop: int) -> Iterator[tuple[float, Callable[[], Stream]]]:
    """For each last arc of the paths over the first ``stop`` positions: its least cost and a function that opens its stream."""

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
    """Merge streams in order of cost. A stream is opened only when its least cost is the next to yield."""
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
    """All pairs (item of ``left``, item of ``right``) in order of total cost.

    Pair (l, r) enters the heap after (l, r - 1), or after (l - 1, 0) if r is 0. Each pair thus enters once.
    """
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
    """Combine one structure of every part, in order of total cost. Halving the parts limits the recursion depth."""
    if len(parts) == 1:
        return iter(parts[0])
    half = len(parts) // 2
    return _sums(_Lazy(_all_of(parts[:half])), _Lazy(_all_of(parts[half:])))
