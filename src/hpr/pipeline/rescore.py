"""Run plans end to end: the true divergence of each from the original, on text that was not profiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hpr.evaluation.divergence import Comparison, compare
from hpr.operators.fitting import Fits
from hpr.plans.plan import Plan
from hpr.profiling.objectives import Objective
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch
from hpr.runtime.progress import progress
from hpr.sharing.check_reads import check_reads
from hpr.sharing.share import share


def rescore(
    model: nn.Module, profile: Profile, plans: Sequence[Plan], batches: Sequence[Batch], objective: Objective
) -> list[Comparison]:
    """Compare each plan with the model: its true divergence in nats per example, and more. Students are not kept."""
    return [comparison for _, comparison in students(Fits(model, profile), plans, batches, objective)]


def students(
    fits: Fits, plans: Sequence[Plan], batches: Sequence[Batch], objective: Objective
) -> Iterator[tuple[nn.Module, Comparison]]:
    """Yield, for each plan in turn, the student that it gives and how it compares with the model."""
    for index, plan in enumerate(plans):
        student = share(fits.model, plan, fits.profile, fits=fits)
        check_reads(student, batches[0])
        yield student, compare(student, fits.model, batches, objective)
        progress("re-score", index + 1, len(plans))
