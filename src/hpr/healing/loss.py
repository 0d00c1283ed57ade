"""The global loss: what a student is trained to keep of its teacher, as one number a batch.

Every part is relative, so that weights mean the same for every model: a Gaussian output's squared error against the teacher's
own square, a categorical one's T² · KL per prediction, hidden states like Gaussian outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy.lookup import has_module
from hpr.anatomy.model import Anatomy
from hpr.errors import HprError
from hpr.evaluation.divergence import Estimate, divergence
from hpr.healing.stages import Forcing
from hpr.healing.teacher_cache import Cache, Taught
from hpr.nn.bank import bank_of
from hpr.nn.router import Taken, recorded, spread
from hpr.profiling.objectives import Objective
from hpr.runtime.batch import IGNORED, Batch, examples_in, mask_of
from hpr.runtime.hooks import captured_hidden_states, eval_mode, run, to_device_of

DECIDED = 0.5  # of the entropy of even routes: what a router may keep at the end of a run


@dataclass(frozen=True)
class Weights:
    """How much each part counts; 0 leaves it out. ``temperature`` softens categorical outputs (Hinton et al. 2015).

    ``hidden``: the hidden states that each layer of the original emits (Romero et al. 2015), mean over layers. ``relations``:
    the inner products between the output vectors of a batch's examples (Park et al. 2019), where there is one for each.
    ``labels``: the loss that labels in the batches give. ``routing``: where weights depend on the input, what keeps the
    routers from using one expert for all (the entropy of the mean route) and lets them decide late (``undecided``).
    """

    outputs: float = 1.0
    hidden: float = 0.0
    relations: float = 0.0
    labels: float = 0.0
    routing: float = 0.01
    temperature: float = 2.0

    def __post_init__(self) -> None:
        parts = (self.outputs, self.hidden, self.relations, self.labels)
        if min(*parts, self.routing) < 0 or not sum(parts) > 0 or not self.temperature > 0:
            raise HprError(f"{self}: weights must not be negative, one must be above 0, and so must the temperature")


class GlobalLoss:
    """The loss of a student on a batch, beside its teacher; the teacher runs without gradients, in evaluation mode."""

    def __init__(self, teacher: nn.Module, anatomy: Anatomy, objective: Objective, weights: Weights):
        self.teacher, self.anatomy, self.objective, self.weights = teacher, anatomy, objective, weights
        self.cache: Cache | None = None
        self.progress = 0.0  # of the run, from 0 to 1: what routing is asked for changes with it
        self.entropy: float | None = None  # of single routes on the last batch, as a share of that of even ones
        upper = anatomy.stacks[1:] if objective.name == "seq2seq" else ()
        self._above = {path for stack in upper for path in stack.blocks}

    def __call__(self, student: nn.Module, batch: Batch, forcing: Forcing | None = None) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum, a scalar, and its parts. Raises ``HprError`` where labels are wanted and there are none.

        ``student`` may be wrapped for several processes: its forward is called once, as it is. Under an active ``forcing``
        (see ``stages``) the parts are those of each layer by itself, and of the outputs.
        """
        inner = getattr(student, "module", student)
        forced = forcing is not None and forcing.active
        paths = [path for path in self.anatomy.blocks if has_module(inner, path)] if self.weights.hidden or forced else []
        wanted = self.weights.outputs or self.weights.relations or paths
        taught = self.taught(batch, paths, kept=not forced) if wanted else None  # labels alone need no teacher
        bank = bank_of(inner) if self.weights.routing else None
        routes: AbstractContextManager[Taken] = nullcontext({}) if bank is None else recorded(bank.routing)
        with captured_hidden_states(inner, paths) as found, routes as taken:
            learnt = run(student, batch)
        parts = {}
        if taken:
            by_router = entropies(taken)
            parts["routing"] = self.weights.routing * undecided(by_router, self.progress)
            self.entropy = float(torch.stack([single.detach() for single, _ in by_router]).mean())
        if taught is not None and self.weights.outputs:
            parts["outputs"] = self.weights.outputs * self.outputs(taught, learnt, batch)
        if taught is not None and self.weights.relations:
            if taught.predictions.dim() != 2:
                raise HprError(
                    f"relations are between examples with one output vector each, objective {self.objective.name!r} gives "
                    f"{tuple(taught.predictions.shape)}: set their weight to 0"
                )
            found_rows, _ = self.objective.read(learnt, batch)
            parts["relations"] = self.weights.relations * related(taught.predictions, found_rows)
        pairs = [] if taught is None else [(path, taught.hidden[path], found[path]) for path in paths]
        if forced:
            assert forcing is not None
            pairs += [(path, forcing.inputs[path], own) for path, own in forcing.own.items()]
        if pairs:
            distances = [squared(expected, given, self.mask(batch, path, expected)) for path, expected, given in pairs]
            parts["hidden"] = (1.0 if forced else self.weights.hidden) * torch.stack(distances).mean()
        if self.weights.labels:
            parts["labels"] = self.weights.labels * labelled(learnt, batch)
        return torch.stack(list(parts.values())).sum(), {name: float(part.detach()) for name, part in parts.items()}

    def mask(self, batch: Batch, path: str, states: Tensor) -> Tensor:
        """Which positions of a layer's hidden states count: in a decoder those that predict something."""
        if path in self._above and (weight := _predicting(batch)) is not None and weight.shape == states.shape[:2]:
            return weight.to(states.device)
        return mask_of(batch, states)

    def taught(self, batch: Batch, paths: Sequence[str] = (), kept: bool = False) -> Taught:
        """What the teacher gives on a batch; where it is ``kept`` in a cache it runs once only."""
        if kept and self.cache is not None:
            return self.cache(batch, lambda: self.taught(batch, paths))
        with torch.no_grad(), eval_mode(self.teacher), captured_hidden_states(self.teacher, paths) as hidden:
            predictions, weight = self.objective.read(run(self.teacher, batch), batch)
        return Taught(predictions, weight, hidden)

    def guard(self, student: nn.Module, batches: Sequence[Batch]) -> Estimate:
        """What training must not make worse: the divergence from the teacher in nats per example; with labels this loss.

        What routers owe is left out: it changes with the progress of a run, and says nothing of quality.
        """
        if not self.weights.labels:
            return divergence(student, self.teacher, batches, self.objective)
        with torch.no_grad(), eval_mode(student):
            parts = [self(student, to_device_of(batch, student))[1] for batch in batches]
        values = [sum(value for name, value in own.items() if name != "routing") for own in parts]
        found = list(zip(values, map(examples_in, batches), strict=True))
        return Estimate(sum(value * count for value, count in found) / sum(count for _, count in found), None)

    def outputs(self, taught: Taught, learnt: Any, batch: Batch) -> Tensor:
        """Divergence of the outputs, mean over predictions."""
        expected, weight = taught.predictions, taught.weight
        found, _ = self.objective.read(learnt, batch)
        if not self.objective.categorical:
            return squared(expected, found, weight)
        temperature = self.weights.temperature
        log_p, log_q = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (expected, found))
        distance = (log_p.exp() * (log_p - log_q)).sum(-1)
        return temperature**2 * (distance * weight).sum() / weight.sum().clamp(min=1)


def undecided(found: Sequence[tuple[Tensor, Tensor]], progress: float) -> Tensor:
    """What routers still owe by their ``entropies``, from 0 to about 2, mean over routers.

    The mean route should be even (load balance, Shazeer et al. 2017). A single one may be as even as it likes at first; what is
    allowed falls to ``DECIDED`` over the run.
    """
    allowed = 1 - progress * (1 - DECIDED)
    owed = [(single - allowed).clamp(min=0).square() + 1 - mean for single, mean in found]
    return torch.stack(owed).mean()


def entropies(taken: Taken) -> list[tuple[Tensor, Tensor]]:
    """For each call of a router the mean entropy of single routes, and that of the mean route, as shares of even routes'."""
    found = []
    for calls in taken.values():
        for alpha, counted in calls:
            rows = alpha.flatten(0, -2) if counted is None else alpha[counted.bool()]
            shares = rows.float() / rows.shape[-1]
            found.append((spread(shares).mean(), spread(shares.mean(0))))
    return found


def _predicting(batch: Batch) -> Tensor | None:
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
    if labels is not None:
        return (labels != IGNORED).float()
    return None if mask is None else mask.float()


def squared(expected: Tensor, found: Tensor, weight: Tensor) -> Tensor:
    """Σ ‖e − ê‖² / Σ ‖e‖² over the vectors that count: 0 where equal, 1 where nothing is left."""
    expected, found = expected.float(), found.float()
    error = ((expected - found).square().sum(-1) * weight).sum()
    return error / (expected.square().sum(-1) * weight).sum().clamp(min=1e-12)


def related(expected: Tensor, found: Tensor) -> Tensor:
    """Σ (eᵢ·eⱼ − êᵢ·êⱼ)² / Σ (eᵢ·eⱼ)² over all pairs of different rows of two (n, d)."""
    apart = 1 - torch.eye(len(expected), device=expected.device)
    wanted, given = (rows.float() @ rows.float().T for rows in (expected, found))
    return ((wanted - given).square() * apart).sum() / (wanted.square() * apart).sum().clamp(min=1e-12)


def labelled(outputs: Any, batch: Batch) -> Tensor:
    """The model's own loss where it gives one; cross-entropy with ``labels`` of classes otherwise."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is not None:
        return loss
    labels = batch.get("labels")
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if labels is None or logits is None:
        raise HprError("labels count in the loss, but this batch or model has none: set their weight to 0, or bring 'labels'")
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
