"""The dial of speed: what every candidate costs in one call, and how much all of them together may cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hpr.anatomy.model import Anatomy, Site
from hpr.anatomy.swappable import not_swappable
from hpr.errors import BudgetError
from hpr.operators.registry import OPERATORS
from hpr.planning.options import PlanOptions
from hpr.plans.layer_states import DROPPED, REUSED, site_layer
from hpr.plans.plan import Plan
from hpr.plans.terms import Entry, Term
from hpr.runtime.batch import Batch
from hpr.solver.candidates import Candidate, Track
from hpr.solver.composite import mapped
from hpr.timing.target import LATENCY, Target

if TYPE_CHECKING:
    from hpr.layer_reuse.reuse import Reuse
    from hpr.timing.costs import Costs


@dataclass(frozen=True, eq=False)
class Dial:
    """What a user asks of speed, and what every weight of the model costs.

    >>> Dial(Target("flops", "0.7x", "1x128"), costs).allowed  # doctest: +SKIP
    2008439234.0
    """

    target: Target
    costs: Costs

    @property
    def allowed(self) -> float:
        """The most that a call may cost, in the unit of the costs."""
        return self.target.share * self.costs.total

    def priced(self, tracks: Sequence[Track], anatomy: Anatomy) -> tuple[Track, ...]:
        """The tracks with the cost of every point of every candidate."""

        def change(candidate: Candidate) -> Candidate:
            return replace(candidate, costs=np.array([self._cost(candidate, ranks, anatomy) for ranks in candidate.choices]))

        return mapped(tracks, change)

    def ceiling(self, fixed: Iterable[Site], outside: float | None, rows: Mapping[str, Sequence[tuple[int, int]]]) -> float:
        """What is left for the planned sites. ``fixed`` sites are whole, of others some ``rows`` are left (by name).

        ``outside``: what is no product with a site's weight, if layers have states.
        """
        taken = self.costs.outside if outside is None else outside
        taken += sum(self.costs.of(site.name, ()) for site in fixed)
        taken += sum(self.costs.of(name, [Term("u", rows=run) for run in runs]) for name, runs in rows.items() if runs)
        return self.allowed - taken

    def saved(self, reuse: Reuse, outside: float | None) -> float:
        """What a set of layers with states saves of a call's cost. ``outside``: as for ``ceiling``."""
        rows = reuse.dead_weights.rows
        before = self.costs.outside + sum(self.costs.of(name, ()) for name in rows)
        left = sum(self.costs.of(name, [Term("u", rows=run) for run in runs]) for name, runs in rows.items() if runs)
        return before - (self.costs.outside if outside is None else outside) - left

    def share(self, plan: Plan, outside: float | None = None) -> float:
        """The share of the original's cost that a plan is predicted to have."""
        gone = [name for name, entry in plan.entries.items() if entry.operator == DROPPED or (plan.layers and _is_dead(entry))]
        return self.costs.predicted(plan.entries, gone, outside)

    def described(self, plan: Plan, outside: float | None = None) -> dict[str, Any]:
        """What the plan's diagnostics say, under the kind of the target."""
        shape = {"shape": self.target.shape, "positions": self.costs.positions}
        predicted = {"target": self.target.share, "predicted": self.share(plan, outside)}
        return {self.target.kind: {"text": self.target.text, **predicted, **shape}}

    def impossible(self, least: float, why: str) -> BudgetError:
        """The error for a target that cannot be met; ``least``: the least possible cost."""
        share = least / self.costs.total
        possible = f"{np.ceil(100 * share) / 100:.2f}x"
        mend = f"give --{self.target.kind} {possible} or more" if share < 1 else f"leave --{self.target.kind} out"
        return BudgetError(f"{self.target.kind} is {self.target.text} at {self.target.shape}, but {why} {possible}: {mend}")

    def _cost(self, candidate: Candidate, ranks: tuple[int, ...], anatomy: Anatomy) -> float:
        if candidate.rows is not None:
            rank = ranks[0] if ranks else None
            return self.costs.of(candidate.sites[0], [Term("u", None if rank is None else "v", rank, rows=candidate.rows)])
        terms = OPERATORS[candidate.operator].terms([anatomy[name] for name in candidate.sites], ranks)
        return sum(self.costs.of(name, site_terms) for name, site_terms in terms.items())


def _is_dead(entry: Entry) -> bool:
    """Whether nothing is left of a site whose layer reuses attention."""
    return entry.operator == REUSED and not entry.terms


def measured_dial(model: nn.Module, anatomy: Anatomy, options: PlanOptions, given: Batch | None = None) -> Dial | None:
    """The dial that the options ask for, None if they ask for none. It measures for some seconds.

    ``given``: a batch of the user's data, for models that do not read token ids. Raises as ``timing.call.call_batch``.
    """
    if (target := options.target) is None:
        return None
    from hpr.timing.call import call_batch
    from hpr.timing.clock import measured_costs
    from hpr.timing.operations import counted_costs

    batch = call_batch(model, target, given)
    return Dial(target, (measured_costs if target.kind == LATENCY else counted_costs)(model, anatomy, batch))


def check_dial(model: nn.Module, anatomy: Anatomy, dial: Dial, options: PlanOptions) -> None:
    """Raise ``BudgetError`` for a target that no plan can meet. One above this limit may still be too low.

    All layers that can be dropped are, and all other weights that may change have the rank 1 or stay whole.
    """
    from hpr.layer_reuse.install import droppable, with_states  # an optional feature

    bound = not_swappable(model, anatomy)
    chosen = {site.name for site in anatomy.select(options.only) if site.name not in bound}
    kept = {site_layer(site) for site in anatomy.sites if site.name not in chosen}
    states = {layer: DROPPED for layer, reason in droppable(model, anatomy).items() if reason is None and layer not in kept}
    gone = [site.name for site in anatomy.sites if site_layer(site) in states]
    outside = dial.costs.beside(with_states(model, states)) if states else dial.costs.outside
    sites = {name: cost for name, cost in dial.costs.sites.items() if name not in gone}
    least = outside + sum(cost.least if name in chosen else cost.dense for name, cost in sites.items())
    if dial.allowed < least:
        dropped = f" and without {len(states)} layers" if states else ""
        raise dial.impossible(least, f"with rank 1 in every weight that may change{dropped} it is")
