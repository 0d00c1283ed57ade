"""Choose the dampings of a rounding, and which weights become products, by what students measure."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from hpr.errors import BudgetError
from hpr.rounding.model import Rounder
from hpr.rounding.products import worthwhile
from hpr.rounding.search import Known, Rounded, Search

_log = logging.getLogger(__name__)
UPWARDS = ((0.15, 0.15), (0.3, 0.3), (1.0, 0.3), (1.0, 1.0))  # dampings of outputs and inputs; tried while they serve
DOWNWARDS = ((0.05, 0.05),)  # tried while they serve, unless more damping clearly serves better
MARGIN = 0.05  # more damping holds better on other text, so it is preferred at up to so much more divergence

Dampings = tuple[float, float]  # of outputs and of inputs
Measure = Callable[[nn.Module], float]  # the divergence of a student in nats, on data that the profile has not seen


@dataclass(frozen=True)
class Choice:
    """What was chosen. ``tried``: dampings → measured divergence in nats per example, as if at exactly the limit.

    Dampings with which the limit cannot be met are not among them.
    """

    rounder: Rounder
    rounded: Rounded
    tried: dict[Dampings, float] = field(default_factory=dict)


def choose(prepare: Callable[[Dampings], Rounder], limit: int, measure: Measure | None, products: bool) -> Choice:
    """The rounding at ``limit`` bytes that measures best; ``prepare`` gives the rounder with some dampings.

    Without ``measure`` the first dampings are taken. With ``products`` weights may become products of two factors; which ones
    and at which ranks is decided with the first dampings, since it hardly depends on them. Raises ``BudgetError`` for a limit
    that cannot be met.
    """
    known = Known()
    whole = Search(prepare(UPWARDS[0]), limit, known)
    factored = _factored(whole) if products else None
    if measure is None:
        first = whole if factored is None or not _meets(factored) else factored
        return Choice(first.rounder, first.best())
    first, loss = whole, _loss(whole, measure)
    if factored is not None and _meets(factored) and (other := _loss(factored, measure)) < loss:
        first, loss = factored, other
    tried = {UPWARDS[0]: loss}

    def attempt(dampings: Dampings) -> Search:
        made = Search(prepare(dampings).factored(first.rounder.ranks), limit, known)
        tried[dampings] = _loss(made, measure) if _meets(made) else math.inf
        return made

    best = _best(first, attempt, tried)
    return Choice(best.rounder, best.best(), {dampings: loss for dampings, loss in tried.items() if loss < math.inf})


def _best(first: Search, attempt: Callable[[Dampings], Search], tried: dict[Dampings, float]) -> Search:
    """The search with the dampings that measure best. ``attempt`` writes into ``tried``, which has the first dampings."""
    best, chosen = first, UPWARDS[0]
    for dampings in UPWARDS[1:]:
        made = attempt(dampings)
        if tried[dampings] > (1 + MARGIN) * min(tried.values()):
            break
        best, chosen = made, dampings
    no_worse = tried[UPWARDS[0]] <= (1 + MARGIN) * min(tried.values())
    for dampings in DOWNWARDS if no_worse else ():
        made = attempt(dampings)
        if tried[chosen] <= (1 + MARGIN) * tried[dampings]:
            break
        best, chosen = made, dampings
    return best


def _meets(made: Search) -> bool:
    """Whether a search comes near its limit; another one did, so it is no error if this one does not."""
    try:
        made.near()
    except BudgetError:
        return False
    return True


def _loss(made: Search, measure: Measure) -> float:
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
    """The search with some weights as products of two factors; None if that pays for none of them."""
    rounder, found = whole.rounder, whole.near()
    sites = (one for one in rounder.sites if one.read and min(one.weight.shape) > 1)
    savings = worthwhile((rounder.factoring(one) for one in sites), found.codes, found.rounding.step)
    if not savings:
        return None
    smaller = found.bytes - sum(saving.bytes for saving in savings.values())
    ranks = {name: saving.rank for name, saving in savings.items()}
    return Search(rounder.factored(ranks), whole.limit, whole.known, start=(found.rounding.step, smaller))
