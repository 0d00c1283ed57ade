"""Minimise total damage within a limit on parameters, over segmentations, operators and ranks at once.

Lagrangian allocation (Everett 1963; Shoham & Gersho 1988): for a multiplier λ the least damage + λ · parameters is exact and
easy, track by track; the right λ meets the budget but for a gap, which greedy moves then close as far as they can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from hpr.errors import HprError
from hpr.solver.candidates import Choice, Solution, Table, Track, impossible, solution, tabulate
from hpr.solver.composite import operators, restrict
from hpr.solver.lattice import Structure, least_costs, structures, trace

BREADTH = 24  # structures that every search re-allocates: more close the gap further, each costs some milliseconds
_NEIGHBOURS = (0.8, 1.25)  # multipliers, relative to the best one, whose structures are tried too
_STEPS = 200  # of the search for λ; it ends by itself, mostly after 10 to 30
_ROUNDING = 1e-12
Points = list[tuple[Table, int]]  # one point of one table for every group


@dataclass(frozen=True)
class _Allocation:
    points: Points
    damage: float
    parameters: int


@dataclass(frozen=True)
class _Bracket:
    """The two solutions on either side of the limit, the multiplier between them and the bound it proves (nats)."""

    below: _Allocation
    above: _Allocation
    multiplier: float
    bound: float


def smallest(track: Track) -> int:
    """The fewest parameters that any solution of this track has."""
    return _cheapest([tabulate(track)], 0.0, 1.0).parameters


def solve(tracks: Sequence[Track], limit: int) -> Solution:
    """The least damage within ``limit`` parameters, with a bound on how much better any solution could be.

    Raises ``HprError`` for a limit below the smallest possible total, naming that, and for tracks that cannot be covered.
    """
    return _search(tracks, limit, BREADTH)[0]


def k_best(tracks: Sequence[Track], limit: int, k: int) -> list[Solution]:
    """Up to ``k`` solutions of distinct structure within ``limit`` parameters, by damage. For re-scoring end to end.

    K-best Viterbi at the final multiplier and its neighbours gives structures (segmentation and operators); each is then
    allocated to the limit by itself. Up to ``BREADTH`` of them the first is ``solve``'s answer; a larger k looks further,
    so that its first can only be better.
    """
    if k < 1:
        raise HprError(f"k is {k}: ask for at least 1 solution")
    return _search(tracks, limit, max(k, BREADTH))[:k]


def plan_candidates(tracks: Sequence[Track], limit: int) -> list[Solution]:
    """Solutions with all operators (label ``"all"``) and with each one alone beside ``keep`` (its name), by damage.

    The first is thus never worse than any single-operator plan. Operators that cannot meet the limit alone are left out.
    """
    whole = replace(solve(tracks, limit), label="all")
    found = [whole]
    for name in operators(tracks):
        try:
            alone = solve(restrict(tracks, {name}), limit)
        except HprError:
            continue
        # what bounds the whole problem bounds its parts; each part's own bound says little about the whole
        found.append(replace(alone, label=name, multiplier=whole.multiplier, bound=min(whole.bound, alone.damage)))
    return sorted(found, key=lambda one: one.damage)


def _search(tracks: Sequence[Track], limit: int, breadth: int) -> list[Solution]:
    """Distinct structures, each allocated to the limit, by damage."""
    roots = _tabulate(tracks)
    bracket = _bracket(lambda *weights: _cheapest(roots, *weights), limit)
    starts = [_adjust(side.points, limit, swap=True) for side in (bracket.below, bracket.above)]
    found = [one for one in starts if one is not None]
    tried = {frozenset(one): one for one in (_structure(side.points) for side in (*found, bracket.below, bracket.above))}
    for factor in (1.0, *_NEIGHBOURS):
        costs = [least_costs(root, 1.0, factor * bracket.multiplier) for root in roots]
        count = breadth if factor == 1.0 else breadth // 2
        tried |= {frozenset(one): one for _, one in islice(structures(costs), count)}
    found += [one for structure in tried.values() if (one := _allocate(structure, limit)) is not None]
    best: dict[tuple, Solution] = {}
    for allocation in found:
        answer = solution(_choices(allocation.points))
        answer = replace(answer, multiplier=bracket.multiplier, bound=min(bracket.bound, answer.damage))
        known = best.setdefault(answer.structure, answer)
        if (answer.damage, answer.parameters) < (known.damage, known.parameters):
            best[answer.structure] = answer
    return sorted(best.values(), key=lambda answer: (answer.damage, answer.parameters))


def _bracket(cheapest: Callable[[float, float], _Allocation], limit: int) -> _Bracket:
    """The best multiplier for a limit, from a function of (damage weight, parameter weight) that minimises exactly.

    Instead of halving an interval of λ, each step tries the slope between the two sides: the dual function is piecewise
    linear, so this ends at its very maximum, whatever the scale of damages and parameters.
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


def _cheapest(roots: Sequence[Table], damage_weight: float, parameter_weight: float) -> _Allocation:
    points: Points = []
    for root in roots:
        points += trace(least_costs(root, damage_weight, parameter_weight))
    return _allocation(points)


def _allocate(structure: Structure, limit: int) -> _Allocation | None:
    """The ranks of a fixed structure under a limit; None where it cannot be met."""
    sizes = np.array([len(table.candidates[number].choices) for table, number in structure])
    firsts = np.array([table.first_points[number] for table, number in structure])
    columns = np.arange(sizes.max())
    # curves of unequal length, padded with their own last point, which argmin never prefers to the first of its kind
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
    """Move single groups along their curves: down until within the limit, then up while anything fits.

    Any point of the curve may be moved to, not only its hull; with ``swap`` any candidate of the same interval.
    None where the groups cannot get within the limit.
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
        # saving more than is needed is worth nothing
        rates = np.where(saved > 0, lost / np.clip(saved, 1, -slack), np.inf)
        move = int(rates.argmin())
        if rates[move] == np.inf:
            return None
        now[owner[move]] = move
    while True:
        gained = damages[now][owner] - damages
        extra = parameters - parameters[now][owner]
        # what costs nothing comes first
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
    """The points of a point's interval, or of its candidate alone."""
    owner = table.owners[point]
    bounds, number = (table.interval_points, table.intervals_of[owner]) if swap else (table.first_points, owner)
    return slice(int(bounds[number]), int(bounds[number + 1]))


def _allocation(points: Points) -> _Allocation:
    damage = math.fsum(float(table.damages[point]) for table, point in points)
    return _Allocation(points, damage, sum(int(table.parameters[point]) for table, point in points))


def _structure(points: Points) -> Structure:
    return tuple((table, int(table.owners[point])) for table, point in points)


def _choices(points: Points) -> list[Choice]:
    """What the points stand for."""
    owned = ((table, int(table.owners[point]), point) for table, point in points)
    return [Choice(table.candidates[owner], int(point - table.first_points[owner])) for table, owner, point in owned]
