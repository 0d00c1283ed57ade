"""Fits: a model measured once, and the factors of its plans, each group of sites fitted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.model import Anatomy, Site
from hpr.anatomy.symmetry import AlignTarget
from hpr.errors import PlanError
from hpr.operators.alignment import align_measured
from hpr.operators.identity_block import store
from hpr.operators.metric import Measured, Metric, metric_of, weight64
from hpr.operators.operator import Terms, TermsError
from hpr.operators.registry import OPERATORS
from hpr.operators.tie import Group
from hpr.plans.owners import connected
from hpr.plans.plan import Plan
from hpr.plans.product import product as terms_product
from hpr.plans.terms import Term, routers_of, validate_entry
from hpr.profiling.profile import Profile


@dataclass(frozen=True)
class Fitted:
    """Factors as the bank stores them, float64, by name; and what to add to the biases of changed sites, by site."""

    factors: dict[str, Tensor]
    bias_changes: dict[str, Tensor]


class Fits:
    """A model measured in the metric of its profile, and the fits of its groups, each made once.

    Without a profile the metric is plain Frobenius. Give one ``Fits`` to ``draft``, ``share`` and ``refit`` to measure a model
    once for several plans. It assumes that the weights of ``model`` do not change meanwhile.

    It keeps the damped moments and their roots, (out, out) and (in, in) float64 for every measured site, the fitted factors of
    every distinct group, float64, and one aligned copy of the model for the alignment of each plan. Weights in float64 live
    only as long as the caller of ``measured`` keeps them. Raises ``HprError`` for a profile of another model.

    >>> fits = Fits(model, profile)  # doctest: +SKIP
    >>> students = [share(model, plan, fits=fits) for plan in plans]  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, profile: Profile | None):
        self.model = model
        self.profile = profile
        self.anatomy = describe(model)
        if profile is not None:
            profile.check(self.anatomy)
        self._metrics: dict[str, Metric] = {}
        self._groups: dict[tuple, Fitted] = {}
        self._aligned: dict[tuple[AlignTarget, ...], Fits] = {}

    def check(self, model: nn.Module, profile: Profile | None) -> None:
        """Raise ``PlanError`` if these are the fits of another model, or of a profile with other statistics."""
        other = profile is not None and (self.profile is None or self.profile.sites is not profile.sites)
        if self.model is not model or other:
            raise PlanError("these fits are of another model or profile: use Fits(model, profile) of this one")

    def measured(self, names: Iterable[str] | None = None) -> dict[str, Measured]:
        """Some sites, by default all, with their weights in float64 and their metric, by name."""
        sites = self.anatomy.sites if names is None else [self.anatomy[name] for name in names]
        found = {}
        for site in sites:
            weight = weight64(self.model, site)
            if site.name not in self._metrics:
                self._metrics[site.name] = metric_of(site, self.profile, weight)
            found[site.name] = self._metrics[site.name].of(site, weight)
        return found

    def aligned(self, targets: Sequence[AlignTarget]) -> Fits:
        """The fits of the aligned model: a copy that computes the same with transformed weights. Itself without targets."""
        key = tuple(targets)
        if not key:
            return self
        if key not in self._aligned:
            if self.profile is None:
                raise PlanError("the plan aligns layers, which takes the profile it was made with: give that profile, too")
            sites = [site.name for site in self.anatomy.sites if any(target.touches(site) for target in key)]
            model, profile, _ = align_measured(self.model, self.anatomy, self.measured(sites), self.profile, key)
            aligned = Fits(model, profile)
            touched = set(sites)
            aligned._metrics = {name: one for name, one in self._metrics.items() if name not in touched}
            self._aligned[key] = aligned
        return self._aligned[key]

    def fit(self, plan: Plan) -> Fitted:
        """All factors of a plan in closed form. A plan with an alignment needs the fits of the aligned model.

        Biases absorb what the change does to the mean output: W E[x] - Ŵ E[x]. Raises ``PlanError`` for unknown operators and
        for terms that are not of the form of their operator.
        """
        factors: dict[str, Tensor] = {}
        changes: dict[str, Tensor] = {}
        for operator, names in groups(plan):
            terms = {name: plan.entries[name].terms for name in names}
            key = (operator, tuple(terms.items()))
            if key not in self._groups:
                for name in names:
                    validate_entry(self.anatomy[name], plan.entries[name])
                self._groups[key] = self._fit_group(operator, terms)
            factors |= self._groups[key].factors
            changes |= self._groups[key].bias_changes
        routers = routers_of(term for entry in plan.entries.values() for term in entry.terms)
        if routers:
            shapes = plan.factors(self.anatomy)
            factors |= {name: torch.zeros(shapes[name].stored).double() for name in routers}
        return Fitted(factors, changes)

    def _fit_group(self, operator: str, terms: Terms) -> Fitted:
        first = next(iter(terms))
        if operator not in OPERATORS:
            raise PlanError(f"{first}: no operator {operator!r}; there are {', '.join(OPERATORS)}")
        measured = self.measured(terms)
        try:
            values = OPERATORS[operator].fit(Group(measured.values()), terms)
            _check_shapes(values, terms, self.anatomy)
        except TermsError as error:
            raise PlanError(f"{first}: its terms are not those of {operator!r} ({error}); plan this site anew") from error
        changes = {}
        for name, several in terms.items():
            one = measured[name]
            if one.mean is not None:
                changes[name] = (one.weight - product(several, values, one.site)) @ one.mean * _covered(several, one)
        return Fitted(store(values, [term for several in terms.values() for term in several]), changes)


def _check_shapes(values: Mapping[str, Tensor], terms: Terms, anatomy: Anatomy) -> None:
    """Raise ``TermsError`` if a factor that the terms name is missing or has another shape."""
    for name, several in terms.items():
        for term in several:
            shapes = term.shapes(anatomy[name])
            for factor in term.factors:
                if factor not in values:
                    raise TermsError(f"nothing gives {factor}")
                if values[factor].shape != shapes[factor][:2]:
                    raise TermsError(f"{factor} would be {tuple(values[factor].shape)}, not {shapes[factor][:2]}")


def _covered(terms: Sequence[Term], one: Measured) -> Tensor:
    """1 for the rows of a site that its terms give, 0 for those that no longer have an effect: (out,)."""
    covered = one.weight.new_zeros(len(one.weight))
    for term in terms:
        start, stop = term.rows or (0, len(covered))
        covered[start:stop] = 1
    return covered


def groups(plan: Plan) -> list[tuple[str, list[str]]]:
    """(operator, site names in plan order) for every set of sites tied together by common factors."""
    sets = connected({name: entry.terms for name, entry in plan.entries.items()})
    return [(plan.entries[names[0]].operator, names) for names in sets]


def product(terms: Sequence[Term], values: Mapping[str, Tensor], site: Site) -> Tensor:
    """The (out, in) matrix that terms of plain factors add up to."""
    return terms_product(terms, values, site.out_features, site.in_features)
