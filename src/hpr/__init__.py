"""HPR: Hierarchical Parameter Reuse. Make a pretrained Transformer smaller by letting its layers share parameters."""

from hpr import presets
from hpr.anatomy import Anatomy, describe
from hpr.errors import HprError
from hpr.evaluation import evaluate
from hpr.healing import Healing, Recipe, heal
from hpr.hierarchical import HierarchicalBert, HierarchicalModel
from hpr.hub import load, register, save
from hpr.pipeline import Compression, compress, profile, refit, rescore
from hpr.planner import plan
from hpr.planning.plan import Plan
from hpr.profiling.profile import Profile
from hpr.sharing import share, unshare

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "Compression",
    "Healing",
    "HierarchicalBert",
    "HierarchicalModel",
    "HprError",
    "Plan",
    "Profile",
    "Recipe",
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
