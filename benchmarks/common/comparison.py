"""One comparison for every pretrained model: HPR and published methods at the same share of the same weights.

All see the same profile; ours chooses between its plans, and whether to refit, on a part of the calibration data that was not
profiled, as ``hpr.compress`` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import hpr
from common import peers
from common.tables import count
from hpr.anatomy.describe import describe
from hpr.anatomy.model import Anatomy, Site
from hpr.data.batches import first_batches
from hpr.data.splits import Splits
from hpr.evaluation.divergence import compare
from hpr.pipeline.compress import REFITTED
from hpr.pipeline.rescore import rescore
from hpr.planning import planner
from hpr.planning.draft import Draft
from hpr.planning.options import PlanOptions
from hpr.plans.plan import Plan
from hpr.profiling.objectives import Objective
from hpr.profiling.profile import Profile

PLANS = 4


@dataclass(frozen=True)
class Made:
    """A compressed model: ``parameters`` are those kept of the selected weights; ``plan`` where it is ours, before a refit."""

    method: str
    student: nn.Module
    parameters: int
    plan: Plan | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ground:
    """What all methods stand on: the model, data, profile, candidates, and which weights may be changed."""

    model: nn.Module
    data: Splits
    goal: Objective
    profile: Profile
    draft: Draft
    sites: tuple[Site, ...]

    @property
    def dense(self) -> int:
        """Parameters of the selected weights."""
        return sum(site.parameters for site in self.sites)


def ground(model: nn.Module, data: Splits, goal: Objective, only: str) -> Ground:
    """Profile a model and measure its candidates, once for all budgets."""
    profile = hpr.profile(model, data.calibration, goal.name)
    draft = planner.draft(model, profile, PlanOptions(only=only))
    return Ground(model, data, goal, profile, draft, describe(model).select(only))


def students(on: Ground, share: float) -> Iterator[Made]:
    """Ours with and without refit, then the peers, each at ``share`` of the selected weights."""
    yield from ours(on, share)
    for name in ("svd_llm", "basis_sharing"):
        student, parameters = getattr(peers, name)(on.model, on.sites, on.profile, share)
        yield Made(f"peer: {name}", student, parameters)


def ours(on: Ground, share: float) -> Iterator[Made]:
    """The plan that measures best on the re-scoring data, and the same refitted, unless it drops layers."""
    limit = on.draft.budget(f"{share:.0%}")
    plans = on.draft.alternatives(limit, PLANS)
    scores = rescore(on.model, on.profile, plans, on.data.rescoring, on.goal)
    best = min(range(len(plans)), key=lambda index: scores[index].divergence.mean)
    plan, before = plans[best], scores[best].divergence.mean
    facts = {"label": plan.diagnostics["label"], "operators": count(plan), "predicted": plan.damage, "measured": before}
    kept = on.dense - (on.draft.anatomy.total_parameters - plan.parameters(on.draft.anatomy))
    student = hpr.share(on.model, plan, on.profile)
    yield Made("hpr, no refit", student, kept, plan, facts)
    if plan.layers:
        return
    student = hpr.share(on.model, plan, on.profile)
    hpr.refit(student, on.model, first_batches(on.data.calibration, REFITTED), plan, on.profile)
    after = compare(student, on.model, on.data.rescoring, on.goal).divergence.mean
    yield Made("hpr, refit", student, kept, facts={"measured": after, "chosen": after < before})


def dropped(on: Ground, share: float) -> Iterator[Made]:
    """Layers left out one by one, each of least text loss by then: the last model above a budget, and the first within."""
    (stack,) = on.draft.anatomy.stacks
    each = {layer: sum(site.parameters for site in on.sites if site.layer == layer) for layer in range(stack.layers)}
    gone: list[int] = []
    limit = math.floor(share * on.dense)
    while (kept := on.dense - sum(each[layer] for layer in gone)) > limit:
        smaller = min(set(each) - set(gone), key=lambda layer: _loss_without(on, [*gone, layer], stack.path))
        within = kept - each[smaller] <= limit
        if within and gone:
            yield Made("peer: drop_layers, above", peers.drop_layers(on.model, gone, stack.path), kept, facts={"dropped": gone})
        gone = [*gone, smaller]
        if within:
            student = peers.drop_layers(on.model, gone, stack.path)
            yield Made("peer: drop_layers, within", student, kept - each[smaller], facts={"dropped": gone})


def _loss_without(on: Ground, layers: list[int], path: str) -> float:
    """Nats per token of the re-scoring text without some layers."""
    loss = compare(peers.drop_layers(on.model, layers, path), on.model, on.data.rescoring, on.goal).student_loss
    assert loss is not None
    return loss


def spanning(plan: Plan, anatomy: Anatomy) -> list[tuple[str, ...]]:
    """Groups of a plan whose sites are of more than one stack."""
    return [names for names in plan.groups() if len({anatomy[name].stack for name in names}) > 1]
