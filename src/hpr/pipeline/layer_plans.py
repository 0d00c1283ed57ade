"""Plans that drop layers, or let them reuse attention: what the layers cost is measured, and the rest is planned."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from hpr.errors import BudgetError
from hpr.layer_reuse.ablation import drops, reuses
from hpr.layer_reuse.install import with_states
from hpr.layer_reuse.reuse import Interventions, Reuse
from hpr.planning.draft import Draft, Proposal
from hpr.plans.budget import Budget
from hpr.plans.layer_states import site_layer
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
) -> list[Proposal]:
    """Plans that drop layers or reuse attention, if their damage is close to that of the best plan without. At most two.

    The damage of such a plan is the measured divergence of its layers together, plus the predicted damage of the rest.
    ``profile.interventions`` must hold the divergence of each layer by itself (``layer_reuse.ablation.intervene``). If no plan
    without is as fast as the draft's dial asks, the best plans are returned.
    """
    chosen = set(candidates.anatomy.select(candidates.only))
    outside = {site_layer(site) for site in candidates.anatomy.sites if site not in chosen}
    layers = {name: damages for name, damages in profile.interventions.items() if name not in outside}
    try:
        best = candidates.propose(budget)
    except BudgetError:
        if candidates.dial is None:
            raise
        best = None
    proposals = []
    for reuse, beside in _sets(model, layers, candidates, best, batches, objective):
        try:
            proposals.append(candidates.reusing(reuse, beside).propose(budget))
        except BudgetError:
            _log.info("with %s the budget %s cannot be met", reuse.states, budget.text)
    near = [one for one in proposals if best is None or one.plan.damage < REUSE_MARGIN * best.plan.damage]
    return sorted(near, key=lambda proposal: proposal.plan.damage)[:MOST]


def _sets(
    model: nn.Module,
    layers: Interventions,
    candidates: Draft,
    best: Proposal | None,
    batches: Sequence[Batch],
    objective: Objective,
) -> Iterator[tuple[Reuse, float | None]]:
    """Sets of layers with states, and what a call then costs beside the sites, if a dial limits that.

    With a dial, sets of dropped layers come too, up to the first that is as fast as asked with all other weights whole.
    """
    dial = candidates.dial

    def beside(states: Mapping[str, str]) -> float | None:
        return None if dial is None else dial.costs.beside(with_states(model, states))

    def worth(reuse: Reuse) -> float:
        assert best is not None
        saved = best.multiplier * reuse.parameters(candidates.anatomy)
        return saved + best.price * dial.saved(reuse, beside(reuse.states)) if dial is not None and best.price else saved

    seen = []
    if best is not None:
        for reuse in reuses(model, layers, batches, objective, worth):
            seen.append(reuse.states)
            yield reuse, beside(reuse.states)
    for reuse in drops(model, layers, batches, objective) if dial is not None else ():
        around = beside(reuse.states)
        if reuse.states not in seen:
            yield reuse, around
        if dial is not None and dial.saved(reuse, around) >= dial.costs.total - dial.allowed:
            return
