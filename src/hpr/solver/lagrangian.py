"""Minimise total damage within a limit on parameters, over segmentations, operators and ranks together.

Lagrangian allocation (Everett 1963; Shoham & Gersho 1988): for a multiplier λ the least damage + λ · parameters can be found
exactly, track by track. The right λ meets the budget up to a gap, and greedy moves then close as much of it as they can.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from hpr.errors import BudgetError, HprError
from hpr.solver.candidates import Choice, Solution, Table, Track, impossible, solution, tabulate
from hpr.solver.composite import operators, restrict
from hpr.solver.lattice import Structure, least_costs, structures, trace

BREADTH = 24  # structures that each search allocates: more of them close the gap further, each costs some milliseconds
_NEIGHBOURS = (0.8, 1.25)  # other multipliers whose structures are tried, relative to the best one
_STEPS = 200  # the most steps of the search for λ; it mostly converges after 10 to 30
_ROUNDING = 1e-12
Points = list[tuple[Table, int]]  # one point of one table for every group
Searching = Callable[[Sequence[Track], int, int], list["Solution"]]  # ``search``, or a search with a further limit
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Allocation:
    points: Points
    damage: float
    parameters: int


@dataclass(frozen=True)
class _Bracket:
    """The solutions just below and just above the limit, the multiplier between them, and its lower bound (nats)."""

    below: _Allocation
    above: _Allocation
    multiplier: float
    bound: float


def smallest(track: Track) -> int:
    """The fewest parameters of any solution of this track."""
    return _cheapest([tabulate(track)], 0.0, 1.0).parameters


def solve(tracks: Sequence[Track], limit: int) -> Solution:
    """The solution of least damage found within ``limit`` parameters, with a lower bound on the damage of any solution.

    Raises ``BudgetError`` for a limit below the smallest possible total, which it names, and ``HprError`` for no tracks and
    for a track that its candidates do not cover.

    >>> from hpr.solver.candidates import Candidate, Track
    >>> keep = Candidate("keep", ("a.0",), ((),), [100], [0.0])
    >>> low_rank = Candidate("low rank", ("a.0",), ((1,), (2,)), [20, 40], [0.5, 0.1])
    >>> best = solve([Track("a", 1, {(0, 1): (keep, low_rank)})], limit=50)
    >>> best.choices[0].ranks, best.damage, best.parameters
    ((2,), 0.1, 40)
    """
    return search(tracks, limit, BREADTH)[0]


def k_best(tracks: Sequence[Track], limit: int, k: int, searching: Searching | None = None) -> list[Solution]:
    """Up to ``k`` solutions of different structure within ``limit`` parameters, by damage, to be compared end to end.

    K-best Viterbi at the final multiplier and its neighbours gives structures (segmentation and operators). Each is then
    allocated: its ranks are chosen for the limit. Up to k = ``BREADTH`` the first solution is the one of ``solve``; a larger k
    searches more structures, so its first can only be better. Raises as ``solve``, and ``HprError`` for k below 1.
    """
    if k < 1:
        raise HprError(f"k is {k}: ask for at least one solution")
    return (searching or search)(tracks, limit, max(k, BREADTH))[:k]


def plan_candidates(tracks: Sequence[Track], limit: int, searching: Searching | None = None) -> list[Solution]:
    """Solutions with all operators (label ``"all"``), and with each operator and ``keep`` (labelled by its name), by damage.

    So the first is never worse than the solution of any single operator. An operator that cannot meet the limit is left out.
    ``searching``: the search to use in place of ``search``. Raises as ``solve``.
    """
    searching = searching or search
    whole = replace(searching(tracks, limit, BREADTH)[0], label="all")
    solutions = [whole]
    for name in operators(tracks):
        try:
            single = searching(restrict(tracks, {name}), limit, BREADTH)[0]
        except BudgetError:
            _log.debug("%s cannot meet a limit of %d parameters by itself", name, limit)
            continue
        # the bound of the whole problem holds for every part of it
        solutions.append(replace(single, label=name, multiplier=whole.multiplier, bound=min(whole.bound, single.damage)))
    return sorted(solutions, key=lambda each: each.damage)


def search(tracks: Sequence[Track], limit: int, breadth: int) -> list[Solution]:
    """Solutions of distinct structure, each allocated to the limit, by damage. ``breadth``: how many structures are tried."""
    tables = _tabulate(tracks)
    bracket = _bracket(lambda *weights: _cheapest(tables, *weights), limit)
    starts = [_adjust(side.points, limit, swap=True) for side in (bracket.below, bracket.above)]
    allocations = [start for start in starts if start is not None]
    sides = (*allocations, bracket.below, bracket.above)
    tried = {frozenset(structure): structure for structure in (_structure(side.points) for side in sides)}
    for factor in (1.0, *_NEIGHBOURS):
        costs = [least_costs(table, 1.0, factor * bracket.multiplier) for table in tables]
        count = breadth if factor == 1.0 else breadth // 2
        tried |= {frozenset(structure): structure for _, structure in islice(structures(costs), count)}
    allocated = (_allocate(structure, limit) for structure in tried.values())
    allocations += [allocation for allocation in allocated if allocation is not None]
    best: dict[tuple, Solution] = {}
    for allocation in allocations:
        answer = solution(_choices(allocation.points))
        answer = replace(answer, multiplier=bracket.multiplier, bound=min(bracket.bound, answer.damage))
        previous = best.setdefault(answer.structure, answer)
        if (answer.damage, answer.parameters) < (previous.damage, previous.parameters):
            best[answer.structure] = answer
    return sorted(best.values(), key=lambda answer: (answer.damage, answer.parameters))


def _bracket(cheapest: Callable[[float, float], _Allocation], limit: int) -> _Bracket:
    """The best multiplier for a limit; ``cheapest(damage_weight, parameter_weight)`` minimises the weighted sum exactly.

    Each step tries the slope between the two sides instead of halving an interval of λ. The dual function is piecewise
    linear, so the search ends exactly at its maximum, for any scale of damages and parameters.
    """
    above = cheapest(1.0, 0.0)
    if above.parameters <= limit:
        return _Bracket(above, above, 0.0, above.damage)
    below = cheapest(0.0, 1.0)
    if below.parameters > limit:
        raise impossible(limit, below.parameters)
    multiplier = bound = 0.0
    for _ in range(_STEPS):
        slope = (below.damage - above.damage) / (above.parameters - below.parameters)
        middle = cheapest(1.0, slope)
        dual = middle.damage + slope * (middle.parameters - limit)
        if dual >= bound:
            multiplier, bound = slope, dual
        chord = below.damage + slope * (below.parameters - limit)
        if middle.parameters > limit:
            above = middle
        else:
            below = middle
        if dual >= chord - _ROUNDING * (abs(chord) + slope * limit):
            break
    return _Bracket(below, above, multiplier, bound)


def _cheapest(tables: Sequence[Table], damage_weight: float, parameter_weight: float) -> _Allocation:
    points: Points = []
    for table in tables:
        points += trace(least_costs(table, damage_weight, parameter_weight))
    return _allocation(points)


def _allocate(structure: Structure, limit: int) -> _Allocation | None:
    """The best ranks of a fixed structure within a limit; None if no ranks meet it."""
    sizes = np.array([len(table.candidates[number].choices) for table, number in structure])
    firsts = np.array([table.first_points[number] for table, number in structure])
    columns = np.arange(sizes.max())
    # shorter curves are padded with their last point; argmin takes the first of equal points, so never a padded one
    offsets = np.minimum(columns, sizes[:, None] - 1)
    damages = np.stack([table.candidates[n].damages[row] for (table, n), row in zip(structure, offsets, strict=True)])
    parameters = np.stack([table.candidates[n].parameters[row] for (table, n), row in zip(structure, offsets, strict=True)])

    def cheapest(damage_weight: float, parameter_weight: float) -> _Allocation:
        ties = parameters if damage_weight else damages
        best = ((damage_weight * damages + parameter_weight * parameters) + 1j * ties).argmin(axis=1)
        return _allocation([(table, int(p)) for (table, _), p in zip(structure, firsts + best, strict=True)])

    if parameters.min(axis=1).sum() > limit:
        return None
    bracket = _bracket(cheapest, limit)
    sides = [_adjust(side.points, limit, swap=False) for side in (bracket.below, bracket.above)]
    return min((side for side in sides if side is not None), key=lambda side: side.damage)


def _adjust(points: Points, limit: int, swap: bool) -> _Allocation | None:
    """Change the points of single groups: to fewer parameters until within the limit, then to less damage while that fits.

    A group may take any point of its candidate's curve, on the hull or not; with ``swap`` it may take any candidate of its
    interval. None if no such change meets the limit.
    """
    pools = [_pool(table, point, swap) for table, point in points]
    ends = np.cumsum([pool.stop - pool.start for pool in pools])
    owner = np.repeat(np.arange(len(points)), np.diff(ends, prepend=0))
    numbers = np.concatenate([np.arange(pool.start, pool.stop) for pool in pools])
    damages = np.concatenate([table.damages[pool] for (table, _), pool in zip(points, pools, strict=True)])
    parameters = np.concatenate([table.parameters[pool] for (table, _), pool in zip(points, pools, strict=True)])
    now = np.array([end - pool.stop + point for end, pool, (_, point) in zip(ends, pools, points, strict=True)])
    while (slack := limit - int(parameters[now].sum())) < 0:
        saved = parameters[now][owner] - parameters
        lost = damages - damages[now][owner]
        # a saving counts only up to what is needed
        rates = np.where(saved > 0, lost / np.clip(saved, 1, -slack), np.inf)
        move = int(rates.argmin())
        if rates[move] == np.inf:
            return None
        now[owner[move]] = move
    while True:
        gained = damages[now][owner] - damages
        extra = parameters - parameters[now][owner]
        # changes that cost no parameters come first
        rates = np.where((gained > 0) & (extra <= slack), gained / np.maximum(extra, 1e-9), 0.0)
        move = int(rates.argmax())
        if rates[move] <= 0:
            return _allocation([(table, int(numbers[position])) for (table, _), position in zip(points, now, strict=True)])
        slack -= int(extra[move])
        now[owner[move]] = move


def _tabulate(tracks: Sequence[Track]) -> list[Table]:
    if not tracks:
        raise HprError("no tracks to solve: give at least one")
    return [tabulate(track) for track in tracks]


def _pool(table: Table, point: int, swap: bool) -> slice:
    """The points of a point's candidate, or with ``swap`` of its interval."""
    owner = table.owners[point]
    bounds, number = (table.interval_points, table.intervals_of[owner]) if swap else (table.first_points, owner)
    return slice(int(bounds[number]), int(bounds[number + 1]))


def _allocation(points: Points) -> _Allocation:
    damage = math.fsum(float(table.damages[point]) for table, point in points)
    return _Allocation(points, damage, sum(int(table.parameters[point]) for table, point in points))


def _structure(points: Points) -> Structure:
    return tuple((table, int(table.owners[point])) for table, point in points)


def _choices(points: Points) -> list[Choice]:
    """The choices that the points stand for."""
    owned = ((table, int(table.owners[point]), point) for table, point in points)
    return [Choice(table.candidates[owner], int(point - table.first_points[owner])) for table, owner, point in owned]
