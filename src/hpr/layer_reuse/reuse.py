"""Which layers are dropped or reuse attention, and how a plan says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpr.anatomy.model import Anatomy
from hpr.plans.layer_states import DROPPED, REUSED, site_layer
from hpr.plans.plan import Plan
from hpr.plans.terms import Entry, Term

Interventions = Mapping[str, Mapping[str, float]]  # layer → state → nats per example


@dataclass(frozen=True)
class Reuse:
    """States of some layers, the weights that they leave without effect, and their measured divergence in nats per example."""

    states: dict[str, str]
    dead_weights: DeadWeights
    damage: float

    def parameters(self, anatomy: Anatomy) -> int:
        """How many parameters have no effect any more."""
        sites = sum(
            anatomy[name].parameters - sum(stop - start for start, stop in runs) * anatomy[name].in_features
            for name, runs in self.dead_weights.rows.items()
        )
        return sites + sum(self.dead_weights.removed.values())


RowRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DeadWeights:
    """Weights that have no effect once layers have their states.

    ``rows``: site → ranges [start, stop) of the rows that still have an effect; empty if the whole weight has none.
    ``removed``: how many parameters besides the weights of sites go with a dropped layer (by its name), with a site (its bias,
    by the site's name), or with another module (a norm, by its path).
    """

    rows: dict[str, RowRanges]
    removed: dict[str, int]


def with_layers(plan: Plan, anatomy: Anatomy, states: Mapping[str, str], found: DeadWeights) -> Plan:
    """The plan with states of layers. Entries of weights without effect are replaced, all others stay.

    A fused projection that keeps some rows gets one term for each range: rows of the original weight.
    """
    entries = dict(plan.entries)
    for name, runs in found.rows.items():
        if states.get(site_layer(anatomy[name]) or "") == DROPPED:
            entries[name] = Entry(DROPPED)
        else:
            entries[name] = Entry(REUSED, tuple(Term(f"{name}.{start}", rows=(start, stop)) for start, stop in runs))
    return replace(plan, entries=entries, layers=dict(states), removed=dict(found.removed))
