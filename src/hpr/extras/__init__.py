"""Features beside the main way, by one import: the online learner, many tasks on one model, routers, layers that reuse."""

from __future__ import annotations

from hpr.healing.loss import Weights
from hpr.healing.online.healer import OnlineHealer
from hpr.healing.online.moments import Moments
from hpr.layer_reuse.dead_weights import dead_weights
from hpr.layer_reuse.install import with_states
from hpr.layer_reuse.reuse import with_layers
from hpr.nn.multitask import ManyHeads
from hpr.pipeline.hierarchical import HierarchicalBert
from hpr.planning.planner import draft
from hpr.plans.plan import keep_all
from hpr.routing.collapse import collapse
from hpr.routing.expected_gains import expected_gains
from hpr.routing.plan import best_routed, routed

__all__ = [
    "HierarchicalBert",
    "ManyHeads",
    "Moments",
    "OnlineHealer",
    "Weights",
    "best_routed",
    "collapse",
    "dead_weights",
    "draft",
    "expected_gains",
    "keep_all",
    "routed",
    "with_layers",
    "with_states",
]
