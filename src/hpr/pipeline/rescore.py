"""Run plans end to end: the true divergence of each from the original, on text that was not profiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hpr.evaluation.divergence import Comparison, compare
from hpr.plans.plan import Plan
from hpr.profiling.objectives import Objective
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch, BatchLike
from hpr.runtime.progress import progress
from hpr.sharing.share import share


def rescore(
    model: nn.Module,
    profile: Profile,
    plans: Sequence[Plan],
    batches: Sequence[BatchLike],
    objective: Objective,
) -> list[Comparison]:
    """Compare each plan with the model: its true divergence in nats per example, and more. Students are not kept."""
    return [found for _, found in students(model, profile, plans, batches, objective)]


def students(
    model: nn.Module,
    profile: Profile,
    plans: Sequence[Plan],
    batches: Sequence[BatchLike],
    objective: Objective,
) -> Iterator[tuple[nn.Module, Comparison]]:
    """Yield, for each plan in turn, the student that it gives and how it compares with the model."""
    for index, plan in enumerate(plans):
        student = share(model, plan, profile)
        yield student, compare(student, model, batches, objective)
        progress("re-score", index + 1, len(plans))
