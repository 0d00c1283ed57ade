"""Everything that can be said of a student beside its teacher, as values for ``metrics.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.evaluation.cost import parts, sizes
from hpr.evaluation.divergence import Comparison, accuracy, compare, neighbour_agreement
from hpr.evaluation.latency import latency, peak_memory
from hpr.profiling.objectives import Objective, objective_for
from hpr.runtime.batch import BatchLike, as_batches, examples_in


def evaluate(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[BatchLike],
    objective: Objective | None = None,
    labels: Sequence[int] | Tensor | None = None,
    repeats: int = 9,
) -> dict[str, Any]:
    """Quality, sizes and parts of a student beside its teacher: JSON values, as the report reads them.

    ``labels`` (a classifier's, in the order of the user's data) add its accuracy. ``measured_on`` names the examples for the
    report. Latency and peak memory are those of one full batch, the middle one; ``repeats=0`` leaves them out.
    Raises ``HprError`` for no batches, outputs that are not finite or differ in shape, and labels that do not fit.
    """
    objective, batches = objective or objective_for(teacher), as_batches(batches)
    if labels is not None and objective.labels != "classes":
        raise HprError(f"labels were given, but the objective is {objective.name!r}: name 'classification', or leave them out")
    found = compare(student, teacher, batches, objective)
    quality = _quality(found)
    if labels is not None and found.teacher is not None and found.student is not None:
        before, after = accuracy(found.teacher, labels), accuracy(found.student, labels)
        quality.insert(0, _row("Accuracy", before, after, "", higher=True))
    anatomy = describe(teacher)
    cost: dict[str, dict[str, float | None]] = {
        "before": {**sizes(teacher, anatomy)},
        "after": {**sizes(student, anatomy)},
    }
    largest = max(examples_in(batch) for batch in batches)
    full = [batch for batch in batches if examples_in(batch) == largest]
    middle = full[len(full) // 2]
    timing = latency(student, teacher, middle, repeats) if repeats else None
    for side, model in (("before", teacher), ("after", student)):
        cost[side]["latency_ms"] = None if timing is None else timing.teacher_ms if side == "before" else timing.student_ms
        cost[side]["peak_memory_bytes"] = peak_memory(model, middle) if repeats else None
    figures = {"quality": quality, "sizes": cost, "parts": parts(teacher, student, anatomy)}
    return measured_on(figures, f"{found.examples:,} examples")


def measured_on(figures: dict[str, Any], data: str | None) -> dict[str, Any]:
    """The same figures with the name of the data that they were measured on; unchanged if the data has no name."""
    return figures | {"quality": [row | {"data": data} for row in figures["quality"]]} if data else figures


def _quality(found: Comparison) -> list[dict[str, Any]]:
    rows = []
    if found.teacher_loss is not None:
        rows.append(_row("Loss", found.teacher_loss, found.student_loss, "nats per token", higher=False))
    divergence = _row("Divergence from the original", None, found.divergence.mean, "nats per example", higher=False)
    rows.append(divergence | {"standard_error": found.divergence.error})
    if found.cosine is not None:
        rows.append(_row("Cosine to the original", None, found.cosine, "", higher=True))
        if found.teacher is not None and found.student is not None and found.examples > 1:
            shared = neighbour_agreement(found.student, found.teacher)
            rows.append(_row("Nearest neighbours (10) in common", None, shared, "", higher=True))
    if found.agreement is not None:
        rows.append(_row("Same first choice as the original", None, found.agreement, "", higher=True))
    return rows


def _row(name: str, before: float | None, after: float | None, unit: str, higher: bool) -> dict[str, Any]:
    return {"name": name, "before": before, "after": after, "unit": unit, "higher_is_better": higher}
