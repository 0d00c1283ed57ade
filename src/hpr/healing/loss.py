"""The global loss: how far a student is from its teacher on a batch, as one number for the whole model.

Every part is relative, so a weight means the same for every model. A Gaussian output counts by its squared error divided by the
squared norm of the teacher's output, a categorical output by T² · KL per prediction, hidden states like Gaussian outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy.lookup import has_module, module_at
from hpr.anatomy.model import Anatomy
from hpr.errors import DataError, HprError, check_settings
from hpr.evaluation.divergence import Estimate, divergence
from hpr.healing.teacher_cache import TeacherTargets
from hpr.nn.bank import bank_of
from hpr.nn.router import Taken, recorded, spread
from hpr.profiling.layout import turned_modules
from hpr.profiling.objectives import Objective
from hpr.runtime.batch import IGNORED, Batch, examples_in, has_positions_first, is_square, mask_of
from hpr.runtime.hooks import captured_hidden_states, eval_mode, run, to_device_of

DECIDED = 0.5  # entropy that routers may keep at the end of a run, relative to even routes


@dataclass(frozen=True)
class Weights:
    """The weight of each part of the loss; 0 leaves a part out.

    ``outputs``: the outputs of the model. ``temperature`` softens categorical ones (Hinton et al. 2015). ``hidden``: the hidden
    states after each layer of the teacher (Romero et al. 2015), mean over layers. ``relations``: the inner products between the
    output vectors of a batch's examples (Park et al. 2019), for models with one output vector per example. ``labels``: the
    model's own loss on the labels in the batches. ``routing``: for models with routers, a penalty on routers that use one
    expert for every input (low entropy of the mean route) or that do not decide (see ``undecided``).

    Raises ``HprError`` for negative weights, if all weights are 0, and for a temperature of 0 or below.

    >>> Weights(hidden=0.5).outputs
    1.0
    """

    outputs: float = 1.0
    hidden: float = 0.0
    relations: float = 0.0
    labels: float = 0.0
    routing: float = 0.01
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_settings(self)
        parts = (self.outputs, self.hidden, self.relations, self.labels)
        if min(*parts, self.routing) < 0 or not sum(parts) > 0 or not self.temperature > 0:
            raise HprError(f"{self}: weights must not be negative, one must be above 0, and so must the temperature")


class BatchLoss(NamedTuple):
    """The loss of one batch. ``total`` (scalar, with gradient) is the sum of ``parts`` (weighted, without gradient).

    ``entropy``: mean entropy of single routes relative to even routes, from 0 to 1; None without routers.
    """

    total: Tensor
    parts: dict[str, Tensor]
    entropy: Tensor | None = None

    def floats(self) -> dict[str, float]:
        """The parts as Python numbers. On a GPU this waits for the device."""
        return {name: float(part) for name, part in self.parts.items()}


class GlobalLoss:
    """Computes the loss of a student on a batch. The teacher runs without gradients and in evaluation mode."""

    def __init__(self, teacher: nn.Module, anatomy: Anatomy, objective: Objective, weights: Weights):
        self.teacher, self.anatomy, self.objective, self.weights = teacher, anatomy, objective, weights
        upper = anatomy.stacks[1:] if objective.upper_stack_predicts else ()
        self._above = {path for stack in upper for path in stack.blocks}
        self._turned: frozenset[nn.Module] | None = None  # see ``turned_modules``; not needed before there is a square batch

    def __call__(
        self, student: nn.Module, batch: Batch, progress: float = 0.0, targets: TeacherTargets | None = None
    ) -> BatchLoss:
        """Return the weighted sum of all parts, and the parts.

        ``student`` may be wrapped for several processes: its forward is called once. ``progress``: the fraction of the run that
        is done, from 0 to 1; the routing part depends on it. ``targets``: what the teacher gives for this batch, if it is known
        already. Raises ``HprError`` if labels count and the batch or the model has none.
        """
        inner = getattr(student, "module", student)
        layers = self.layers(inner)
        if targets is None and self.needs_teacher(layers):
            targets = self.targets(batch, layers)
        bank = bank_of(inner) if self.weights.routing else None
        routes: AbstractContextManager[Taken] = nullcontext({}) if bank is None else recorded(bank.routing)
        with captured_hidden_states(inner, layers) as hidden, routes as taken:
            outputs = run(student, batch)
        parts, entropy = {}, None
        if taken:
            by_router = entropies(taken)
            parts["routing"] = self.weights.routing * undecided(by_router, progress)
            entropy = torch.stack([single.detach() for single, _ in by_router]).mean()
        if targets is not None:
            parts |= self._imitation(targets, outputs, batch)
            if pairs := self.hidden_pairs(layers, targets, hidden):
                distances = [squared(expected, given, self.mask(batch, path, expected)) for path, expected, given in pairs]
                parts["hidden"] = self.hidden_weight * torch.stack(distances).mean()
        if self.weights.labels:
            parts["labels"] = self.weights.labels * labelled(outputs, batch)
        total = torch.stack(list(parts.values())).sum()
        return BatchLoss(total, {name: part.detach() for name, part in parts.items()}, entropy)

    @property
    def hidden_weight(self) -> float:
        """The weight of the hidden states."""
        return self.weights.hidden

    def layers(self, student: nn.Module) -> list[str]:
        """Paths of the layers whose hidden states count. Dropped layers have none."""
        return self.blocks_in(student) if self.weights.hidden else []

    def blocks_in(self, student: nn.Module) -> list[str]:
        """Paths of the teacher's layers that the student still has."""
        return [path for path in self.anatomy.blocks if has_module(student, path)]

    def needs_teacher(self, layers: Sequence[str]) -> bool:
        """Whether any part compares with the teacher. Labels alone do not."""
        return bool(self.weights.outputs or self.weights.relations or layers)

    def hidden_pairs(
        self, layers: Sequence[str], targets: TeacherTargets, hidden: Mapping[str, Tensor]
    ) -> list[tuple[str, Tensor, Tensor]]:
        """Path, expected and given hidden states of each layer."""
        return [(path, targets.hidden[path], hidden[path]) for path in layers]

    def mask(self, batch: Batch, path: str, states: Tensor) -> Tensor:
        """The weight (…) of each hidden state (…, d). In a decoder only positions that predict something count."""
        if self._turned is None and is_square(batch):
            self._turned = turned_modules(self.teacher, [to_device_of(batch, self.teacher)])
        turned = self._turned is not None and module_at(self.teacher, path) in self._turned
        if path in self._above and (weight := _predicting(batch)) is not None:
            weight = weight.T if has_positions_first(states, batch, turned) else weight
            if weight.shape == states.shape[:2]:
                return weight.to(states.device)
        return mask_of(batch, states, turned)

    def targets(self, batch: Batch, layers: Sequence[str] = ()) -> TeacherTargets:
        """Run the teacher on a batch, and return its predictions and the hidden states after ``layers``."""
        with torch.no_grad(), eval_mode(self.teacher), captured_hidden_states(self.teacher, layers) as hidden:
            predictions, weight = self.objective.read(run(self.teacher, batch), batch)
        return TeacherTargets(predictions, weight, hidden)

    def validate(self, student: nn.Module, batches: Sequence[Batch]) -> Estimate:
        """Return the validation loss: divergence from the teacher in nats per example, or this loss if labels count.

        The routing part is left out: it changes with the progress of a run, and says nothing about quality.
        """
        if not self.weights.labels:
            return divergence(student, self.teacher, batches, self.objective)
        with torch.no_grad(), eval_mode(student):
            parts = [self(student, to_device_of(batch, student)).floats() for batch in batches]
        values = [sum(value for name, value in by_name.items() if name != "routing") for by_name in parts]
        weighted = list(zip(values, map(examples_in, batches), strict=True))
        return Estimate(sum(value * count for value, count in weighted) / sum(count for _, count in weighted), None)

    def outputs(self, targets: TeacherTargets, given: Any, batch: Batch) -> Tensor:
        """Divergence of the outputs from the targets, mean over predictions."""
        expected, weight = targets.predictions, targets.weight
        predictions, _ = self.objective.read(given, batch)
        if not self.objective.distribution.logits:
            return squared(expected, predictions, weight)
        temperature = self.weights.temperature
        distance = self.objective.distribution.distance(expected, predictions, temperature)
        return temperature**2 * (distance * weight).sum() / weight.sum().clamp(min=1)

    def _imitation(self, targets: TeacherTargets, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The parts that compare outputs with the teacher's."""
        parts = {}
        if self.weights.outputs:
            parts["outputs"] = self.weights.outputs * self.outputs(targets, outputs, batch)
        if self.weights.relations:
            if targets.predictions.dim() != 2:
                raise HprError(
                    f"relations are between examples with one output vector each, objective {self.objective.name!r} gives "
                    f"{tuple(targets.predictions.shape)}: set their weight to 0"
                )
            predictions, _ = self.objective.read(outputs, batch)
            parts["relations"] = self.weights.relations * related(targets.predictions, predictions)
        return parts


def undecided(by_router: Sequence[tuple[Tensor, Tensor]], progress: float) -> Tensor:
    """Return the routing penalty from the ``entropies`` of all routers, from 0 to about 2, mean over routers.

    The mean route should be even (load balance, Shazeer et al. 2017). A single route may be even at first; the entropy that is
    allowed falls to ``DECIDED`` over the run.
    """
    allowed = 1 - progress * (1 - DECIDED)
    owed = [(single - allowed).clamp(min=0).square() + 1 - mean for single, mean in by_router]
    return torch.stack(owed).mean()


def entropies(taken: Taken) -> list[tuple[Tensor, Tensor]]:
    """For each call of a router: mean entropy of single routes, and entropy of the mean route, relative to even routes."""
    pairs = []
    for calls in taken.values():
        for alpha, counted in calls:
            rows = alpha.flatten(0, -2) if counted is None else alpha[counted.bool()]
            shares = rows.float() / rows.shape[-1]
            pairs.append((spread(shares).mean(), spread(shares.mean(0))))
    return pairs


def _predicting(batch: Batch) -> Tensor | None:
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
    if labels is not None:
        return (labels != IGNORED).float()
    return None if mask is None else mask.float()


def squared(expected: Tensor, given: Tensor, weight: Tensor) -> Tensor:
    """Σ w ‖e − ê‖² / Σ w ‖e‖² over the vectors of (…, d), with weights (…): 0 if equal, 1 if ê is 0."""
    expected, given = expected.float(), given.float()
    error = ((expected - given).square().sum(-1) * weight).sum()
    return error / (expected.square().sum(-1) * weight).sum().clamp(min=1e-12)


def related(expected: Tensor, given: Tensor) -> Tensor:
    """Σ (eᵢ·eⱼ − êᵢ·êⱼ)² / Σ (eᵢ·eⱼ)² over all pairs of different rows of two (n, d)."""
    apart = 1 - torch.eye(len(expected), device=expected.device)
    wanted, found = (rows.float() @ rows.float().T for rows in (expected, given))
    return ((wanted - found).square() * apart).sum() / (wanted.square() * apart).sum().clamp(min=1e-12)


def labelled(outputs: Any, batch: Batch) -> Tensor:
    """The model's own loss if it returns one; else the cross-entropy with class ``labels``."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is not None:
        return loss
    labels = batch.get("labels")
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if labels is None or logits is None:
        raise DataError("labels count in the loss, but this batch or model has none: set their weight to 0, or bring 'labels'")
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
