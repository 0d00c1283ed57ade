"""The solver's input and output: candidates on intervals of a track, choices, solutions.

A *track* is a sequence of layer positions (for example one slot of one stack). A *candidate* is one operator on one group of
sites, with a curve of (parameters, damage) points, one for each possible rank. A *solution* covers every position once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hpr.errors import BudgetError, HprError


@dataclass(frozen=True, eq=False)
class Candidate:
    """One operator on one group of sites, with its curve. Point k of the curve is one choice of ranks.

    ``choices[k]`` holds the ranks of point k (``()`` for an operator without ranks), ``parameters[k]`` (int64) the number of
    parameters that it stores, and ``damages[k]`` (float64) its predicted damage in nats per example. The curve need not be
    sorted or convex. ``rows`` is the range [start, stop) of weight rows that the candidate covers, or None if it covers whole
    sites. ``costs[k]`` (float64) is what point k costs besides parameters, such as milliseconds, for searches with two limits.
    Raises ``HprError`` for an empty curve, unequal lengths, parameters below 1 and damages that are negative or not
    finite.

    A *composite* stores several groups of sites at once; ``composite.compose`` makes it. ``partition`` holds the group of each
    position and ``parts[g]`` the candidates for group g. ``picks[k][g]`` is the pair (candidate, point): point k of the
    composite uses candidate number ``candidate`` of ``parts[g]`` at point number ``point`` of its curve. The ranks are in these
    candidates, so ``choices[k]`` is ``()``.

    Example of a composite: positions 0 and 2 are group 0 and position 1 is group 1, so ``partition`` is (0, 1, 0). Group 0 has
    one candidate with the point (100 parameters, 0.3 nats). Group 1 has one candidate with the points (20, 0.2) and (40, 0.1).

    - Point 0 is (120, 0.5), and ``picks[0]`` is ((0, 0), (0, 0)): the first point of both candidates.
    - Point 1 is (140, 0.4), and ``picks[1]`` is ((0, 0), (0, 1)): the first point of group 0, the second point of group 1.

    >>> Candidate("low rank", ("encoder.0.dense",), ((8,), (16,)), [6144, 12288], [0.2, 0.05])
    """

    operator: str
    sites: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]
    parameters: np.ndarray
    damages: np.ndarray
    parts: tuple[tuple[Candidate, ...], ...] = ()
    partition: tuple[int, ...] = ()
    picks: tuple[tuple[tuple[int, int], ...], ...] = ()
    rows: tuple[int, int] | None = None
    costs: np.ndarray | None = None

    def __post_init__(self) -> None:
        name = f"candidate {self.operator!r} on {', '.join(self.sites)}"
        damages, given = np.asarray(self.damages, np.float64), np.asarray(self.parameters)
        if not (given.shape == damages.shape == (len(self.choices),)) or not self.choices:
            raise HprError(
                f"{name}: {len(self.choices)} choices, parameters of shape {given.shape}, damages of shape {damages.shape}: "
                f"give one entry each for at least one choice"
            )
        if len(self.picks) != (len(self.choices) if self.parts else 0):
            raise HprError(
                f"{name}: {len(self.picks)} picks from {len(self.parts)} groups: give one for each choice of a composite"
            )
        if not np.isfinite(damages).all() or damages.min() < 0:
            worst = damages[~np.isfinite(damages) | (damages < 0)][0]
            raise HprError(f"{name}: damage {worst} is no finite number of nats from 0 up: leave that choice out")
        parameters = given.astype(np.int64) if np.isfinite(given).all() else np.zeros(1, np.int64)
        if parameters.min() < 1 or (parameters != given).any():
            raise HprError(f"{name}: parameters {given.tolist()} are not all whole numbers from 1 up: leave those choices out")
        object.__setattr__(self, "damages", damages)
        object.__setattr__(self, "parameters", parameters)


@dataclass(frozen=True, eq=False)
class Track:
    """``length`` positions, and the candidates for intervals [start, stop) of them: a solution covers every position once.

    A site outside the layer stacks is a track of length 1; groups that are not contiguous (a cycle) are a composite for the
    interval that they fill together. Raises ``HprError`` for a length below 1 and for intervals outside the track.
    """

    name: str
    length: int
    candidates: Mapping[tuple[int, int], tuple[Candidate, ...]]

    def __post_init__(self) -> None:
        if self.length < 1:
            raise HprError(f"track {self.name!r} has length {self.length}: give it at least one position")
        for start, stop in self.candidates:
            if not 0 <= start < stop <= self.length:
                raise HprError(
                    f"track {self.name!r}: [{start}, {stop}) is no interval of its {self.length} positions: leave it out"
                )


@dataclass(frozen=True)
class Choice:
    """One point of one candidate's curve."""

    candidate: Candidate
    index: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """The chosen ranks, ``()`` for an operator without any and for a composite (see ``leaves``)."""
        return self.candidate.choices[self.index]

    @property
    def parameters(self) -> int:
        return int(self.candidate.parameters[self.index])

    @property
    def damage(self) -> float:
        """Nats per example."""
        return float(self.candidate.damages[self.index])

    @property
    def leaves(self) -> tuple[Choice, ...]:
        """The choices for the groups of a composite, each of a plain candidate; the choice itself if it is one."""
        if not self.candidate.parts:
            return (self,)
        picked = zip(self.candidate.parts, self.candidate.picks[self.index], strict=True)
        return tuple(leaf for options, (number, index) in picked for leaf in Choice(options[number], index).leaves)


@dataclass(frozen=True)
class Solution:
    """Choices that cover every position of every track once, with their total ``damage`` (nats) and ``parameters``.

    ``bound`` (nats) is a lower bound on the damage of any solution within the same limit. ``multiplier`` (nats per parameter)
    is the Lagrange multiplier of the search, None if there was none. ``label`` says which operators were searched. With a
    second limit, ``cost`` is the total of ``Candidate.costs``, and ``price`` (nats per unit) its multiplier.
    """

    choices: tuple[Choice, ...]
    damage: float
    parameters: int
    multiplier: float | None = None
    bound: float = 0.0
    label: str = ""
    cost: float = 0.0
    price: float = 0.0

    @property
    def gap(self) -> float:
        """An upper bound on the distance of the damage from the optimum, in nats."""
        return self.damage - self.bound

    @property
    def relative_gap(self) -> float:
        """The gap as a share of the damage, from 0 (proven optimal) to 1."""
        return self.gap / self.damage if self.damage > 0 else 0.0

    @property
    def structure(self) -> tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...]:
        """The groups and their operators, ranks left out: (operator, sites, rows or ()), sorted."""
        groups = (choice.candidate for choice in self.choices)
        return tuple(sorted((one.operator, one.sites, one.rows or ()) for one in groups))


@dataclass(frozen=True, eq=False)
class Table:
    """A track as flat arrays over all points of all its candidates, so that one numpy call computes all costs."""

    track: Track
    candidates: tuple[Candidate, ...]
    intervals: np.ndarray  # (intervals, 2)
    intervals_of: np.ndarray  # (candidates,) number of each candidate's interval
    owners: np.ndarray  # (points,) number of each point's candidate
    first_points: np.ndarray  # (candidates + 1,) number of each candidate's first point
    interval_points: np.ndarray  # (intervals + 1,) number of each interval's first point
    damages: np.ndarray  # (points,) nats
    parameters: np.ndarray  # (points,)


def tabulate(track: Track) -> Table:
    """The table of a track; it serves for all multipliers."""
    intervals = sorted(interval for interval, options in track.candidates.items() if options)
    candidates = tuple(candidate for interval in intervals for candidate in track.candidates[interval])
    counts = [len(track.candidates[interval]) for interval in intervals]
    sizes = [len(candidate.choices) for candidate in candidates]
    first_points = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return Table(
        track=track,
        candidates=candidates,
        intervals=np.array(intervals, np.int64).reshape(-1, 2),
        intervals_of=np.repeat(np.arange(len(intervals)), counts),
        owners=np.repeat(np.arange(len(candidates)), sizes),
        first_points=first_points,
        interval_points=first_points[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])],
        damages=np.concatenate([np.zeros(0), *(candidate.damages for candidate in candidates)]),
        parameters=np.concatenate([np.zeros(0, np.int64), *(candidate.parameters for candidate in candidates)]),
    )


def solution(choices: Iterable[Choice]) -> Solution:
    """A solution of these choices, composites replaced by their groups; its bound is its damage, so that its gap is 0."""
    chosen = tuple(leaf for choice in choices for leaf in choice.leaves)
    damage = math.fsum(choice.damage for choice in chosen)
    return Solution(chosen, damage, sum(choice.parameters for choice in chosen), bound=damage)


def impossible(limit: int, smallest: int) -> BudgetError:
    """The error for a limit below the smallest possible total."""
    return BudgetError(f"{limit:,} parameters are too few: the smallest possible total is {smallest:,}: raise the budget to it")
