"""Healing: train a compressed model (the student) to imitate its original (the teacher), with one loss for the whole model."""

from __future__ import annotations

from hpr.healing.loss import Weights
from hpr.healing.online.healer import OnlineHealer, Update
from hpr.healing.online.moments import Moments
from hpr.healing.online.options import OnlineOptions
from hpr.healing.recipe import Recipe
from hpr.healing.train import Healing

__all__ = ["Healing", "Moments", "OnlineHealer", "OnlineOptions", "Recipe", "Update", "Weights"]
