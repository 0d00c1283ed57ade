"""What needs a model and several steps: profile, refit, re-score, and plans in which layers reuse."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from torch import nn

from hpr import alignment
from hpr.anatomy import describe
from hpr.drafts import Draft
from hpr.errors import HprError
from hpr.evaluation.metrics import Comparison, compare
from hpr.interventions import reuses
from hpr.operators.metric import measure
from hpr.planning.budget import Budget
from hpr.planning.layers import site_layer
from hpr.planning.plan import Plan
from hpr.profiling.curvature import Progress, first_few, measure_curvature, peak_memory, silent
from hpr.profiling.features import measure_layers
from hpr.profiling.objectives import Batch, Objective, beside, objective_for, softened
from hpr.profiling.profile import Profile
from hpr.profiling.trials import find_symmetries
from hpr.records import versions
from hpr.refitting import refit_stacks
from hpr.sharing import share

REUSE_MARGIN = 1.2  # of the best predicted damage without reuse: up to that, plans with reuse are worth measuring


def profile(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Profile:
    """What calibration batches say about every site and layer. No labels are needed; the model is left as it was.

    ``objective`` is chosen from the model's class unless named (see ``profiling.objectives``). Raises ``HprError`` for no
    batches and for losses, activations or gradients that are not finite.
    """
    anatomy = describe(model)
    start, batches = time.perf_counter(), [beside(batch, model) for batch in batches]
    goal = softened(objective_for(model, objective), model, first_few(batches))
    sites, examples = measure_curvature(model, anatomy, batches, goal, seed, progress)
    layers = measure_layers(model, anatomy, batches, seed, progress)
    symmetries = find_symmetries(model, anatomy, batches, seed)
    about = {
        "objective": goal.name,
        "temperature": goal.temperature,
        "examples": examples,
        "tokens": sum(_tokens(batch) for batch in batches),
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
    }
    return Profile(anatomy.fingerprint, sites, layers, about, symmetries)


def refit(
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    profile: Profile,
    batches: Sequence[Batch],
    progress: Progress = silent,
) -> None:
    """Fit private factors and biases anew to what the compressed layers below emit, in place (see ``refitting``).

    It pays on data like that which the model will see, and can lose on other data: the regression follows its text closely.
    """
    profile.check(describe(teacher))
    if plan.alignment:  # the student's insides are those of the turned model
        teacher, profile, _ = alignment.align(teacher, profile, plan.alignment)
    anatomy = describe(teacher)
    moved = [beside(batch, teacher) for batch in batches]
    refit_stacks(student, teacher, anatomy, plan, measure(teacher, anatomy, profile), moved, progress)


def rescore(
    model: nn.Module,
    profile: Profile,
    plans: Sequence[Plan],
    batches: Sequence[Batch],
    objective: Objective,
    progress: Progress = silent,
) -> list[Comparison]:
    """Every plan beside the model, its true divergence in nats per example foremost: each is shared, run and dropped."""
    return [found for _, found in students(model, profile, plans, batches, objective, progress)]


def students(
    model: nn.Module,
    profile: Profile,
    plans: Sequence[Plan],
    batches: Sequence[Batch],
    objective: Objective,
    progress: Progress = silent,
) -> Iterator[tuple[nn.Module, Comparison]]:
    """Each plan in turn: the student that it gives, and that one beside the model."""
    for index, plan in enumerate(plans):
        student = share(model, plan, profile)
        yield student, compare(student, model, batches, objective)
        progress("re-score", index + 1, len(plans))


def reusing_plans(
    model: nn.Module,
    profile: Profile,
    sketch: Draft,
    budget: Budget,
    batches: Sequence[Batch],
    objective: Objective,
    progress: Progress = silent,
) -> list[Plan]:
    """Plans in which layers are dropped or reuse attention, where they promise to be no worse than the best without.

    Their damage is the measured one of the layers together plus what is predicted for the rest. At most two, the best first.
    """
    best = sketch.best(budget)
    price = (best.diagnostics["solver"] or {}).get("multiplier") or 0.0
    chosen = set(sketch.anatomy.select(sketch.only))
    outside = {site_layer(site) for site in sketch.anatomy.sites if site not in chosen}
    layers = {name: damages for name, damages in profile.interventions.items() if name not in outside}
    found = []
    for reuse in reuses(model, layers, batches, objective, price, progress):
        with suppress(HprError):  # what is left cannot meet the budget
            found.append(sketch.reusing(reuse).best(budget))
    return sorted((plan for plan in found if plan.damage < REUSE_MARGIN * best.damage), key=lambda plan: plan.damage)[:2]


def _tokens(batch: Batch) -> int:
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        first = next(iter(batch.values()))
        return int(mask.sum()) if mask is not None else first.shape[0] * (first.shape[1] if first.dim() > 1 else 1)
    return batch.shape[0] * (batch.shape[1] if batch.dim() > 1 else 1)
