"""One set of measured candidates, and the solver's solutions for it. Each question is solved once."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

from hpr.anatomy.symmetry import AlignTarget
from hpr.errors import BudgetError
from hpr.operators.registry import plannable
from hpr.planning.rows import SiteRow
from hpr.solver import lagrangian, two_limits
from hpr.solver.candidates import Solution, Track
from hpr.solver.composite import restrict

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Search:
    """Candidates of a model, or of its aligned copy if ``alignment`` has targets: one track for each row of sites.

    The methods accept a limit on the parameters of these sites and remember their solutions. They raise ``BudgetError`` if no
    choice of candidates meets the limit. ``ceiling``: what the candidates' costs may add up to, None if nothing limits them.
    """

    rows: tuple[SiteRow, ...]
    tracks: tuple[Track, ...]
    alignment: tuple[AlignTarget, ...] = ()
    ceiling: float | None = None
    _answers: dict[tuple, object] = field(default_factory=dict, init=False, repr=False)

    @property
    def sites(self) -> set[str]:
        """Names of all sites with candidates."""
        return {site.name for row in self.rows for site in row.sites}

    @cached_property
    def smallest(self) -> int:
        """The fewest parameters that these sites can have."""
        return sum(lagrangian.smallest(track) for track in self.tracks)

    def least_cost(self, limit: int) -> float:
        """The least that the candidates' costs can add up to."""
        self._check(limit, self.smallest)
        return self._once(lambda: two_limits.least_cost(self.tracks, limit), "least cost", limit)

    @property
    def _searching(self) -> lagrangian.Searching:
        return lagrangian.search if self.ceiling is None else partial(two_limits.search, ceiling=self.ceiling)

    def best(self, limit: int) -> Solution:
        """The solution of least damage, over all operators together and each one alone."""
        self._check(limit, self.smallest)
        return self._once(lambda: lagrangian.plan_candidates(self.tracks, limit, self._searching)[0], "best", limit)

    def k_best(self, limit: int, count: int) -> list[Solution]:
        """Up to ``count`` solutions of distinct structure, by damage."""
        self._check(limit, self.smallest)
        return self._once(lambda: lagrangian.k_best(self.tracks, limit, count, self._searching), "k best", limit, count)

    def without(self, operator: str, limit: int) -> Solution:
        """The solution of least damage that does not use one operator."""
        tracks = self._once(lambda: restrict(self.tracks, set(plannable()) - {operator}), "tracks", operator)
        self._check(limit, self._once(lambda: sum(map(lagrangian.smallest, tracks)), "smallest", operator))
        best = self._once(lambda: lagrangian.plan_candidates(tracks, limit, self._searching)[0], "without", operator, limit)
        return replace(best, label=f"without {operator}")

    def narrowed(self, chosen: Set[str]) -> Search:
        """The same candidates for the chosen sites alone."""
        pairs = [_narrowed(row, track, chosen) for row, track in zip(self.rows, self.tracks, strict=True)]
        left = [pair for pair in pairs if pair is not None]
        return Search(tuple(row for row, _ in left), tuple(track for _, track in left), self.alignment, self.ceiling)

    def _check(self, limit: int, smallest: int) -> None:
        if not self.tracks:
            raise BudgetError("no site is left to plan: choose more sites with only=, or drop fewer layers")
        if limit < smallest:
            raise BudgetError(f"{limit:,} parameters are too few for these sites: they need {smallest:,}: raise the budget")

    def _once(self, compute: Callable[[], T], *key: object) -> T:
        if key not in self._answers:
            self._answers[key] = compute()
        return self._answers[key]  # type: ignore[return-value]


def _narrowed(row: SiteRow, track: Track, chosen: Set[str]) -> tuple[SiteRow, Track] | None:
    """A row and its track for the chosen sites alone, None if no site is chosen. Blocks of rows of a table stay together."""
    positions = [index for index, site in enumerate(row.sites) if site.name in chosen]
    if not positions:
        return None
    if len(positions) == len(row.sites):
        return row, track
    place = {index: number for number, index in enumerate(positions)}
    candidates = {
        (place[start], place[stop - 1] + 1): run_candidates
        for (start, stop), run_candidates in track.candidates.items()
        if all(index in place for index in range(start, stop))
    }
    narrowed = row.narrowed(positions)
    return narrowed, Track(narrowed.name, len(positions), candidates)
