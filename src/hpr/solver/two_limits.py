"""Two limits at once: on parameters, and on a second cost of every choice, such as milliseconds or operations.

A second Lagrange multiplier prices the second cost. At one price the damages are damage + price · cost, and the search within
the limit on parameters is the one of ``lagrangian``. The price is found as the multiplier for parameters is there: each step
tries the slope between a solution above the limit on costs and one below it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hpr.errors import BudgetError
from hpr.solver import lagrangian
from hpr.solver.candidates import Candidate, Choice, Solution, Track, solution
from hpr.solver.composite import mapped

_STEPS = 16  # the most steps of the search for the price
_CLOSE = 2e-3  # a solution this close below the ceiling ends the search, as a share of the ceiling


@dataclass(frozen=True)
class _Step:
    """The solutions at one price, the best first, with true damages; ``bound``: no solution has less damage + price · cost."""

    solutions: list[Solution]
    bound: float

    @property
    def damage(self) -> float:
        return self.solutions[0].damage

    @property
    def cost(self) -> float:
        return self.solutions[0].cost


def search(tracks: Sequence[Track], limit: int, breadth: int, ceiling: float) -> list[Solution]:
    """Solutions of different structure within ``limit`` parameters whose costs add up to at most ``ceiling``, by damage.

    Every candidate needs ``costs``. The first solution is the best that was found, and its ``bound`` holds for all solutions.
    Raises ``BudgetError`` if no solution that was found meets both limits.
    """
    above = _at(tracks, limit, breadth, 1.0, 0.0)
    if above.cost <= ceiling:
        return [one for one in above.solutions if one.cost <= ceiling]
    below = _at(tracks, limit, 0, 0.0, 1.0)
    if below.cost > ceiling:
        raise BudgetError(f"the least possible cost is {below.cost:.4g}, above the ceiling of {ceiling:.4g}: raise it")
    price, bound, tried = 0.0, above.bound, [above, below]
    for _ in range(_STEPS):
        slope = (below.damage - above.damage) / (above.cost - below.cost)
        if slope <= 0:  # possible, since the solutions at a price are the best that were found
            break
        middle = _at(tracks, limit, 0, 1.0, slope)
        tried.append(middle)
        price, bound = slope, max(bound, middle.bound - slope * ceiling)
        chord = below.damage + slope * below.cost
        if middle.cost > ceiling:
            above = middle
        else:
            below = middle
        if middle.damage + slope * middle.cost >= chord * (1 - 1e-9) or ceiling * (1 - _CLOSE) <= below.cost:
            break
    if price > 0 and breadth:
        tried.append(_at(tracks, limit, breadth, 1.0, price))
    best: dict[tuple, Solution] = {}
    for start in (one for step in tried for one in step.solutions):
        found = _adjusted(start, limit, ceiling, price)
        if found is not None:
            known = best.setdefault(found.structure, found)
            if (found.damage, found.parameters) < (known.damage, known.parameters):
                best[found.structure] = found
    bound = max(bound, 0.0)
    answers = [replace(one, price=price, bound=min(bound, one.damage)) for one in best.values()]
    return sorted(answers, key=lambda one: (one.damage, one.parameters))


def least_cost(tracks: Sequence[Track], limit: int) -> float:
    """The least total of the costs that was found within ``limit`` parameters. Raises as ``lagrangian.solve``."""
    return _at(tracks, limit, 0, 0.0, 1.0).cost


def _at(tracks: Sequence[Track], limit: int, breadth: int, damage_weight: float, price: float) -> _Step:
    """The solutions of least damage_weight · damage + price · cost within the limit on parameters."""
    originals: dict[int, Candidate] = {}

    def priced(candidate: Candidate) -> Candidate:
        changed = replace(candidate, damages=damage_weight * candidate.damages + price * costs_of(candidate))
        originals[id(changed)] = candidate
        return changed

    changed_tracks = mapped(tracks, priced)
    found = lagrangian.search(changed_tracks, limit, breadth)
    solutions = []
    for one in found:
        choices = [Choice(originals[id(choice.candidate)], choice.index) for choice in one.choices]
        solutions.append(replace(_solution(choices), multiplier=one.multiplier))
    return _Step(solutions, found[0].bound)


def costs_of(candidate: Candidate) -> np.ndarray:
    """The second cost of each point of a plain candidate; zeros if it has none."""
    return np.zeros(len(candidate.choices)) if candidate.costs is None else candidate.costs


def _solution(choices: Sequence[Choice]) -> Solution:
    return replace(solution(choices), cost=math.fsum(float(costs_of(one.candidate)[one.index]) for one in choices))


def _adjusted(start: Solution, limit: int, ceiling: float, price: float) -> Solution | None:
    """Move single groups along their curves until both limits are met, then to less damage while both allow it.

    None if such moves cannot meet the limits. What a move takes or gives is priced with the two multipliers.
    """
    candidates = [choice.candidate for choice in start.choices]
    sizes = [len(candidate.choices) for candidate in candidates]
    firsts = np.cumsum([0, *sizes[:-1]])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    damages = np.concatenate([candidate.damages for candidate in candidates])
    parameters = np.concatenate([candidate.parameters for candidate in candidates])
    costs = np.concatenate([costs_of(candidate) for candidate in candidates])
    now = firsts + [choice.index for choice in start.choices]

    def changes(values: np.ndarray) -> np.ndarray:
        """What each point adds to the total if its group moves there."""
        return values - values[now][owner]

    while True:
        size, cost = int(parameters[now].sum()), math.fsum(costs[now])
        over = max(0, size - limit) / limit + max(0.0, cost - ceiling) / ceiling
        if over <= 0:
            break
        after = np.maximum(0, size + changes(parameters) - limit) / limit
        after = after + np.maximum(0.0, cost + changes(costs) - ceiling) / ceiling
        gain = over - after
        rates = np.where(gain > 1e-15, np.maximum(changes(damages), 0.0) / np.maximum(gain, 1e-15), np.inf)
        move = int(rates.argmin())
        if rates[move] == np.inf:
            return None
        now[owner[move]] = move
    while True:
        size, cost = int(parameters[now].sum()), math.fsum(costs[now])
        gained, more, dearer = -changes(damages), changes(parameters), changes(costs)
        paid = (start.multiplier or 0.0) * more + price * dearer
        allowed = (gained > 0) & (more <= limit - size) & (dearer <= ceiling - cost)
        rates = np.where(allowed, gained / np.maximum(paid, 1e-300), 0.0)
        move = int(rates.argmax())
        if rates[move] <= 0:
            break
        now[owner[move]] = move
    found = _solution([Choice(one, int(point - first)) for one, point, first in zip(candidates, now, firsts, strict=True)])
    return replace(found, multiplier=start.multiplier) if found.cost <= ceiling else None
