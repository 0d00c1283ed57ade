"""Compare quality, size and latency of a student and its teacher, as JSON values for ``metrics.json``."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.errors import HprError, check_kind
from hpr.evaluation.cost import parts, sizes
from hpr.evaluation.divergence import Comparison, accuracy, compare, neighbour_agreement
from hpr.evaluation.latency import latency, peak_memory
from hpr.nn.bank import recorded_objective
from hpr.profiling.first_pass import check_batches
from hpr.profiling.objectives import Objective, objective_for
from hpr.runtime.batch import BatchLike, as_batches, examples_in


def evaluate(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[BatchLike],
    objective: Objective | None = None,
    labels: Sequence[int] | Int[Tensor, " examples"] | None = None,
    repeats: int = 9,
) -> dict[str, Any]:
    """Return quality, sizes and parts of a student and its teacher, as JSON values that the report reads.

    ``objective`` decides how outputs are read; the divergence is in nats per example. By default it is the objective of the
    profile that the student was fitted with, or the default of the teacher's class if the student records none.
    ``labels``: the class of each example, in the order of the user's data; they add a classifier's accuracy.
    ``repeats``: timed passes over one full batch, the middle one; 0 leaves out latency (ms) and peak memory (bytes).

    Raises ``HprError`` for no batches, outputs that are not finite or differ in shape, and labels that do not fit.
    """
    check_kind("repeats", repeats, Integral, "a whole number, 0 to leave latency and memory out")
    objective, batches = objective or objective_for(teacher, recorded_objective(student)), as_batches(batches)
    if labels is not None and objective.labels != "classes":
        raise HprError(
            f"labels were given, but the objective is {objective.name!r}: use 'classification', or leave out the labels"
        )
    check_batches(teacher, batches, objective)
    comparison = compare(student, teacher, batches, objective)
    quality = _quality(comparison)
    if labels is not None and comparison.teacher is not None and comparison.student is not None:
        before, after = accuracy(comparison.teacher, labels), accuracy(comparison.student, labels)
        quality.insert(0, _row("Accuracy", before, after, "", higher=True))
    anatomy = describe(teacher)
    cost: dict[str, dict[str, float | None]] = {
        "before": {**sizes(teacher, anatomy)},
        "after": {**sizes(student, anatomy)},
    }
    if "integer_bytes" in cost["after"]:
        cost["before"]["integer_bytes"] = cost["before"]["resident_bytes"]
    largest = max(examples_in(batch) for batch in batches)
    full = [batch for batch in batches if examples_in(batch) == largest]
    middle = full[len(full) // 2]
    timing = latency(student, teacher, middle, repeats) if repeats else None
    for side, model in (("before", teacher), ("after", student)):
        cost[side]["latency_ms"] = None if timing is None else timing.teacher_ms if side == "before" else timing.student_ms
        cost[side]["peak_memory_bytes"] = peak_memory(model, middle) if repeats else None
    figures = {"quality": quality, "sizes": cost, "parts": parts(teacher, student, anatomy)}
    return measured_on(figures, f"{comparison.examples:,} examples")


def measured_on(figures: dict[str, Any], data: str | None) -> dict[str, Any]:
    """Return the figures with the name of their data in every row of quality; unchanged without a name."""
    return figures | {"quality": [row | {"data": data} for row in figures["quality"]]} if data else figures


def _quality(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    if comparison.teacher_loss is not None:
        rows.append(_row("Loss", comparison.teacher_loss, comparison.student_loss, "nats per token", higher=False))
    divergence = _row("Divergence from the original", None, comparison.divergence.mean, "nats per example", higher=False)
    rows.append(divergence | {"standard_error": comparison.divergence.error})
    if comparison.cosine is not None:
        rows.append(_row("Cosine to the original", None, comparison.cosine, "", higher=True))
        if comparison.teacher is not None and comparison.student is not None and comparison.examples > 1:
            shared = neighbour_agreement(comparison.student, comparison.teacher)
            rows.append(_row("Nearest neighbours (10) in common", None, shared, "", higher=True))
    if comparison.correlation is not None:
        rows.append(_row("Correlation with the original", None, comparison.correlation, "", higher=True))
    if comparison.agreement is not None:
        rows.append(_row("Same first choice as the original", None, comparison.agreement, "", higher=True))
    return rows


def _row(name: str, before: float | None, after: float | None, unit: str, higher: bool) -> dict[str, Any]:
    return {"name": name, "before": before, "after": after, "unit": unit, "higher_is_better": higher}
