"""Plans for budgets in bytes: every weight is kept and rounded, and the whole plan is one step size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.model import Anatomy, Site
from hpr.coding.codes import parts_of
from hpr.coding.stream import encode
from hpr.errors import PlanError
from hpr.nn.coded import in_pack
from hpr.operators.low_rank import NAME as LOW_RANK
from hpr.operators.metric import metric_of
from hpr.plans.budget import Budget
from hpr.plans.plan import Plan, keep_all
from hpr.plans.terms import KEEP, Entry, Term
from hpr.profiling.profile import Profile
from hpr.rounding.choice import choose
from hpr.rounding.limit import Limit
from hpr.rounding.model import Rounder
from hpr.rounding.search import Rounded, coded, round_to
from hpr.runtime.progress import progress

_log = logging.getLogger(__name__)


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
    bits: int | None = None,
) -> CodedPlan:
    """The plan of a model at ``limit`` bytes; ``budget`` is what the user wrote.

    ``measure`` gives the divergence of a student in nats, on data that the profile has not seen: with it the dampings are
    chosen, and whether some weights become products. Small models at few bits want more damping. ``bits``: 8 or 4 keep the
    codes in the range of such integers; no weight is a product then. Raises ``BudgetError`` for a budget that cannot be met.
    """
    chosen = choose(lambda dampings: Rounder(model, profile, *dampings, bits), limit, measure, products=bits is None)
    rounder, rounded = chosen.rounder, chosen.rounded
    if unread := [whitened.site.label for whitened in rounder.sites if not whitened.read]:
        _log.info("the objective does not read %s: about 3 bits a number, whatever the budget", ", ".join(unread))
    student = rounder.student(rounded.codes, rounded.others, rounded.coded)
    return CodedPlan(_plan(rounder, rounded, budget), student, int(rounded.bytes), chosen.tried)


def round_model(model: nn.Module, plan: Plan, profile: Profile) -> nn.Module:
    """The model that a plan with a rounding describes. Raises ``PlanError`` for another model's plan."""
    if plan.rounding is None:
        raise PlanError("the plan has no rounding: make one with a budget in bytes, such as 8MB")
    plan.validate(describe(model))
    how = plan.rounding
    rounder = Rounder(model, profile, how.output_damping, how.input_damping, how.bits)
    rounder = rounder.factored({name: rank for name, entry in plan.entries.items() for rank in _ranks(entry)})
    rounded = coded(rounder, round_to(rounder, how.step))
    return rounder.student(rounded.codes, rounded.others, rounded.coded)


def _plan(rounder: Rounder, rounded: Rounded, budget: str) -> Plan:
    assert rounded.coded is not None
    anatomy = describe(rounder.model)
    plan = keep_all(anatomy)
    entries, bits, limit = {}, {}, Limit(*rounder.dampings)
    for whitened in rounder.sites:
        site = whitened.site
        stream = rounded.coded[site.name].stream
        metric = metric_of(site, rounder.profile, whitened.weight).of(site, whitened.weight)
        codes = rounded.codes[site.name]
        change = codes.weight().to(whitened.weight) - whitened.weight
        damage = metric.damage(change) if metric.has_gradient else 0.0
        entries[site.name] = _entry(site, rounder.ranks.get(site.name), damage)
        bits[site.name] = round(8 * len(stream) / site.parameters, 3)
        limit.add(site.kind, rounder.profile.sites[site.name], whitened.weight, change)
        progress("checking", len(entries), len(rounder.sites))
    above = limit.decibels(8 * _code_bytes(anatomy, rounder, rounded))
    diagnostics = {
        "solver": "coded rounding",
        "bytes": int(rounded.bytes),
        "bits": bits,
        **({} if above is None else {"decibels": round(above, 2)}),
    }
    return replace(
        plan,
        budget=Budget(budget, anatomy.total_parameters),
        entries=entries,
        diagnostics=diagnostics,
        rounding=rounded.rounding,
    )


def _entry(site: Site, rank: int | None, damage: float) -> Entry:
    if rank is None:
        return Entry(KEEP, damage=damage)
    return Entry(LOW_RANK, (Term(f"{site.name}.u", f"{site.name}.v", rank),), damage)


def _ranks(entry: Entry) -> list[int]:
    return [term.rank for term in entry.terms if term.rank is not None]


def _code_bytes(anatomy: Anatomy, rounder: Rounder, rounded: Rounded) -> int:
    """The bytes of all codes that the objective reads; small weights lie together in one stream."""
    assert rounded.coded is not None
    read = [whitened.site.name for whitened in rounder.sites if whitened.read]
    small = [name for name in read if in_pack(anatomy[name].parameters)]
    parts = [part for name in small for part in parts_of(rounded.codes[name])]
    large = sum(len(rounded.coded[name].stream) for name in read if name not in small)
    return large + (len(encode(parts)) if parts else 0)
