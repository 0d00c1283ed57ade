"""Healing: a student is trained to do again what its teacher does, by a loss that sees the whole model."""

from __future__ import annotations

from hpr.healing.loss import Weights
from hpr.healing.online.healer import OnlineHealer, Update
from hpr.healing.online.moments import Moments
from hpr.healing.recipe import Recipe
from hpr.healing.train import Healing

__all__ = ["Healing", "Moments", "OnlineHealer", "Recipe", "Update", "Weights", "augmentation", "heal", "train"]
