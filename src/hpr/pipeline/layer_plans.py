"""Plans that drop layers, or let them reuse attention: what the layers cost is measured, and the rest is planned."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from hpr.errors import BudgetError
from hpr.layer_reuse.ablation import reuses
from hpr.planning.draft import Draft
from hpr.plans.budget import Budget
from hpr.plans.layer_states import site_layer
from hpr.plans.plan import Plan
from hpr.profiling.objectives import Objective
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch

REUSE_MARGIN = 1.2  # a plan with reuse is worth running if its damage is below this multiple of the best without
MOST = 2  # plans with reuse that are run end to end

_log = logging.getLogger(__name__)


def reusing_plans(
    model: nn.Module,
    profile: Profile,
    candidates: Draft,
    budget: Budget,
    batches: Sequence[Batch],
    objective: Objective,
) -> list[Plan]:
    """Plans that drop layers or reuse attention, if their damage is close to that of the best plan without. At most two.

    The damage of such a plan is the measured divergence of its layers together, plus the predicted damage of the rest.
    ``profile.interventions`` must hold the divergence of each layer by itself (``layer_reuse.ablation.intervene``).
    """
    best = candidates.propose(budget)
    chosen = set(candidates.anatomy.select(candidates.only))
    outside = {site_layer(site) for site in candidates.anatomy.sites if site not in chosen}
    layers = {name: damages for name, damages in profile.interventions.items() if name not in outside}
    plans = []
    for reuse in reuses(model, layers, batches, objective, best.multiplier):
        try:
            plans.append(candidates.reusing(reuse).best(budget))
        except BudgetError:
            _log.info("with %s the budget %s cannot be met", reuse.states, budget.text)
    worth_running = [plan for plan in plans if plan.damage < REUSE_MARGIN * best.plan.damage]
    return sorted(worth_running, key=lambda plan: plan.damage)[:MOST]
