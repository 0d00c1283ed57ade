"""Healing: a student is trained to do again what its teacher does, by a loss that sees the whole model."""

from hpr.healing.augmentation import augmentation
from hpr.healing.losses import Weights
from hpr.healing.moments import Moments
from hpr.healing.online import OnlineHealer, Update
from hpr.healing.opened import heal
from hpr.healing.recipe import Recipe
from hpr.healing.training import Healing, train

__all__ = ["Healing", "Moments", "OnlineHealer", "Recipe", "Update", "Weights", "augmentation", "heal", "train"]
