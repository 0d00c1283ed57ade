"""The operators: what may become of a group of sites. A new one is one file and one entry here.

Each operator gives its curve (``candidate``: damage and parameters at every rank), its ``terms`` for a choice of ranks, and
the ``fit`` of its factors; all three see sites in the metric of ``operators.metric``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpr.anatomy.model import Anatomy, Site
from hpr.errors import PlanError
from hpr.operators.identity_block import store
from hpr.operators.metric import Measured, measure
from hpr.operators.operator import Terms, TermsError
from hpr.operators.registry import OPERATORS
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


def fit(model: nn.Module, anatomy: Anatomy, plan: Plan, profile: Profile | None) -> Fitted:
    """All factors of a plan in closed form, in the metric of the profile (plain Frobenius without one).

    Biases take up what the change does to the mean output: W E[x] − Ŵ E[x]. Raises ``HprError`` for unknown operators and
    for terms that do not fit their operator.
    """
    if profile is not None:
        profile.check(anatomy)
    measured = measure(model, anatomy, profile)
    raw: dict[str, Tensor] = {}
    for operator, names in groups(plan):
        if operator not in OPERATORS:
            raise PlanError(f"{names[0]}: no operator {operator!r}; there are {', '.join(OPERATORS)}")
        terms = {name: plan.entries[name].terms for name in names}
        for name in names:
            validate_entry(anatomy[name], plan.entries[name])
        try:
            values = OPERATORS[operator].fit([measured[name] for name in names], terms)
            _check_shapes(values, terms, anatomy)
        except TermsError as error:
            raise PlanError(f"{names[0]}: its terms are not those of {operator!r} ({error}); plan this site anew") from error
        raw |= values
    changes = {}
    for name, entry in plan.entries.items():
        one = measured[name]
        if entry.terms and one.mean is not None:
            changes[name] = (one.weight - product(entry.terms, raw, one.site)) @ one.mean * _covered(entry.terms, one)
    every_term = [term for entry in plan.entries.values() for term in entry.terms]
    routers = routers_of(every_term)
    even = {name: torch.zeros(shape.stored).double() for name, shape in plan.factors(anatomy).items() if name in routers}
    return Fitted({**store(raw, every_term), **even}, changes)


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
