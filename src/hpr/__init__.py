"""HPR, Hierarchical Parameter Reuse: make a pretrained Transformer smaller by letting its layers share parameters.

``import hpr`` lets transformers load compressed checkpoints. Python imports every other part when a program first uses its
name, so a program that only loads a model imports little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpr.checkpoints import quantizer  # noqa: F401  its import registers HPR with transformers
from hpr.errors import HprError
from hpr.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from hpr import extras
    from hpr.checkpoints.load import load
    from hpr.checkpoints.open import open_model
    from hpr.checkpoints.save import save
    from hpr.healing.recipe import Recipe
    from hpr.pipeline.compress import compress
    from hpr.pipeline.hierarchical import HierarchicalModel
    from hpr.pipeline.steps import describe, evaluate, heal, plan, profile, refit, share
    from hpr.planning import presets
    from hpr.planning.options import PlanOptions
    from hpr.plans.plan import Plan
    from hpr.profiling.profile import Profile
    from hpr.sharing.fold import fold
    from hpr.sharing.materialise import materialise
    from hpr.sharing.unshare import unshare

__version__ = "0.1.0"

__all__ = [
    "HierarchicalModel",
    "HprError",
    "Plan",
    "PlanOptions",
    "Profile",
    "Recipe",
    "compress",
    "describe",
    "evaluate",
    "extras",
    "fold",
    "heal",
    "load",
    "materialise",
    "open_model",
    "plan",
    "presets",
    "profile",
    "refit",
    "save",
    "share",
    "unshare",
]

_HOMES = {
    "HierarchicalModel": "hpr.pipeline.hierarchical",
    "Plan": "hpr.plans.plan",
    "PlanOptions": "hpr.planning.options",
    "Profile": "hpr.profiling.profile",
    "Recipe": "hpr.healing.recipe",
    "compress": "hpr.pipeline.compress",
    "describe": "hpr.pipeline.steps",
    "evaluate": "hpr.pipeline.steps",
    "fold": "hpr.sharing.fold",
    "heal": "hpr.pipeline.steps",
    "load": "hpr.checkpoints.load",
    "materialise": "hpr.sharing.materialise",
    "open_model": "hpr.checkpoints.open",
    "plan": "hpr.pipeline.steps",
    "profile": "hpr.pipeline.steps",
    "refit": "hpr.pipeline.steps",
    "save": "hpr.checkpoints.save",
    "share": "hpr.pipeline.steps",
    "unshare": "hpr.sharing.unshare",
}
_MODULES = {"extras": "hpr.extras", "presets": "hpr.planning.presets"}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, _MODULES)
