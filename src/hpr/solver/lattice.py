"""The semi-Markov recursion over a track in three semirings: least cost, K best, and log (a CRF over group boundaries).

All three walk the same lattice: an arc [start, stop) is one of the track's own candidates, or "every subtrack alone". Two
arcs of the second kind never follow one another, since one longer arc says the same: so every structure has exactly one path.
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
    """Least costs of a table at one multiplier. Matrices are (length + 1, length + 1), entry [i, j] is the interval [i, j).

    Costs are complex because numpy orders complex numbers lexicographically: the real part is what is minimised, the
    imaginary part (parameters, or damage where only parameters count) breaks ties exactly, with no epsilon to choose.
    """

    table: Table
    points: np.ndarray
    own: np.ndarray  # one arc, a candidate of this track
    alone: np.ndarray  # one arc, every subtrack alone
    after_own: np.ndarray  # any path whose last arc is not of the second kind
    best: np.ndarray  # any path
    subcosts: tuple[Costs, ...]


def least_costs(table: Table, damage_weight: float, parameter_weight: float, root: bool = True) -> Costs:
    """Minimise ``damage_weight · damage + parameter_weight · parameters`` over every interval; the root needs row 0 only.

    The semi-Markov (segmental) Viterbi recursion, Sarawagi & Cohen 2004. O(length²) numpy rows per table.
    """
    subcosts = tuple(least_costs(subtable, damage_weight, parameter_weight, root=False) for subtable in table.subtables)
    tie_breaker = table.parameters if damage_weight else table.damages
    points = (damage_weight * table.damages + parameter_weight * table.parameters) + 1j * tie_breaker
    length = table.track.length
    own, alone, after_own, best = np.full((4, length + 1, length + 1), np.inf, dtype=complex)
    if len(points):
        own[table.intervals[:, 0], table.intervals[:, 1]] = np.minimum.reduceat(points, table.interval_points[:-1])
    if subcosts:
        alone = np.sum([costs.best for costs in subcosts], axis=0)
    np.fill_diagonal(after_own, 0)
    np.fill_diagonal(best, 0)
    for stop in range(1, length + 1):
        rows = 1 if root else stop
        after_own[:rows, stop] = best[:rows, stop] = (best[:rows, :stop] + own[:stop, stop]).min(axis=1)
        if subcosts:
            others = (after_own[:rows, :stop] + alone[:stop, stop]).min(axis=1)
            best[:rows, stop] = np.minimum(best[:rows, stop], others)
    if root and not np.isfinite(best[0, -1]):
        raise _uncovered(table.track, np.isfinite(best[0]))
    return Costs(table, points, own, alone, after_own, best, subcosts)


def trace(costs: Costs, start: int, stop: int) -> list[tuple[Table, int]]:
    """The points (table, number of the point) of a cheapest path over [start, stop)."""
    table, found, may_be_alone = costs.table, [], True
    while stop > start:
        if may_be_alone and costs.best[start, stop] != costs.after_own[start, stop]:
            cut = int((costs.after_own[start, :stop] + costs.alone[:stop, stop]).argmin())
            found += [point for subcosts in costs.subcosts for point in trace(subcosts, cut, stop)]
            may_be_alone = False
        else:
            cut = int((costs.best[start, :stop] + costs.own[:stop, stop]).argmin())
            interval = int(np.flatnonzero((table.intervals == (cut, stop)).all(axis=1))[0])
            first, last = table.interval_points[interval : interval + 2]
            found.append((table, int(first + costs.points[first:last].argmin())))
            may_be_alone = True
        stop = cut
    return found


def _uncovered(track: Track, reached: np.ndarray) -> HprError:
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
    memory: dict[tuple[int, int, int, bool], _Lazy] = {}
    return _all_of([_paths(costs, 0, costs.table.track.length, memory) for costs in tracks])


def _paths(costs: Costs, start: int, stop: int, memory: dict, after_own: bool = False) -> _Lazy:
    """Paths over [start, stop); with ``after_own`` only those that an "alone" arc may follow."""
    key = (id(costs), start, stop, after_own)
    if key not in memory:
        memory[key] = _Lazy(iter([(0.0, ())]) if start == stop else _merge(_arcs(costs, start, stop, memory, after_own)))
    return memory[key]


def _arcs(costs: Costs, start: int, stop: int, memory: dict, after_own: bool) -> Iterator[tuple[float, Callable[[], Stream]]]:
    """(least cost, how to open the stream) for every last arc [cut, stop)."""

    def own(cut: int) -> Stream:
        return _sums(_paths(costs, start, cut, memory), _Lazy(_candidates(costs, cut, stop)))

    def alone(cut: int) -> Stream:
        parts = _all_of([_paths(subcosts, cut, stop, memory) for subcosts in costs.subcosts])
        return _sums(_paths(costs, start, cut, memory, after_own=True), _Lazy(parts))

    for cut in range(start, stop):
        if np.isfinite(first := costs.best[start, cut] + costs.own[cut, stop]):
            yield float(first.real), partial(own, cut)
        if not after_own and np.isfinite(first := costs.after_own[start, cut] + costs.alone[cut, stop]):
            yield float(first.real), partial(alone, cut)


def _candidates(costs: Costs, start: int, stop: int) -> Stream:
    table = costs.table
    numbers = np.flatnonzero((table.intervals[table.intervals_of] == (start, stop)).all(axis=1))
    prices = [float(costs.points[table.first_points[n] : table.first_points[n + 1]].real.min()) for n in numbers]
    return iter(sorted(((price, ((table, int(n)),)) for price, n in zip(prices, numbers, strict=True)), key=lambda one: one[0]))


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
    """All pairs in order of cost: each pair (l, r) is reached from (l, r - 1), or from (l - 1, 0) where r is 0."""
    heap: list = []

    def push(one: int, two: int) -> None:
        if (a := left.get(one)) is not None and (b := right.get(two)) is not None:
            heapq.heappush(heap, (a[0] + b[0], one, two, a[1] + b[1]))

    push(0, 0)
    while heap:
        cost, one, two, structure = heapq.heappop(heap)
        yield cost, structure
        push(one, two + 1)
        if two == 0:
            push(one + 1, 0)


def _all_of(parts: Sequence[_Lazy]) -> Stream:
    """One structure of every part, in order of total cost; by halves, so that the recursion stays shallow."""
    if len(parts) == 1:
        return iter(parts[0])
    half = len(parts) // 2
    return _sums(_Lazy(_all_of(parts[:half])), _Lazy(_all_of(parts[half:])))
