"""Which run a folder's checkpoints belong to. A run resumes from its own checkpoints only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hpr.anatomy.describe import describe
from hpr.errors import CheckpointError
from hpr.healing.setup import TrainingSetup
from hpr.runtime.batch import Batch
from hpr.runtime.files import parse_json, partial_folder, resolved, write_text, writing

FACTS = "recipe.json"  # beside the checkpoints: the facts of the run that they belong to


def steps_begun(folder: Path | None) -> int | None:
    """Return the number of steps of the run whose checkpoints a folder holds, None if there is none."""
    facts = None if folder is None else read_facts(folder)
    return None if facts is None else int(facts["recipe"]["steps"])


def facts_of(student: nn.Module, setup: TrainingSetup) -> dict[str, Any]:
    """Return everything that decides the weights of every step; weights and data as hashes."""
    recipe, loss = setup.recipe, setup.loss
    changes = recipe.augment
    return {
        "recipe": setup.settings(),
        "objective": loss.objective.name,
        "teacher": loss.anatomy.fingerprint,
        "student": hash_of(student.state_dict()),
        "data": {name: _joint_hash(source) for name, source in setup.sources.items()},
        "validation": _joint_hash(setup.validation),
        "shares": None if setup.shares is None else dict(setup.shares),
        "augmentation": None if changes is None else getattr(changes, "__qualname__", type(changes).__qualname__),
        "original": None if recipe.original is None else describe(recipe.original).fingerprint,
    }


def hash_of(batch: Batch) -> str:
    """Return a hash of the names, dtypes, shapes and values of a batch."""
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _joint_hash(batches: Sequence[Batch]) -> str:
    return hashlib.sha256("".join(map(hash_of, batches)).encode()).hexdigest()


def check_place(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> None:
    """Raise ``CheckpointError`` if checkpoints could not be written into a folder, or if its content is not of such a run.

    ``output``: the folder that the run will write, in whose place checkpoints must not appear before it.
    """
    target = resolved(folder)
    if output is not None and target.is_relative_to(resolved(output)) and not resolved(output).exists():
        raise CheckpointError(f"{target} lies in {output}, where the result is written at the end: choose a folder beside it")
    with writing(target):
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file: choose a folder")
        if target.exists() and any(target.iterdir()) and not (target / FACTS).is_file():
            raise CheckpointError(
                f"{target} has content that is not of a run that could continue: choose another folder, or empty this one"
            )
        with partial_folder(target / FACTS):
            pass


def check_resume(folder: Path, facts: dict[str, Any]) -> None:
    """Check that a folder's checkpoints belong to the run with these facts; write the facts if the folder has none yet.

    Raises ``CheckpointError`` if the checkpoints belong to another run.
    """
    begun = read_facts(folder)
    if begun is None:
        if any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            raise CheckpointError(f"{folder} holds checkpoints of something else: choose another folder")
        check_place(folder)
        write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    elif different := _differences(begun, json.loads(json.dumps(facts))):
        raise CheckpointError(
            f"{folder} holds checkpoints of a run with other {', '.join(different)}: choose another folder, or remove it"
        )


def _differences(begun: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """The names of facts that differ; with both values if they are settings of the recipe."""
    names = [key for key in facts if key != "recipe" and begun.get(key) != facts[key]]
    old = begun.get("recipe", {})
    return names + [f"{key} ({old.get(key)}, now {new})" for key, new in facts["recipe"].items() if old.get(key) != new]


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return what ``check_resume`` wrote into a folder, None if nothing. Raises ``CheckpointError`` for damaged facts."""
    path = folder / FACTS
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): remove the folder to start anew") from error
    if not (isinstance(facts, dict) and isinstance(facts.get("recipe"), dict)):
        raise CheckpointError(f"{path} does not say which run it belongs to: remove the folder to start anew")
    return facts
