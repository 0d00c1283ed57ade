"""HPR, Hierarchical Parameter Reuse: make a pretrained Transformer smaller by letting its layers share parameters.

``import hpr`` teaches transformers to load compressed checkpoints, and nothing else: every other part is imported when its
name is first used, so a program that only loads a model stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpr.checkpoints import quantizer  # noqa: F401  its import registers HPR with transformers
from hpr.errors import HprError

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
    "heal",
    "load",
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
    "heal": "hpr.pipeline.steps",
    "load": "hpr.checkpoints.load",
    "open_model": "hpr.checkpoints.open",
    "plan": "hpr.pipeline.steps",
    "profile": "hpr.pipeline.steps",
    "refit": "hpr.pipeline.steps",
    "save": "hpr.checkpoints.save",
    "share": "hpr.pipeline.steps",
    "unshare": "hpr.sharing.unshare",
}
_MODULES = {"extras": "hpr.extras", "presets": "hpr.planning.presets"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        value: Any = import_module(_MODULES[name])
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'hpr' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
