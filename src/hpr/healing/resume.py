"""Whose checkpoints a folder holds: a run goes on with its own only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hpr.anatomy.describe import describe
from hpr.data.sources import named
from hpr.errors import HprError
from hpr.healing.augmentation import Augmentation
from hpr.healing.loss import GlobalLoss
from hpr.healing.recipe import Recipe
from hpr.healing.teacher_cache import key_of
from hpr.runtime.batch import Batch
from hpr.runtime.files import write_text

RECIPE = "recipe.json"  # beside the checkpoints: what they belong to


def steps_begun(folder: Path | None) -> int | None:
    """The steps of the run whose checkpoints a folder holds, None where there is none."""
    found = None if folder is None else known(folder)
    return None if found is None else int(found["recipe"]["steps"])


def facts_of(
    recipe: Recipe,
    student: nn.Module,
    loss: GlobalLoss,
    batches: Any,
    guard: Sequence[Batch],
    shares: Mapping[str, float] | None,
    augment: Augmentation | None,
    original: nn.Module | None,
) -> dict[str, Any]:
    """What decides the weights of every step; what is long as a hash."""
    return {
        "recipe": asdict(recipe),
        "objective": loss.objective.name,
        "teacher": loss.anatomy.fingerprint,
        "student": key_of(student.state_dict()),
        "data": {name: _joined(source) for name, source in named(batches).items()},
        "guard": _joined(guard),
        "shares": None if shares is None else dict(shares),
        "augmentation": None if augment is None else getattr(augment, "__qualname__", type(augment).__qualname__),
        "original": None if original is None else describe(original).fingerprint,
    }


def _joined(batches: Sequence[Batch]) -> str:
    return hashlib.sha256("".join(map(key_of, batches)).encode()).hexdigest()


def claim(folder: Path, facts: dict[str, Any]) -> None:
    """Take a folder for checkpoints. Raises where it holds those of another run."""
    found = known(folder)
    if found is None:
        if any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            raise HprError(f"{folder} holds checkpoints of something else: choose another folder")
        write_text(folder / RECIPE, json.dumps(facts, indent=1) + "\n")
    elif different := _differences(found, json.loads(json.dumps(facts))):
        raise HprError(
            f"{folder} holds checkpoints of a run with other {', '.join(different)}: choose another folder, or remove it"
        )


def _differences(found: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What a run has otherwise than the one that began, with both values where they are of the recipe."""
    names = [key for key in facts if key != "recipe" and found.get(key) != facts[key]]
    begun = found.get("recipe", {})
    return names + [f"{key} ({begun.get(key)}, now {new})" for key, new in facts["recipe"].items() if begun.get(key) != new]


def known(folder: Path) -> dict[str, Any] | None:
    """What ``claim`` wrote into a folder. Raises where that cannot be read."""
    path = folder / RECIPE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise HprError(f"{path} is not JSON ({error}): remove the folder to start anew") from error
    return found
