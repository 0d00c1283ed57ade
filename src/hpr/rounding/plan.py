"""Plans for budgets in bytes: every weight is kept and rounded, and the whole plan is one step size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hpr.anatomy.describe import describe
from hpr.coding.record import Coded
from hpr.errors import PlanError
from hpr.evaluation.cost import bytes_beside_streams
from hpr.operators.metric import metric_of
from hpr.plans.budget import Budget
from hpr.plans.plan import Plan, keep_all
from hpr.profiling.profile import Profile
from hpr.rounding.model import Rounder
from hpr.rounding.search import Rounded, round_to_bytes

_log = logging.getLogger(__name__)
DAMPINGS = (0.05, 0.15, 0.3)  # that are tried where a divergence can be measured
DAMPING = 0.15  # without a measurement


@dataclass(frozen=True)
class CodedPlan:
    """A plan, the model that it gives, and the bytes that its file will have; ``tried``: damping → measured divergence."""

    plan: Plan
    student: nn.Module
    bytes: int
    tried: dict[float, float]


def plan_bytes(
    model: nn.Module,
    profile: Profile,
    budget: str,
    limit: int,
    measure: Callable[[nn.Module], float] | None = None,
    dampings: Sequence[float] = DAMPINGS,
) -> CodedPlan:
    """The plan of a model at ``limit`` bytes; ``budget`` is what the user wrote.

    ``measure`` gives the divergence of a student in nats, on data that the profile has not seen: with it the damping is
    chosen among ``dampings``. Raises ``BudgetError`` for a budget that cannot be met, and ``PlanError`` for a model with
    experts that are slices of one parameter.
    """
    best: tuple[float, Rounder, Rounded] | None = None
    tried: dict[float, float] = {}
    step = None
    beside = bytes_beside_streams(model, [site.name for site in describe(model).sites], limit)
    for damping in dampings if measure else (DAMPING,):
        rounder = Rounder(model, profile, damping, damping)
        rounded = round_to_bytes(rounder, limit, beside, step)
        step = rounded.rounding.step
        score = measure(rounder.student(rounded.coded)) if measure else 0.0
        tried[damping] = score
        _log.info("damping %.2g at %.3f MB: divergence %.4g nats", damping, rounded.bytes / 1e6, score)
        if best is None or score < best[0]:
            best = (score, rounder, rounded)
    assert best is not None  # there is at least one damping
    _, rounder, rounded = best
    plan = _plan(rounder, rounded, budget)
    return CodedPlan(plan, rounder.student(rounded.coded), rounded.bytes, tried if measure else {})


def round_model(model: nn.Module, plan: Plan, profile: Profile | None) -> nn.Module:
    """The model that a plan with a rounding describes. Raises ``PlanError`` without a profile, or for another model's plan."""
    if plan.rounding is None:
        raise PlanError("the plan has no rounding: make one with a budget in bytes, such as 8MB")
    if profile is None:
        raise PlanError("a plan for a budget in bytes rounds in the metric of the profile: give the profile it was made with")
    plan.validate(describe(model))
    rounder = Rounder(model, profile, plan.rounding.output_damping, plan.rounding.input_damping)
    codes = rounder.codes(plan.rounding.step)
    return rounder.student({name: Coded.of(one) for name, one in codes.items()})


def _plan(rounder: Rounder, rounded: Rounded, budget: str) -> Plan:
    anatomy = describe(rounder.model)
    plan = keep_all(anatomy)
    entries, bits = {}, {}
    for whitened in rounder.sites:
        site = whitened.site
        coded = rounded.coded[site.name]
        metric = metric_of(site, rounder.profile, whitened.weight).of(site, whitened.weight)
        change = coded.weight().to(whitened.weight) - whitened.weight
        entries[site.name] = replace(plan.entries[site.name], damage=metric.damage(change) if metric.has_gradient else 0.0)
        bits[site.name] = round(8 * len(coded.stream) / site.parameters, 3)
    diagnostics = {"solver": "coded rounding", "bytes": rounded.bytes, "bits": bits}
    return replace(
        plan,
        budget=Budget(budget, anatomy.total_parameters),
        entries=entries,
        diagnostics=diagnostics,
        rounding=rounded.rounding,
    )
