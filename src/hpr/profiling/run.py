"""Profile a model: curvature of every site, features of every layer, symmetries."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import nn

from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.profiling.curvature import first_few, measure_curvature
from hpr.profiling.first_pass import check_batches, check_weights
from hpr.profiling.layer_features import measure_layers
from hpr.profiling.objectives import objective_for, softened
from hpr.profiling.other_parameters import Sensitivity
from hpr.profiling.profile import Profile
from hpr.profiling.symmetry_search import find_symmetries
from hpr.runtime.batch import Batch, BatchLike
from hpr.runtime.environment import peak_memory, versions
from hpr.runtime.hooks import to_device_of
from hpr.runtime.seeds import check_seed


def profile(
    model: nn.Module,
    batches: Sequence[BatchLike],
    objective: str | None = None,
    seed: int = 0,
    structure: bool = True,
) -> Profile:
    """Return the profile of a model on calibration batches. The batches need no labels, and the model does not change.

    ``objective``: a key of ``profiling.objectives.OBJECTIVES``; None is the default of the model's class. ``structure``:
    whether to measure the features of layers and to look for symmetries, too. Only budgets in parameters use them. Raises
    ``DataError`` for no batches and for batches that the model cannot read, and ``HprError`` for weights, losses, activations
    or gradients that are not finite, and for an objective that has no gradient anywhere.
    """
    anatomy, seed = describe(model), check_seed(seed)
    start, moved = time.perf_counter(), [to_device_of(batch, model) for batch in batches]
    goal = objective_for(model, objective)
    check_weights(model)
    check_batches(model, moved, goal)
    goal = softened(goal, model, first_few(moved))
    others = Sensitivity(model, anatomy)
    sites, examples = measure_curvature(model, anatomy, moved, goal, seed, others)
    if not any(site.has_gradient for site in sites.values()):
        raise HprError(
            f"no weight of {type(model).__name__} has a gradient of the objective {goal.name!r}: its outputs do not depend on "
            f"the weights for these inputs, or it computes without gradients. Give other inputs, or another objective"
        )
    layers = measure_layers(model, anatomy, moved, seed) if structure else {}
    symmetries = find_symmetries(model, anatomy, moved, seed) if structure else ()
    about = {
        "objective": goal.name,
        "temperature": goal.temperature,
        "examples": examples,
        "tokens": sum(_tokens(batch) for batch in moved),
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
    }
    return Profile(anatomy.fingerprint, sites, layers, about, symmetries, others=others.per_example(examples))


def _tokens(batch: Batch) -> int:
    mask, first = batch.get("attention_mask"), next(iter(batch.values()))
    return int(mask.sum()) if mask is not None else first.shape[0] * (first.shape[1] if first.dim() > 1 else 1)
