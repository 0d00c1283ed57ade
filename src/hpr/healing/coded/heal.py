"""Heal a coded student: train the numbers behind its codes, and give it the codes of the best file within the budget."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpr.anatomy.describe import describe
from hpr.data.loaded_model import LoadedModel
from hpr.errors import HprError
from hpr.healing.coded.budget import ByteBudget
from hpr.healing.coded.trainer import CodedHealing
from hpr.healing.heal import ready
from hpr.healing.recipe import Recipe
from hpr.healing.train import Healing, run
from hpr.nn.coded import attach_codes, coded_objective

_FLOATS_ONLY = {
    "checkpoints": "such a run cannot be continued",
    "sharded": "every process needs all of them",
    "shared_rate": "all codes move at one rate",
    "router_rate": "there are no routers",
    "delta_decay": "there are no private deltas",
    "blocks": "it has no stages",
    "ramp": "it has no stages",
    "original": "they start from what was rounded",
}


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Raise ``HprError`` for settings that healing in codes does not have, for fused experts, and for low precision."""
    usual = Recipe()
    for name, reason in _FLOATS_ONLY.items():
        if (value := getattr(recipe, name)) != getattr(usual, name):
            raise HprError(
                f"{name} is {value!r}, but codes are trained where numbers are rounded, and {reason}: leave {name} out, or "
                f"give a budget in parameters alone, such as 50%"
            )
    if expert := next((site.name for site in describe(model).sites if site.expert is not None), None):
        raise HprError(
            f"{expert} is an expert in a fused parameter, and codes of such experts are not trained: leave heal out, or "
            f"give a budget in parameters alone, such as 50%"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() < 4:
            raise HprError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: most steps would be lost in rounding. Give "
                f"model.float(), with Recipe(bf16=True) for products in bfloat16"
            )


def heal_codes(student: nn.Module, teacher: nn.Module | LoadedModel, data: Any, recipe: Recipe, budget: ByteBudget) -> Healing:
    """Train a coded student, shared or not, in place to imitate its teacher, within its bytes; the record is that of ``heal``.

    A latent stands behind every code (``latents``), and a price on bits holds the file at its bytes (``optimizer.Pressure``).
    Every check of the validation loss is made on the student as its file would hold it. The student ends with the codes of
    the best check, or with its first ones if no check was better, so validation is never worse. Norms, biases and positions
    are trained as floats and coded again.

    ``data`` and the objective are those of ``heal``. ``recipe.learning_rate`` is that of floats; latents move by at most
    ``trainer.STEPS`` times as many grid steps. Raises ``HprError`` as ``heal`` and ``check_recipe`` do.

    >>> healing = heal_codes(student, loaded, texts, Recipe("300steps"), budget)  # doctest: +SKIP
    >>> healing.before.mean, healing.after.mean  # doctest: +SKIP
    (0.0961, 0.0741)
    """
    check_recipe(student, recipe)
    coded = CodedHealing(student, budget)
    healing = run(student, ready(student, teacher, data, recipe), coded.trainer)
    if healing.best_step and coded.fitted is not None and coded.fitted.coded is not None:
        attach_codes(student, coded.fitted.coded, coded_objective(student), coded.fitted.others)
    return healing
