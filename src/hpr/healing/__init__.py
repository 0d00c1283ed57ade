"""Healing: a student is trained to do again what its teacher does, by a loss that sees the whole model."""

from hpr.healing.augmentation import augmentation
from hpr.healing.losses import Weights
from hpr.healing.recipe import Healing, Recipe, heal

__all__ = ["Healing", "Recipe", "Weights", "augmentation", "heal"]
