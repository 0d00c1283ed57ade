"""Compare the outputs of a student with those of its teacher on the same batches. Labels are optional."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpr.data.batches import in_input_order
from hpr.errors import HprError
from hpr.profiling.objectives import Objective
from hpr.profiling.outputs import first_not_finite
from hpr.runtime.batch import IGNORED, POSITIONAL, Batch, BatchLike
from hpr.runtime.hooks import eval_mode, run, to_device_of


@dataclass(frozen=True)
class Estimate:
    """A mean over examples and its standard error. The error is None if there is only one example."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """The comparison of a student with its teacher on the same batches. A value that does not apply is None.

    ``divergence``: nats per example. ``agreement``: share of positions with the same top class, or of yes/no answers that are
    the same. ``cosine``: mean cosine of embeddings or hidden states. ``correlation``: of scores that are single numbers
    (Pearson), None if one of the models gives the same score throughout. ``teacher_loss`` and ``student_loss``: nats per
    predicted token, if the batches have target tokens. ``teacher`` and ``student``: outputs (examples, d) in the order of the
    user's data, if there is one vector per example.
    """

    examples: int
    divergence: Estimate
    agreement: float | None
    cosine: float | None
    correlation: float | None
    teacher_loss: float | None
    student_loss: float | None
    teacher: Float[Tensor, "examples d"] | None
    student: Float[Tensor, "examples d"] | None

    @property
    def likeness(self) -> tuple[str, float | None]:
        """What says in one number how alike the outputs are: its name, and its value of at most 1 (None if undefined)."""
        if self.agreement is not None:
            return "agreement with the original", self.agreement
        if self.cosine is not None:
            return "cosine to the original", self.cosine
        return "correlation with the original", self.correlation


def compare(student: nn.Module, teacher: nn.Module, batches: Sequence[BatchLike], objective: Objective) -> Comparison:
    """Run both models once over the batches, and compare their outputs.

    Raises ``HprError`` if there are no batches, if an output is not finite (the message names model and batch), if the outputs
    differ in shape, and if the objective does not fit them.
    """
    divergences, vectors = [], []
    matching, losses = _Share(), (_Share(), _Share())
    with torch.no_grad(), eval_mode(teacher), eval_mode(student):
        for index, batch in _numbered(batches, teacher):
            outputs = run(teacher, batch), run(student, batch)
            expected, weight = objective.read(outputs[0], batch)
            predicted, _ = objective.read(outputs[1], batch)
            if expected.shape != predicted.shape:
                shapes = f"{tuple(predicted.shape)}, the teacher's {tuple(expected.shape)}"
                raise HprError(f"on batch {index} the student's output has shape {shapes}: compare models of the same task")
            if weight.shape != expected.shape[:-1]:
                shape = tuple(expected.shape)
                raise HprError(f"objective {objective.name!r} does not fit outputs of shape {shape}: give another objective")
            _check_finite(expected, weight, "teacher", index)
            _check_finite(predicted, weight, "student", index)
            divergences.append(objective.divergence(outputs[0], outputs[1], batch).double())
            matching.add(_match(expected, predicted, objective), weight)
            targets = _targets(batch, objective)
            if targets is not None and targets.shape == expected.shape[:2]:  # some models put a picture's positions in between
                for share, logits in zip(losses, (expected, predicted), strict=True):
                    share.add(*_token_losses(logits, targets, objective))
            if expected.dim() == 2:
                vectors.append((expected.float(), predicted.float()))
    divergence = torch.cat(divergences)
    teacher_rows, student_rows = (
        [in_input_order(torch.cat(parts), batches) for parts in zip(*vectors, strict=True)] if vectors else (None, None)
    )
    numbers = not objective.distribution.logits and teacher_rows is not None and teacher_rows.shape[1] == 1
    return Comparison(
        examples=len(divergence),
        divergence=_estimate(divergence),
        agreement=matching.value if objective.distribution.logits else None,
        cosine=None if objective.distribution.logits or numbers else matching.value,
        correlation=_correlation(teacher_rows, student_rows) if numbers else None,
        teacher_loss=losses[0].value,
        student_loss=losses[1].value,
        teacher=teacher_rows,
        student=student_rows,
    )


def divergence(student: nn.Module, teacher: nn.Module, batches: Sequence[BatchLike], objective: Objective) -> Estimate:
    """The mean divergence from the teacher in nats per example (see ``hpr.profiling.objectives``) and its standard error."""
    return compare(student, teacher, batches, objective).divergence


def embeddings(model: nn.Module, batches: Sequence[BatchLike], objective: Objective) -> Float[Tensor, "examples d"]:
    """The output vector of each example in float32, in the order of the user's data: embeddings, or a classifier's logits.

    Raises ``HprError`` as ``compare`` does, and if the objective gives a vector for every position.
    """
    rows = []
    with torch.no_grad(), eval_mode(model):
        for index, batch in _numbered(batches, model):
            read, weight = objective.read(run(model, batch), batch)
            if read.dim() != 2:
                shape = tuple(read.shape)
                raise HprError(
                    f"objective {objective.name!r} gives outputs of shape {shape}, not one per example: give another"
                )
            _check_finite(read, weight, "model", index)
            rows.append(read.float())
    return in_input_order(torch.cat(rows), batches)


def cosine(first: Float[Tensor, "examples d"], second: Float[Tensor, "examples d"]) -> float:
    """The mean cosine between corresponding rows of two matrices."""
    return float(F.cosine_similarity(first.double(), second.double(), dim=-1).mean())


def neighbour_agreement(first: Float[Tensor, "examples d1"], second: Float[Tensor, "examples d2"], k: int = 10) -> float:
    """The share of an example's k nearest neighbours (by cosine) that two embeddings have in common, the mean over examples.

    The two widths may differ. With at most k examples, all others are neighbours, and the result is 1. Raises ``HprError`` for
    fewer than two examples, and for embeddings of different length.
    """
    if len(first) != len(second) or len(first) < 2:
        raise HprError(
            f"{len(first)} and {len(second)} embeddings cannot be compared: give those of the same examples, at least two"
        )
    k = min(k, len(first) - 1)
    hits = 0
    unit = [F.normalize(rows.float(), dim=-1) for rows in (first, second)]
    for start in range(0, len(first), 1024):
        near = []
        for rows in unit:
            similarity = rows[start : start + 1024] @ rows.T
            index = torch.arange(len(similarity), device=rows.device)
            similarity[index, index + start] = -torch.inf  # an example is not its own neighbour
            near.append(similarity.topk(k).indices)
        hits += int((near[0].unsqueeze(2) == near[1].unsqueeze(1)).sum())
    return hits / (k * len(first))


def accuracy(logits: Float[Tensor, "examples classes"], labels: Sequence[int] | Int[Tensor, " examples"]) -> float:
    """The share of rows whose top class is the label. Raises ``HprError`` if labels and logits do not fit together."""
    target = torch.as_tensor(labels).long().to(logits.device)
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise HprError(
            f"labels of shape {tuple(target.shape)} do not fit outputs {tuple(logits.shape)}: give one for each example"
        )
    outside = (target < 0) | (target >= logits.shape[1])
    if outside.any():
        first = int(outside.nonzero()[0])
        raise HprError(f"label {int(target[first])} of example {first} is no class: give one from 0 to {logits.shape[1] - 1}")
    return float((logits.argmax(-1) == target).double().mean())


class _Share:
    """A weighted mean of values that are added in parts."""

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0

    def add(self, values: Tensor, weights: Tensor) -> None:
        self.total += float(torch.where(weights > 0, values.double() * weights, 0.0).sum())
        self.weight += float(weights.sum())

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


def _numbered(batches: Sequence[BatchLike], model: nn.Module) -> Iterator[tuple[int, Batch]]:
    """The batches with their numbers, on the model's device. Raises ``HprError`` if there are none."""
    if not len(batches):
        raise HprError("no batches to evaluate on: give at least one")
    return ((index, to_device_of(batch, model)) for index, batch in enumerate(batches))


def _match(expected: Tensor, predicted: Tensor, objective: Objective) -> Tensor:
    """For each position the share of equal answers, or the cosine of the two outputs where they are no answers."""
    same = objective.distribution.same(expected, predicted)
    return F.cosine_similarity(expected.double(), predicted.double(), dim=-1) if same is None else same


def _correlation(first: Tensor | None, second: Tensor | None) -> float | None:
    """Pearson's correlation between two columns of numbers (examples, 1); None if it is not defined."""
    if first is None or second is None or len(first) < 2:
        return None
    one, two = (rows[:, 0].double() - rows[:, 0].double().mean() for rows in (first, second))
    size = float(one.norm() * two.norm())
    return float(one @ two) / size if size > 0 else None


def _check_finite(predictions: Tensor, weight: Tensor, owner: str, index: int) -> None:
    """Raise ``HprError`` if an output is not finite. Positions of weight 0 (padding) are not checked."""
    if (example := first_not_finite(predictions, weight)) is not None:
        raise HprError(
            f"the {owner}'s output is not finite on batch {index}, example {example}: check this input and the weights"
        )


def _estimate(values: Tensor) -> Estimate:
    """The mean of the divergences of all examples. Raises ``HprError`` if one is not finite."""
    if not torch.isfinite(values).all():
        raise HprError("the divergence is not finite, because outputs exceed the range of float32: check the student's weights")
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(max(float(values.mean()), 0.0), error)  # rounding may give −1e-9 for equal models


def _targets(batch: Batch, objective: Objective) -> Tensor | None:
    """The token that each position predicts, (batch, positions), −100 for none; None if the batch has no such tokens."""
    if objective.shifts_labels:
        ids = batch.get("labels", batch.get("input_ids", batch.get(POSITIONAL)))
        if ids is None or ids.is_floating_point() or ids.dim() != 2:
            return None
        mask = batch.get("attention_mask")
        return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    return batch.get("labels") if objective.labels == "tokens" else None


def _token_losses(logits: Tensor, targets: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The loss of each position in nats, and its weight: 1, or 0 for a position without a target."""
    if objective.shifts_labels:
        logits, targets = logits[:, :-1], targets[:, 1:]
    targets = targets.masked_fill(targets >= logits.shape[-1], IGNORED)  # the place of a picture may have an id without logit
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses, (targets != IGNORED).double()
