"""Plans for budgets in bytes: every weight is kept and rounded, and the whole plan is one step size."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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
UPWARDS = ((0.15, 0.15), (0.3, 0.3), (1.0, 0.3), (1.0, 1.0))  # dampings of outputs and inputs; tried while they serve
DOWNWARDS = ((0.05, 0.05),)  # tried while they serve, unless more damping clearly serves better
MARGIN = 0.05  # more damping holds better on other text, so it is preferred at up to so much more divergence


@dataclass(frozen=True)
class _Attempt:
    rounder: Rounder
    rounded: Rounded
    student: nn.Module
    score: float


@dataclass(frozen=True)
class CodedPlan:
    """A plan, the model that it gives, and the bytes that its file will have.

    ``tried``: dampings of outputs and inputs → measured divergence in nats per example.
    """

    plan: Plan
    student: nn.Module
    bytes: int
    tried: dict[tuple[float, float], float]


def plan_bytes(
    model: nn.Module,
    profile: Profile,
    budget: str,
    limit: int,
    measure: Callable[[nn.Module], float] | None = None,
) -> CodedPlan:
    """The plan of a model at ``limit`` bytes; ``budget`` is what the user wrote.

    ``measure`` gives the divergence of a student in nats, on data that the profile has not seen: with it the dampings are
    chosen. Small models at few bits want more damping. Raises ``BudgetError`` for a budget that cannot be met, and
    ``PlanError`` for a model with experts that are slices of one parameter.
    """
    beside = bytes_beside_streams(model, [site.name for site in describe(model).sites], limit)

    def attempt(dampings: tuple[float, float], step: float | None) -> _Attempt:
        rounder = Rounder(model, profile, *dampings)
        rounded = round_to_bytes(rounder, limit, beside, step)
        student = rounder.student(rounded.coded)
        score = measure(student) if measure else math.nan
        if measure:
            _log.info("dampings %g, %g at %.3f MB: divergence %.4g nats", *dampings, rounded.bytes / 1e6, score)
        return _Attempt(rounder, rounded, student, score)

    best = first = attempt(UPWARDS[0], None)
    if unread := [whitened.site.label for whitened in first.rounder.sites if not whitened.read]:
        _log.info("the objective does not read %s: about 3 bits a number, whatever the budget", ", ".join(unread))
    tried = {UPWARDS[0]: first.score}
    for dampings in UPWARDS[1:] if measure else ():
        made = attempt(dampings, best.rounded.rounding.step)
        tried[dampings] = made.score
        if made.score > (1 + MARGIN) * min(tried.values()):
            break
        best = made
    no_worse = measure and first.score <= (1 + MARGIN) * min(tried.values())
    for dampings in DOWNWARDS if no_worse else ():
        made = attempt(dampings, best.rounded.rounding.step)
        tried[dampings] = made.score
        if best.score <= (1 + MARGIN) * made.score:
            break
        best = made
    plan = _plan(best.rounder, best.rounded, budget)
    return CodedPlan(plan, best.student, best.rounded.bytes, tried if measure else {})


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
