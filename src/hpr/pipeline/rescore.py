"""What needs a model and several steps: profile, refit, re-score, and plans in which layers reuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import nn

from hpr.errors import BudgetError
from hpr.evaluation.divergence import Comparison, compare
from hpr.planning.draft import Draft
from hpr.plans.budget import Budget
from hpr.plans.layer_states import site_layer
from hpr.plans.plan import Plan
from hpr.profiling.objectives import Objective
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch, BatchLike
from hpr.runtime.progress import progress
from hpr.sharing.share import share

REUSE_MARGIN = 1.2  # of the best predicted damage without reuse: up to that, plans with reuse are worth measuring


def rescore(
    model: nn.Module,
    profile: Profile,
    plans: Sequence[Plan],
    batches: Sequence[BatchLike],
    objective: Objective,
) -> list[Comparison]:
    """Every plan beside the model, its true divergence in nats per example foremost: each is shared, run and dropped."""
    return [found for _, found in students(model, profile, plans, batches, objective)]


def students(
    model: nn.Module,
    profile: Profile,
    plans: Sequence[Plan],
    batches: Sequence[BatchLike],
    objective: Objective,
) -> Iterator[tuple[nn.Module, Comparison]]:
    """Each plan in turn: the student that it gives, and that one beside the model."""
    for index, plan in enumerate(plans):
        student = share(model, plan, profile)
        yield student, compare(student, model, batches, objective)
        progress("re-score", index + 1, len(plans))


def reusing_plans(
    model: nn.Module,
    profile: Profile,
    sketch: Draft,
    budget: Budget,
    batches: Sequence[Batch],
    objective: Objective,
) -> list[Plan]:
    """Plans in which layers are dropped or reuse attention, where they promise to be no worse than the best without.

    Their damage is the measured one of the layers together plus what is predicted for the rest. At most two, the best first.
    """
    from hpr.layer_reuse.ablation import reuses  # an optional feature, loaded if asked for

    proposal = sketch.propose(budget)
    best = proposal.plan
    chosen = set(sketch.anatomy.select(sketch.only))
    outside = {site_layer(site) for site in sketch.anatomy.sites if site not in chosen}
    layers = {name: damages for name, damages in profile.interventions.items() if name not in outside}
    found = []
    for reuse in reuses(model, layers, batches, objective, proposal.multiplier):
        with suppress(BudgetError):  # what is left cannot meet the budget
            found.append(sketch.reusing(reuse).best(budget))
    return sorted((plan for plan in found if plan.damage < REUSE_MARGIN * best.damage), key=lambda plan: plan.damage)[:2]
