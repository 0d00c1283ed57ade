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
from hpr.rounding.limit import Limit
from hpr.rounding.model import Rounder
from hpr.rounding.products import worthwhile
from hpr.rounding.search import Known, Rounded, Search, coded, round_to
from hpr.runtime.progress import progress

_log = logging.getLogger(__name__)
UPWARDS = ((0.15, 0.15), (0.3, 0.3), (1.0, 0.3), (1.0, 1.0))  # dampings of outputs and inputs; tried while they serve
DOWNWARDS = ((0.05, 0.05),)  # tried while they serve, unless more damping clearly serves better
MARGIN = 0.05  # more damping holds better on other text, so it is preferred at up to so much more divergence


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
    codes in the range of such integers; no weight is a product then. Raises ``BudgetError`` for a budget that cannot be met,
    and ``PlanError`` for a model with experts that are slices of one parameter.
    """
    known = Known()
    tried: dict[tuple[float, float], float] = {}
    whole = Search(Rounder(model, profile, *UPWARDS[0], bits), limit, known)
    factored = _factored(whole)
    if measure is None:
        chosen = factored or whole
    else:
        losses = {id(each): _loss(each, measure) for each in (whole, factored) if each is not None}
        first = factored if factored is not None and losses[id(factored)] < losses[id(whole)] else whole

        def search(dampings: tuple[float, float]) -> Search:
            return Search(Rounder(model, profile, *dampings, bits).factored(first.rounder.ranks), limit, known)

        tried[UPWARDS[0]] = losses[id(first)]
        chosen = _chosen(first, search, measure, tried)
    rounder, rounded = chosen.rounder, chosen.best()
    if unread := [whitened.site.label for whitened in rounder.sites if not whitened.read]:
        _log.info("the objective does not read %s: about 3 bits a number, whatever the budget", ", ".join(unread))
    student = rounder.student(rounded.codes, rounded.others, rounded.coded)
    return CodedPlan(_plan(rounder, rounded, budget), student, int(rounded.bytes), tried)


def _chosen(
    first: Search,
    search: Callable[[tuple[float, float]], Search],
    measure: Callable[[nn.Module], float],
    tried: dict[tuple[float, float], float],
) -> Search:
    """The search with the dampings that measure best; ``tried`` receives the divergence that was measured with each.

    ``first``: that with the first dampings, which ``tried`` knows.
    """
    best, chosen = first, UPWARDS[0]
    for dampings in UPWARDS[1:]:
        made = search(dampings)
        tried[dampings] = _loss(made, measure)
        if tried[dampings] > (1 + MARGIN) * min(tried.values()):
            break
        best, chosen = made, dampings
    no_worse = tried[UPWARDS[0]] <= (1 + MARGIN) * min(tried.values())
    for dampings in DOWNWARDS if no_worse else ():
        made = search(dampings)
        tried[dampings] = _loss(made, measure)
        if tried[chosen] <= (1 + MARGIN) * tried[dampings]:
            break
        best, chosen = made, dampings
    return best


def _loss(made: Search, measure: Callable[[nn.Module], float]) -> float:
    """The divergence of a search's model in nats, as if it had exactly the bytes of the budget."""
    rounder, rounded = made.rounder, made.near()
    measured = measure(rounder.student(rounded.codes, rounded.others))
    _log.info(
        "dampings %g, %g, %d products, at %.3f MB: divergence %.4g nats",
        *rounder.dampings,
        len(rounder.ranks),
        rounded.bytes / 1e6,
        measured,
    )
    return measured * made.step_over(rounded) ** 2


def _factored(whole: Search) -> Search | None:
    """The search with some weights as products of two factors; None if that pays for none of them, or codes have a range."""
    rounder, found = whole.rounder, whole.near()
    if rounder.bits is not None:
        return None
    sites = (one for one in rounder.sites if one.read and min(one.weight.shape) > 1)
    savings = worthwhile((rounder.factoring(one) for one in sites), found.codes, found.rounding.step)
    if not savings:
        return None
    smaller = found.bytes - sum(saving.bytes for saving in savings.values())
    ranks = {name: saving.rank for name, saving in savings.items()}
    return Search(rounder.factored(ranks), whole.limit, whole.known, start=(found.rounding.step, smaller))


def round_model(model: nn.Module, plan: Plan, profile: Profile | None) -> nn.Module:
    """The model that a plan with a rounding describes. Raises ``PlanError`` without a profile, or for another model's plan."""
    if plan.rounding is None:
        raise PlanError("the plan has no rounding: make one with a budget in bytes, such as 8MB")
    if profile is None:
        raise PlanError("a plan for a budget in bytes rounds in the metric of the profile: give the profile it was made with")
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
