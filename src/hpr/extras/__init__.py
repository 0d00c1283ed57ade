"""Optional features by one import: the online learner, many tasks on one model, layers that reuse, routers, weights
kept as integers.

Python imports each name when a program first uses it, so a program that uses one feature imports no other.

>>> from hpr.extras import OnlineHealer, draft
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpr.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from hpr.data.sources import Columns, Mixture
    from hpr.healing.loss import Weights
    from hpr.healing.online.healer import OnlineHealer
    from hpr.healing.online.moments import Moments
    from hpr.layer_reuse.dead_weights import dead_weights
    from hpr.layer_reuse.install import with_states
    from hpr.layer_reuse.reuse import with_layers
    from hpr.nn.integers import keep_integers
    from hpr.nn.multitask import ManyHeads
    from hpr.pipeline.hierarchical import HierarchicalBert
    from hpr.planning.planner import draft
    from hpr.plans.plan import keep_all
    from hpr.routing.collapse import collapse
    from hpr.routing.expected_gains import expected_gains
    from hpr.routing.plan import best_routed, routed
    from hpr.runtime.progress import reporting_to

__all__ = [
    "Columns",
    "HierarchicalBert",
    "ManyHeads",
    "Mixture",
    "Moments",
    "OnlineHealer",
    "Weights",
    "best_routed",
    "collapse",
    "dead_weights",
    "draft",
    "expected_gains",
    "keep_all",
    "keep_integers",
    "reporting_to",
    "routed",
    "with_layers",
    "with_states",
]

_HOMES = {
    "Columns": "hpr.data.sources",
    "HierarchicalBert": "hpr.pipeline.hierarchical",
    "ManyHeads": "hpr.nn.multitask",
    "Mixture": "hpr.data.sources",
    "Moments": "hpr.healing.online.moments",
    "OnlineHealer": "hpr.healing.online.healer",
    "Weights": "hpr.healing.loss",
    "best_routed": "hpr.routing.plan",
    "collapse": "hpr.routing.collapse",
    "dead_weights": "hpr.layer_reuse.dead_weights",
    "draft": "hpr.planning.planner",
    "expected_gains": "hpr.routing.expected_gains",
    "keep_all": "hpr.plans.plan",
    "keep_integers": "hpr.nn.integers",
    "reporting_to": "hpr.runtime.progress",
    "routed": "hpr.routing.plan",
    "with_layers": "hpr.layer_reuse.reuse",
    "with_states": "hpr.layer_reuse.install",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
