"""Measure every candidate group of a model, laid out on tracks, as a ``Draft`` that answers for any budget.

One track per slot of a stack, or per slot of an encoder and its kin in the decoder (its positions are layers), one per layer's
experts (its positions are experts) and one per embedding table (its positions are blocks of rows).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from hpr.anatomy.lookup import bytes_per_parameter
from hpr.anatomy.swappable import not_swappable
from hpr.anatomy.symmetry import AlignTarget
from hpr.errors import HprError, PlanError
from hpr.operators.alignment import transform_all
from hpr.operators.fitting import Fits
from hpr.operators.metric import Measured
from hpr.operators.registry import OPERATORS, plannable
from hpr.operators.tie import Group, alike
from hpr.planning.alignment_check import MARGIN, worthwhile
from hpr.planning.draft import Draft
from hpr.planning.groupings import Groups, Similar, composites
from hpr.planning.options import LONGEST_GROUP
from hpr.planning.rows import Row, rows
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP
from hpr.profiling.profile import Profile
from hpr.runtime.progress import progress
from hpr.solver.candidates import Candidate, Track


def draft(
    model: nn.Module,
    profile: Profile,
    only: str | None = None,
    operators: Iterable[str] | None = None,
    longest_group: int = LONGEST_GROUP,
    align: bool | Literal["auto"] = "auto",
    fits: Fits | None = None,
) -> Draft:
    """Measure every candidate of a model. ``operators``: names to consider, *keep* always among them; by default all, those
    that make one matrix of several only where the weights are alike (``tie.alike``), which is rare in pretrained models.

    ``align``: also of the model with aligned layers; ``"auto"`` where a look at one pair of layers promises that it pays
    (see ``worthwhile``), True wherever it promises anything. Raises ``HprError`` for a profile of another model, a pattern
    that matches nothing and operators that do not exist.
    """
    allowed = known_operators(operators)
    fits = Fits(model, profile) if fits is None else fits
    fits.check(model, profile)
    anatomy, measured = fits.anatomy, fits.measured()
    bound = not_swappable(model, anatomy)
    chosen = {site.name for site in anatomy.select(only) if measured[site.name].live and site.name not in bound}
    fixed = tuple(site for site in anatomy.sites if site.name not in chosen)
    every = rows(model, anatomy, chosen)
    if not every:
        raise HprError("no site is left to plan: every one is unused by the objective or outside only=")
    targets: tuple[AlignTarget, ...] = ()
    if align:
        targets = worthwhile(anatomy, profile, measured, chosen, allowed, MARGIN if align == "auto" else 0.0)
    touched = [any(target.touches(site) for target in targets for site in row.sites if site.expert is None) for row in every]
    total, tracks = len(every) + sum(touched), []

    def curves(row: Row) -> Track:
        return _track(row, [measured[site.name] for site in row.sites], allowed, operators is not None, longest_group, profile)

    for index, row in enumerate(every):
        tracks.append(curves(row))
        progress("curves", index + 1, total)
    plain = Draft(anatomy, tuple(tracks), fixed, bytes_per_parameter(model), only)
    if not targets:
        return plain
    transform_all(anatomy, measured, dict(profile.sites), targets)
    done = len(every)
    for index, row in enumerate(every):
        if touched[index]:
            tracks[index] = curves(row)
            done += 1
            progress("curves", done, total)
    return replace(plain, aligned=replace(plain, tracks=tuple(tracks), alignment=targets))


def known_operators(names: Iterable[str] | None) -> set[str]:
    """The operators to consider, all for None. Raises ``HprError`` for one that does not exist."""
    there = plannable()
    allowed = set(there if names is None else names)
    if unknown := sorted(allowed.difference(there)):
        raise PlanError(f"no operator {unknown[0]!r}; there are {', '.join(there)}")
    return allowed


def plan(
    model: nn.Module,
    profile: Profile,
    budget: str = "50%",
    only: str | None = None,
    operators: Iterable[str] | None = None,
    align: bool | Literal["auto"] = "auto",
) -> Plan:
    """The plan of least predicted damage under a budget (``50%``, ``11M`` parameters, ``45MB`` on disk).

    ``only`` is a shell pattern of site names (``encoder.*``); a percentage then counts the selected weights alone. ``align``
    as in ``draft``. Raises ``HprError`` for an impossible budget, naming the smallest possible.
    """
    sketch = draft(model, profile, only, operators, align=align)
    return sketch.best(sketch.budget(budget))


def _track(row: Row, group: Sequence[Measured], allowed: set[str], named: bool, longest: int, profile: Profile) -> Track:
    """Candidates of one row: every operator on every run up to ``longest``, on every whole stack and on all, and groupings.

    What makes one matrix of several is tried where these are alike, or where operators were ``named``.
    """
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
            options = [
                operator.candidate(members)
                for name, operator in OPERATORS.items()
                if operator.shared == (len(members) > 1)
                and (name in allowed or name == KEEP)
                and (likely or not operator.merges)
            ]
            if kept := tuple(option for option in options if option is not None):
                candidates[start, stop] = kept
    groups = Groups(group, candidates, allowed)
    similar = _similarity(row, profile)
    found: dict[tuple[int, int], tuple[Candidate, ...]] = {}
    for start, stop in whole:
        if row.sites[0].expert is None and stop - start > 1 and row.adjacent(start, stop):
            lower = 0 if (start, stop) in row.spans else row.spans[0][1]
            found[start, stop] = tuple(composites(groups, start, stop, longest, lower, similar))
    for span, own in found.items():
        candidates[span] = (*candidates.get(span, ()), *own)
    return Track(row.name, len(group), candidates)


def _similarity(row: Row, profile: Profile) -> Similar:
    """Similarity of the outputs of two layers of one stack, as the profile has it."""

    def similar(one: int, other: int) -> float | None:
        first, second = row.sites[one], row.sites[other]
        features = profile.layers.get(first.stack or "")
        if features is None or first.stack != second.stack or first.layer is None or second.layer is None:
            return None
        return features.similarity[first.layer][second.layer]

    return similar
