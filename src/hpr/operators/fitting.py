"""``Fits`` measures a model once and computes the factors of its plans. It fits each group of sites once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
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
    """``factors``: float64, by name, in the form that the bank stores. ``bias_changes``: (out,) by site, to add to its bias."""

    factors: dict[str, Tensor]
    bias_changes: dict[str, Tensor]


class Fits:
    """Measures a model in the metric of its profile and fits the factors of plans. It caches both.

    Without a profile the metric is the plain Frobenius norm. Give the same ``Fits`` to ``draft``, ``share`` and ``refit`` to
    measure a model once for several plans. The weights of ``model`` must not change in the meantime.

    The cache holds the damped moments and their roots, (out, out) and (in, in), of every measured site, and the factors of
    every distinct group, all in float64. It also holds one aligned copy of the model per alignment, in the model's own type. It
    does not hold the float64 weights that ``measured`` returns. Raises ``HprError`` if the profile belongs to another model.

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
        """Raise ``PlanError`` if this ``Fits`` was made for another model, or for a profile with other statistics."""
        other = profile is not None and (self.profile is None or self.profile.sites is not profile.sites)
        if self.model is not model or other:
            raise PlanError(
                "these fits belong to another model or profile: use Fits(model, profile) with this model and profile"
            )

    def measured(self, names: Iterable[str] | None = None) -> dict[str, Measured]:
        """``Measured`` (weight in float64 and metric) for the named sites, by default for all, by site name."""
        sites = self.anatomy.sites if names is None else [self.anatomy[name] for name in names]
        measured = {}
        for site in sites:
            weight = weight64(self.model, site)
            if site.name not in self._metrics:
                self._metrics[site.name] = metric_of(site, self.profile, weight)
            measured[site.name] = self._metrics[site.name].of(site, weight)
        return measured

    def aligned(self, targets: Sequence[AlignTarget]) -> Fits:
        """The ``Fits`` of the aligned copy of the model (see ``alignment.align``). Without targets it returns itself.

        Raises ``PlanError`` if this ``Fits`` has no profile.
        """
        key = tuple(targets)
        if not key:
            return self
        if key not in self._aligned:
            if self.profile is None:
                raise PlanError("the plan aligns layers and needs the profile it was made with: give that profile")
            sites = [site.name for site in self.anatomy.sites if any(target.touches(site) for target in key)]
            model, profile, _ = align_measured(self.model, self.anatomy, self.measured(sites), self.profile, key)
            aligned = Fits(model, profile)
            touched = set(sites)
            aligned._metrics = {name: metric for name, metric in self._metrics.items() if name not in touched}
            self._aligned[key] = aligned
        return self._aligned[key]

    def fit(self, plan: Plan) -> Fitted:
        """Fit all factors of a plan in closed form. For a plan with an alignment, call it on ``aligned(targets)``.

        Replacing W by Ŵ changes the mean output of a site; the bias changes W E[x] − Ŵ E[x] compensate this. Routers start with
        zeros. Raises ``PlanError`` for unknown operators and for terms that their operator would not write.
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
            raise PlanError(f"{first}: no operator {operator!r}; there are {', '.join(OPERATORS)}. Use one of these")
        measured = self.measured(terms)
        try:
            values = OPERATORS[operator].fit(Group(measured.values()), terms)
            _check_shapes(values, terms, self.anatomy)
        except TermsError as error:
            raise PlanError(f"{first}: these are no terms of {operator!r} ({error}): plan this site anew") from error
        changes = {}
        for name, site_terms in terms.items():
            site = measured[name]
            if site.mean is not None:
                lost = site.weight - product(site_terms, values, site.site)
                changes[name] = lost @ site.mean * _covered(site_terms, site)
        return Fitted(store(values, [term for site_terms in terms.values() for term in site_terms]), changes)


def _check_shapes(values: Mapping[str, Tensor], terms: Terms, anatomy: Anatomy) -> None:
    """Raise ``TermsError`` if a factor that the terms name is missing or has another shape."""
    for name, site_terms in terms.items():
        for term in site_terms:
            shapes = term.shapes(anatomy[name])
            for factor in term.factors:
                if factor not in values:
                    raise TermsError(f"the fit returns no factor {factor}")
                if values[factor].shape != shapes[factor][:2]:
                    raise TermsError(f"factor {factor} has shape {tuple(values[factor].shape)}, not {shapes[factor][:2]}")


def _covered(terms: Sequence[Term], site: Measured) -> Tensor:
    """1 for each weight row that a term covers and 0 for each row that was dropped: (out,)."""
    covered = site.weight.new_zeros(len(site.weight))
    for term in terms:
        start, stop = term.rows or (0, len(covered))
        covered[start:stop] = 1
    return covered


def groups(plan: Plan) -> list[tuple[str, list[str]]]:
    """(operator, site names in plan order) for every set of sites that are connected by shared factors."""
    sets = connected({name: entry.terms for name, entry in plan.entries.items()})
    return [(plan.entries[names[0]].operator, names) for names in sets]


def product(terms: Sequence[Term], values: Mapping[str, Tensor], site: Site) -> Float[Tensor, "out in"]:
    """The matrix (out, in) that the terms of a site add up to. ``values``: factors by name, with their identity blocks."""
    return terms_product(terms, values, site.out_features, site.in_features)
