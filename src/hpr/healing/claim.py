"""Whose checkpoints a folder holds: a run goes on with its own only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hpr.errors import HprError
from hpr.planning.plan import write_text
from hpr.profiling.objectives import examples_in

RECIPE = "recipe.json"  # beside the checkpoints: what they belong to


def steps_begun(folder: Path | None) -> int | None:
    """The steps of the run whose checkpoints a folder holds, None where there is none."""
    found = None if folder is None else known(folder)
    return None if found is None else int(found["recipe"]["steps"])


def facts_of(
    recipe: Mapping[str, Any], student: nn.Module, teacher: str, batches: Any, shares: Mapping[str, float] | None
) -> dict[str, Any]:
    """What decides the weights of every step, as far as it is known beforehand. ``teacher``: its fingerprint."""
    sources = dict(batches) if isinstance(batches, Mapping) else {"data": batches}
    return {
        "recipe": dict(recipe),
        "teacher": teacher,
        "model": type(student).__name__,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "examples": {name: sum(examples_in(batch) for batch in source) for name, source in sources.items()},
        "shares": None if shares is None else dict(shares),
    }


def claim(folder: Path, facts: dict[str, Any]) -> None:
    """Take a folder for checkpoints. Raises where it holds those of another run."""
    found = known(folder)
    if found is None:
        if any(folder.glob("checkpoint-*")):
            raise HprError(f"{folder} holds checkpoints of something else: choose another folder")
        write_text(folder / RECIPE, json.dumps(facts, indent=1) + "\n")
    elif different := [key for key in facts if found.get(key) != json.loads(json.dumps(facts[key]))]:
        raise HprError(
            f"{folder} holds checkpoints of a run with other {', '.join(different)}: choose another folder, or remove it"
        )


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
