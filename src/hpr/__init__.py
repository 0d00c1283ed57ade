"""HPR: Hierarchical Parameter Reuse. Make a pretrained Transformer smaller by letting its layers share parameters."""

from typing import TYPE_CHECKING, Any

from hpr import presets
from hpr.anatomy import Anatomy, describe
from hpr.compression import Compression, compress
from hpr.errors import HprError
from hpr.evaluation import evaluate
from hpr.heads import ManyHeads
from hpr.hierarchical import HierarchicalBert, HierarchicalModel
from hpr.hub import load, register, save
from hpr.mixing import collapse
from hpr.pipeline import profile, refit, rescore
from hpr.planner import plan
from hpr.planning.plan import Plan
from hpr.profiling.profile import Profile
from hpr.sharing import share, unshare

if TYPE_CHECKING:
    from hpr.healing import Healing, OnlineHealer, Recipe, heal

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


def __getattr__(name: str) -> Any:
    """Healing brings transformers' Trainer along: it is imported when it is first asked for."""
    if name in ("Healing", "OnlineHealer", "Recipe", "heal"):
        from hpr import healing

        return getattr(healing, name)
    raise AttributeError(f"module 'hpr' has no attribute {name!r}")
