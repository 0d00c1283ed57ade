"""The smallest plan of a model, as far as it is known without statistics, so that no profile is measured in vain."""

from __future__ import annotations

from torch import nn

from hpr.anatomy.model import Anatomy
from hpr.anatomy.swappable import not_swappable
from hpr.errors import BudgetError
from hpr.planning.options import PlanOptions
from hpr.planning.rows import SiteRow, rows
from hpr.plans.budget import Budget


def check_budget(model: nn.Module, anatomy: Anatomy, budget: Budget, options: PlanOptions) -> None:
    """Raise ``BudgetError`` for a budget that no plan can meet. One above this limit may still be too small.

    Plans that drop layers have no such limit.
    """
    if options.reuse or budget.parameters >= (least := least_parameters(model, anatomy, options)):
        return
    share = 100 * least / anatomy.total_parameters
    raise BudgetError(
        f"a budget of {budget.text} is {budget.parameters:,} parameters, but a plan of this model needs at least {least:,} "
        f"({share:.1f}% of all), even with rank 1 in every weight that may change. Raise the budget"
    )


def least_parameters(model: nn.Module, anatomy: Anatomy, options: PlanOptions) -> int:
    """The parameters that no plan changes, and the fewest that each row of sites can have in any combination of operators."""
    bound = not_swappable(model, anatomy)
    chosen = {site.name for site in anatomy.select(options.only) if site.name not in bound}
    kept = sum(site.parameters for site in anatomy.sites if site.name not in chosen)
    return anatomy.other_parameters + kept + sum(_fewest(row) for row in rows(model, anatomy, chosen))


def _fewest(row: SiteRow) -> int:
    """One matrix for all sites, or factors of rank 1 of which all share one. An identity block saves a number for each site."""
    count, shape = len(row.sites), (row.sites[0].out_features, row.sites[0].in_features)
    if any((site.out_features, site.in_features) != shape for site in row.sites):
        return sum(site.out_features + site.in_features - 1 for site in row.sites) // count
    out, inner = shape
    return min(out * inner, max(out, inner) + count * (min(out, inner) - 1))
