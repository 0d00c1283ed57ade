"""The semi-Markov recursion over a track in three semirings: least cost, K best, and log (a CRF over group boundaries).

All three walk the same lattice: an arc [start, stop) is one of the track's own candidates, or "every subtrack alone". Two
arcs of the second kind never follow one another, since one longer arc says the same: so every structure has exactly one path.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hpr.errors import HprError
from hpr.planning.candidates import Table, Track, tabulate

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


# --- K best ---------------------------------------------------------------------------------------------------------------


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


# --- log: the CRF ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Boundaries:
    """How sure a segmentation is. ``probabilities[i - 1]`` is that of a group boundary before position i = 1 … length - 1.

    ``entropy`` (nats) is that of the distribution over structures: segmentation and operators, the subtracks' included.
    ``subtracks`` holds the probabilities of every subtrack by name; a cut of the parent cuts its subtracks too.
    """

    probabilities: np.ndarray
    entropy: float
    subtracks: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Logs:
    """Log partition functions of every interval; matrices as in ``Costs``, ``before_own`` its mirror image in time."""

    table: Table
    own: np.ndarray
    inner: dict[tuple[int, int], np.ndarray]  # interval → probability of each cut inside it, where a composite may fill it
    alone: np.ndarray
    after_own: np.ndarray
    after_alone: np.ndarray
    before_own: np.ndarray
    any: np.ndarray
    entropy: np.ndarray  # of any path, nats
    sublogs: tuple[_Logs, ...]


def boundaries(track: Track, multiplier: float, temperature: float) -> Boundaries:
    """Boundary probabilities and entropy of the semi-Markov CRF (Sarawagi & Cohen 2004) that belongs to a multiplier.

    A structure weighs exp(-cost / temperature), its cost the sum over groups of the least damage + multiplier · parameters
    among the ranks. ``multiplier`` is in nats per parameter, ``temperature`` in nats: the spread of measured around predicted
    damage. Raises ``HprError`` for a temperature that is not positive and for a track that cannot be covered.
    """
    if not (temperature > 0 and np.isfinite(temperature) and multiplier >= 0 and np.isfinite(multiplier)):
        raise HprError(f"temperature {temperature} must be above 0, multiplier {multiplier} from 0 up, and both finite")
    logs = _inside(tabulate(track), multiplier, temperature)
    if not np.isfinite(logs.any[0, -1]):
        raise _uncovered(track, np.isfinite(logs.any[0]))
    weight = np.zeros_like(logs.any)
    weight[0, -1] = 1.0
    found: dict[str, np.ndarray] = {}
    _outside(logs, weight, np.zeros(track.length + 1), found)
    probabilities = found.pop(track.name)
    return Boundaries(probabilities, float(logs.entropy[0, -1]), found)


def _inside(table: Table, multiplier: float, temperature: float) -> _Logs:
    sublogs = tuple(_inside(subtable, multiplier, temperature) for subtable in table.subtables)
    length = table.track.length
    shape = (length + 1, length + 1)
    own, alone, after_own, after_alone, before_own, any_ = np.full((6, *shape), -np.inf)
    own_h, alone_h, after_own_h, entropy = np.zeros((4, *shape))
    inner = {}
    if table.candidates:
        prices = np.minimum.reduceat(table.damages + multiplier * table.parameters, table.first_points[:-1])
        for number, (start, stop) in enumerate(table.intervals):
            logits = -prices[table.intervals_of == number] / temperature
            own[start, stop], own_h[start, stop] = _mix(logits, np.zeros_like(logits))
            several = table.track.candidates[start, stop]
            if any(one.partition for one in several):
                cuts = [np.diff(one.partition or [0] * (stop - start)) != 0 for one in several]
                inner[start, stop] = np.exp(logits - own[start, stop]) @ np.array(cuts)
    if sublogs:
        alone = np.sum([logs.any for logs in sublogs], axis=0)
        alone_h = np.sum([logs.entropy for logs in sublogs], axis=0)
    for matrix in (after_own, before_own, any_):
        np.fill_diagonal(matrix, 0.0)
    for stop in range(1, length + 1):
        rows = (slice(stop), slice(stop))  # (start, last cut), mixed over the last cut
        after_own[:stop, stop], after_own_h[:stop, stop] = _mix(
            any_[rows] + own[:stop, stop], entropy[rows] + own_h[:stop, stop]
        )
        after_alone[:stop, stop], last_h = _mix(after_own[rows] + alone[:stop, stop], after_own_h[rows] + alone_h[:stop, stop])
        any_[:stop, stop], entropy[:stop, stop] = _mix(
            np.stack([after_own[:stop, stop], after_alone[:stop, stop]], -1), np.stack([after_own_h[:stop, stop], last_h], -1)
        )
    for start in range(length):
        before_own[start, start + 1 :] = np.logaddexp.reduce(own[start, :, None] + any_[:, start + 1 :], axis=0)
    return _Logs(table, own, inner, alone, after_own, after_alone, before_own, any_, entropy, sublogs)


def _mix(logs: np.ndarray, entropies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the sum of exp(logs) over the last axis, and the entropy of the mixture of parts with these entropies."""
    total = np.logaddexp.reduce(logs, axis=-1)
    possible = np.isfinite(logs)
    surprise = np.where(possible, np.where(np.isfinite(total), total, 0.0)[..., None] - np.where(possible, logs, 0.0), 0.0)
    return total, (np.where(possible, np.exp(-surprise), 0.0) * (entropies + surprise)).sum(axis=-1)


def _outside(logs: _Logs, weight: np.ndarray, cuts: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Boundary probabilities where this track is solved on exactly [i, j) with probability ``weight[i, j]``.

    ``cuts`` (length + 1,) are the probabilities of boundaries that the parent alone accounts for.
    """
    cuts, below = cuts.copy(), np.zeros_like(weight)
    for start, stop in np.argwhere(weight > 0):
        inner = slice(start, stop + 1)
        share, total = weight[start, stop], logs.any[start, stop]
        left_own, left_alone = logs.after_own[start, inner], logs.after_alone[start, inner]
        right_any, right_own = logs.any[inner, stop], logs.before_own[inner, stop]
        here = np.logaddexp(left_own + right_any, left_alone + right_own)
        cuts[start + 1 : stop] += share * np.exp(here - total)[1:-1]
        for (first, last), chances in logs.inner.items():
            if start <= first and last <= stop:
                filled = logs.any[start, first] + logs.own[first, last] + logs.any[last, stop]
                cuts[first + 1 : last] += share * np.exp(filled - total) * chances
        below[inner, inner] += share * np.exp(left_own[:, None] + logs.alone[inner, inner] + right_own - total)
    found[logs.table.track.name] = cuts[1:-1]
    for sublogs in logs.sublogs:
        _outside(sublogs, below, cuts, found)
