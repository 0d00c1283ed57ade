"""How far a student's outputs are from its teacher's, on the same batches, without labels where there are none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.data.batches import in_input_order
from hpr.errors import HprError
from hpr.profiling.objectives import Objective
from hpr.runtime.batch import IGNORED, POSITIONAL, Batch, BatchLike
from hpr.runtime.hooks import eval_mode, run, to_device_of


@dataclass(frozen=True)
class Estimate:
    """A mean over examples and its standard error; None where there is one example only."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """Student beside teacher on the same batches.

    ``divergence``: nats per example. ``agreement``: share of positions with the same top class (categorical outputs).
    ``cosine``: mean cosine of embeddings or hidden states (the others). ``teacher_loss`` and ``student_loss``: nats per
    predicted token, where the batches say what the token is. ``teacher`` and ``student``: (n, d) outputs in input
    order where there is one vector per example. What does not apply is None.
    """

    examples: int
    divergence: Estimate
    agreement: float | None
    cosine: float | None
    teacher_loss: float | None
    student_loss: float | None
    teacher: Tensor | None
    student: Tensor | None


def compare(student: nn.Module, teacher: nn.Module, batches: Sequence[BatchLike], objective: Objective) -> Comparison:
    """Run both models once over the batches.

    Raises ``HprError`` for no batches, for outputs that are not finite (naming model and batch), for outputs of different
    shape and for an objective that does not fit them.
    """
    divergences, kept = [], []
    matching, losses = _Share(), (_Share(), _Share())
    with torch.no_grad(), eval_mode(teacher), eval_mode(student):
        for index, batch in _numbered(batches, teacher):
            outputs = run(teacher, batch), run(student, batch)
            expected, weight = objective.read(outputs[0], batch)
            found, _ = objective.read(outputs[1], batch)
            if expected.shape != found.shape:
                shapes = f"{tuple(found.shape)}, the teacher's {tuple(expected.shape)}"
                raise HprError(f"on batch {index} the student's output has shape {shapes}: compare models of the same task")
            if weight.shape != expected.shape[:-1]:
                shape = tuple(expected.shape)
                raise HprError(f"objective {objective.name!r} does not fit outputs of shape {shape}: name another")
            _check_finite(expected, weight, "teacher", index)
            _check_finite(found, weight, "student", index)
            divergences.append(objective.divergence(outputs[0], outputs[1], batch).double())
            matching.add(_match(expected, found, objective), weight)
            targets = _targets(batch, objective)
            if targets is not None:
                for share, logits in zip(losses, (expected, found), strict=True):
                    share.add(*_token_losses(logits, targets, objective))
            if expected.dim() == 2:
                kept.append((expected.float(), found.float()))
    divergence = torch.cat(divergences)
    teacher_rows, student_rows = (
        [in_input_order(torch.cat(parts), batches) for parts in zip(*kept, strict=True)] if kept else (None, None)
    )
    return Comparison(
        examples=len(divergence),
        divergence=_estimate(divergence),
        agreement=matching.value if objective.categorical else None,
        cosine=None if objective.categorical else matching.value,
        teacher_loss=losses[0].value,
        student_loss=losses[1].value,
        teacher=teacher_rows,
        student=student_rows,
    )


def divergence(student: nn.Module, teacher: nn.Module, batches: Sequence[BatchLike], objective: Objective) -> Estimate:
    """Mean divergence from the teacher in nats per example (see ``hpr.profiling.objectives``) with its standard error."""
    return compare(student, teacher, batches, objective).divergence


def embeddings(model: nn.Module, batches: Sequence[BatchLike], objective: Objective) -> Tensor:
    """One output vector per example, (n, d) float32, in the order of the user's data: embeddings, or a classifier's logits.

    Raises ``HprError`` as ``compare`` does, and where the objective gives a vector for every position.
    """
    rows = []
    with torch.no_grad(), eval_mode(model):
        for index, batch in _numbered(batches, model):
            read, weight = objective.read(run(model, batch), batch)
            if read.dim() != 2:
                raise HprError(f"objective {objective.name!r} gives outputs of shape {tuple(read.shape)}, not one per example")
            _check_finite(read, weight, "model", index)
            rows.append(read.float())
    return in_input_order(torch.cat(rows), batches)


def cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine between corresponding rows of two (n, d)."""
    return float(F.cosine_similarity(first.double(), second.double(), dim=-1).mean())


def neighbour_agreement(first: Tensor, second: Tensor, k: int = 10) -> float:
    """Share of each example's k nearest neighbours (by cosine, among all n examples) that two embeddings have in common.

    (n, d) each, the widths may differ. With n ≤ k all the n − 1 others are neighbours, and the answer is 1. Raises
    ``HprError`` for fewer than two examples.
    """
    if len(first) != len(second) or len(first) < 2:
        raise HprError(f"{len(first)} and {len(second)} embeddings: two of the same examples, and at least two, are needed")
    k = min(k, len(first) - 1)
    hits = 0
    unit = [F.normalize(rows.float(), dim=-1) for rows in (first, second)]
    for start in range(0, len(first), 1024):
        near = []
        for rows in unit:
            similarity = rows[start : start + 1024] @ rows.T
            own = torch.arange(len(similarity), device=rows.device)
            similarity[own, own + start] = -torch.inf
            near.append(similarity.topk(k).indices)
        hits += int((near[0].unsqueeze(2) == near[1].unsqueeze(1)).sum())
    return hits / (k * len(first))


def accuracy(logits: Tensor, labels: Sequence[int] | Tensor) -> float:
    """Share of rows of (n, classes) whose top class is the label. Raises ``HprError`` where the two do not fit."""
    target = torch.as_tensor(labels).long().to(logits.device)
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise HprError(
            f"{tuple(target.shape)} labels for outputs of shape {tuple(logits.shape)}: one for each example is needed"
        )
    outside = (target < 0) | (target >= logits.shape[1])
    if outside.any():
        first = int(outside.nonzero()[0])
        raise HprError(f"label {int(target[first])} of example {first} is no class: the model has 0 to {logits.shape[1] - 1}")
    return float((logits.argmax(-1) == target).double().mean())


class _Share:
    """A weighted mean in a stream."""

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0

    def add(self, values: Tensor, weights: Tensor) -> None:
        self.total += float(torch.where(weights > 0, values.double() * weights, 0.0).sum())
        self.weight += float(weights.sum())

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


def _numbered(batches: Sequence[BatchLike], model: nn.Module) -> Iterator[tuple[int, Batch]]:
    """The batches with their numbers, on the model's device."""
    if not len(batches):
        raise HprError("no batches to evaluate on: at least one is needed")
    return ((index, to_device_of(batch, model)) for index, batch in enumerate(batches))


def _match(expected: Tensor, found: Tensor, objective: Objective) -> Tensor:
    if objective.categorical:
        return (expected.argmax(-1) == found.argmax(-1)).double()
    return F.cosine_similarity(expected.double(), found.double(), dim=-1)


def _check_finite(predictions: Tensor, weight: Tensor, whose: str, index: int) -> None:
    """What stands at padding is nobody's business."""
    finite = torch.isfinite(predictions).all(-1) | (weight == 0)
    if not finite.all():
        example = int((~finite).nonzero()[0][0])
        raise HprError(
            f"the {whose}'s output is not finite on batch {index}, example {example}: check that input and the weights"
        )


def _estimate(values: Tensor) -> Estimate:
    if not torch.isfinite(values).all():
        raise HprError("the divergence is not finite: the outputs exceed what float32 holds, check the student's weights")
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(max(float(values.mean()), 0.0), error)  # rounding may leave −1e-9 where the two are equal


def _targets(batch: Batch, objective: Objective) -> Tensor | None:
    """The token that each position predicts, (B, T), −100 where none; None where the batch does not say."""
    if objective.shifts_labels:
        ids = batch.get("labels", batch.get("input_ids", batch.get(POSITIONAL)))
        if ids is None or ids.is_floating_point() or ids.dim() != 2:
            return None
        mask = batch.get("attention_mask")
        return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    return batch.get("labels") if objective.labels == "tokens" else None


def _token_losses(logits: Tensor, targets: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    if objective.shifts_labels:
        logits, targets = logits[:, :-1], targets[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses, (targets != IGNORED).double()
