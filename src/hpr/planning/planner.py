"""Measures every candidate group of a model, and makes a ``Draft`` of them, which proposes plans for any budget.

Candidates lie on tracks. Positions on a track are layers (of one slot, or of a slot of an encoder and its counterpart in the
decoder), the experts of one layer, or blocks of rows of an embedding table.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from torch import nn

from hpr.anatomy.lookup import bytes_per_parameter
from hpr.anatomy.swappable import not_swappable
from hpr.anatomy.symmetry import AlignTarget
from hpr.errors import PlanError
from hpr.operators.alignment import transform_all
from hpr.operators.fitting import Fits
from hpr.operators.metric import Measured
from hpr.operators.registry import OPERATORS, plannable
from hpr.operators.tie import Group, alike
from hpr.planning.alignment_check import MARGIN, alignment_targets
from hpr.planning.dial import Dial, check_dial, measured_dial
from hpr.planning.draft import Draft
from hpr.planning.groupings import Groups, Similar, composites
from hpr.planning.options import DEFAULTS, PlanOptions
from hpr.planning.rows import SiteRow, rows
from hpr.planning.search import Search
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP
from hpr.profiling.profile import Profile
from hpr.runtime.progress import progress
from hpr.solver.candidates import Candidate, Track

_log = logging.getLogger(__name__)


def draft(
    model: nn.Module,
    profile: Profile,
    options: PlanOptions = DEFAULTS,
    *,
    fits: Fits | None = None,
    dial: Dial | None = None,
) -> Draft:
    """Measures every candidate of a model. Returns a ``Draft``, which proposes plans for any budget.

    Operators that make one matrix of several weights (``Operator.merges``) are measured only for similar weights, which are
    rare in pretrained models, or if ``options.operators`` names operators. The candidates are measured again for the aligned
    model if one pair of layers promises a gain above a margin (``options.align`` None, see ``alignment_targets``) or any gain
    (True). ``fits``: the fits of this model, so that draft and share measure it once. ``dial``: what time or operations may
    be, by default measured now if the options limit them. Raises ``HprError`` for a profile of another model or a pattern that
    matches no site, ``PlanError`` for operators that do not exist or if no site is left, and ``BudgetError`` for a dial that
    no plan can meet.

    >>> measured = draft(model, profile, PlanOptions(only="encoder.*"))  # doctest: +SKIP
    >>> plan = measured.best(measured.budget("50%"))  # doctest: +SKIP
    """
    allowed = known_operators(options.operators)
    fits = Fits(model, profile) if fits is None else fits
    fits.check(model, profile)
    anatomy, measured = fits.anatomy, fits.measured()
    bound = not_swappable(model, anatomy)
    chosen = {site.name for site in anatomy.select(options.only) if measured[site.name].has_gradient and site.name not in bound}
    fixed = tuple(site for site in anatomy.sites if site.name not in chosen)
    all_rows = tuple(rows(model, anatomy, chosen))
    if not all_rows:
        raise PlanError("no site is left to plan: each is unused by the objective or outside only=. Choose others with only=")
    if dial is None and (dial := measured_dial(model, anatomy, options)) is not None:
        check_dial(model, anatomy, dial, options)
    targets: tuple[AlignTarget, ...] = ()
    if options.align is not False:
        margin = 0.0 if options.align else MARGIN
        targets = alignment_targets(anatomy, profile, measured, chosen, allowed, margin)
        _log.info("alignment promises a gain for %d symmetries", len(targets))
    touched = [any(target.touches(site) for target in targets for site in row.sites if site.expert is None) for row in all_rows]
    total, tracks = len(all_rows) + sum(touched), []

    def curves(row: SiteRow) -> Track:
        return _track(row, [measured[site.name] for site in row.sites], allowed, options, profile)

    for index, row in enumerate(all_rows):
        tracks.append(curves(row))
        progress("curves", index + 1, total)
    searches = [Search(all_rows, tuple(tracks))]
    if targets:
        transform_all(anatomy, measured, dict(profile.sites), targets)
        done = len(all_rows)
        for index, row in enumerate(all_rows):
            if touched[index]:
                tracks[index] = curves(row)
                done += 1
                progress("curves", done, total)
        searches.append(Search(all_rows, tuple(tracks), targets))
    found = Draft(anatomy, tuple(searches), fixed, bytes_per_parameter(model), options.only)
    return found if dial is None else found.dialled(dial)


def known_operators(names: Collection[str] | None) -> set[str]:
    """The names of the operators to consider, as the registry spells them; all of them for None.

    Upper case, spaces and hyphens make no difference: ``low-rank`` and ``tie+delta`` are ``low rank`` and ``tie + delta``.
    Raises ``PlanError`` if an operator does not exist.
    """
    plannable_names = plannable()
    if names is None:
        return set(plannable_names)
    by_spelling = {_spelling(name): name for name in plannable_names}
    if unknown := sorted(name for name in names if _spelling(name) not in by_spelling):
        raise PlanError(f"no operator {unknown[0]!r}; there are {', '.join(plannable_names)}: use some of these")
    return {by_spelling[_spelling(name)] for name in names}


def _spelling(name: str) -> str:
    """The name of an operator in lower case and without spaces and hyphens."""
    return "".join(name.lower().replace("-", " ").split())


def plan(model: nn.Module, profile: Profile, budget: str = "50%", options: PlanOptions = DEFAULTS) -> Plan:
    """The plan of least predicted damage under a budget (``50%``, ``11M`` parameters, ``45MB`` on disk).

    With ``options.only`` a percentage counts the selected weights alone. Raises ``BudgetError``, with the smallest possible
    budget, if no plan meets the budget, and ``HprError`` as ``draft`` does.

    >>> plan(model, profile, "50%", PlanOptions(only="encoder.*", operators=("low rank",)))  # doctest: +SKIP
    """
    measured = draft(model, profile, options)
    return measured.best(measured.budget(budget))


def _track(row: SiteRow, group: Sequence[Measured], allowed: set[str], options: PlanOptions, profile: Profile) -> Track:
    """Candidates of one row: groupings, and every operator on every short run, on every whole stack and on all sites.

    Operators that make one matrix of several weights are tried for similar weights, or if the user names operators.
    """
    longest, named = options.longest_group, options.operators is not None
    whole = dict.fromkeys([*row.spans, (0, len(group))])
    if group[0].site.kind == "embedding":
        for name, operator in OPERATORS.items():
            if operator.rows is not None and name in allowed:
                return operator.rows.track(group[0])
    candidates: dict[tuple[int, int], tuple[Candidate, ...]] = {}
    for start in range(len(group)):
        for stop in range(start + 1, len(group) + 1):
            members = Group(group[start:stop])
            if len(members) > longest and (start, stop) not in whole:
                continue
            if not row.adjacent(start, stop):
                continue
            likely = named or len(members) == 1 or alike(members)
            offered = [
                operator.candidate(members)
                for name, operator in OPERATORS.items()
                if operator.shared == (len(members) > 1)
                and (name in allowed or name == KEEP)
                and (likely or not operator.merges)
            ]
            if run_candidates := tuple(option for option in offered if option is not None):
                candidates[start, stop] = run_candidates
    groups = Groups(group, candidates, allowed)
    similar = _similarity(row, profile)
    composites_by_span: dict[tuple[int, int], tuple[Candidate, ...]] = {}
    for start, stop in whole:
        if row.sites[0].expert is None and stop - start > 1 and row.adjacent(start, stop):
            lower = 0 if (start, stop) in row.spans else row.spans[0][1]
            composites_by_span[start, stop] = tuple(composites(groups, start, stop, longest, lower, similar))
    for span, span_composites in composites_by_span.items():
        candidates[span] = (*candidates.get(span, ()), *span_composites)
    return Track(row.name, len(group), candidates)


def _similarity(row: SiteRow, profile: Profile) -> Similar:
    """The function of two positions that returns the similarity of their layers' outputs, None if the profile lacks it."""

    def similar(first_position: int, second_position: int) -> float | None:
        first, second = row.sites[first_position], row.sites[second_position]
        features = profile.layers.get(first.stack or "")
        if features is None or first.stack != second.stack or first.layer is None or second.layer is None:
            return None
        return features.similarity[first.layer][second.layer]

    return similar
