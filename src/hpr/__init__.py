"""HPR: Hierarchical Parameter Reuse. Make a pretrained Transformer smaller by letting its layers share parameters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpr.anatomy.describe import describe
from hpr.anatomy.model import Anatomy
from hpr.checkpoints.load import load
from hpr.checkpoints.quantizer import register
from hpr.checkpoints.save import save
from hpr.errors import HprError
from hpr.evaluation.evaluate import evaluate
from hpr.nn.multitask import ManyHeads
from hpr.pipeline.compress import Compression, compress
from hpr.pipeline.hierarchical import HierarchicalBert, HierarchicalModel
from hpr.pipeline.rescore import rescore
from hpr.planning import presets
from hpr.planning.planner import plan
from hpr.plans.plan import Plan
from hpr.profiling.profile import Profile
from hpr.profiling.run import profile
from hpr.routing.collapse import collapse
from hpr.sharing.refit import refit
from hpr.sharing.share import share
from hpr.sharing.unshare import unshare

if TYPE_CHECKING:
    from hpr.healing.heal import heal
    from hpr.healing.online.healer import OnlineHealer
    from hpr.healing.recipe import Recipe
    from hpr.healing.train import Healing

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "Compression",
    "Healing",
    "HierarchicalBert",
    "HierarchicalModel",
    "HprError",
    "ManyHeads",
    "OnlineHealer",
    "Plan",
    "Profile",
    "Recipe",
    "collapse",
    "compress",
    "describe",
    "evaluate",
    "heal",
    "load",
    "plan",
    "presets",
    "profile",
    "refit",
    "register",
    "rescore",
    "save",
    "share",
    "unshare",
]


_LAZY = {
    "Healing": "hpr.healing.train",
    "OnlineHealer": "hpr.healing.online.healer",
    "Recipe": "hpr.healing.recipe",
    "heal": "hpr.healing.heal",
}


def __getattr__(name: str) -> Any:
    """Healing brings transformers' Trainer along: it is imported when it is first asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hpr' has no attribute {name!r}")
