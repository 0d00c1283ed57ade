"""The healing trainer with latents: a check measures what the coded file would be, and the best file is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hpr.evaluation.cost import coded_bytes
from hpr.healing.coded.budget import ByteBudget, put
from hpr.healing.coded.latents import Latents
from hpr.healing.coded.optimizer import CodedAdam, Pressure
from hpr.healing.history import VALIDATION
from hpr.healing.schedule import Schedule
from hpr.healing.setup import TrainingSetup
from hpr.healing.teacher_cache import TargetCache
from hpr.healing.trainer import BestWeights, HealingTrainer
from hpr.nn.coded import codes_of, other_codes_of
from hpr.rounding.search import Rounded

STEPS = 37.5  # grid steps: the learning rate of latents over that of the recipe, 0.015 steps per update by default


class CodedHealing:
    """A coded student in training: its ``latents``, the ``budget`` of its file, and the best file so far, ``fitted``."""

    def __init__(self, student: nn.Module, budget: ByteBudget):
        self.student, self.budget = student, budget
        self.latents = Latents(student, {site: coded.codes() for site, coded in codes_of(student).items()})
        size = coded_bytes(student, codes_of(student), other_codes_of(student))
        self.pressure = Pressure(self.latents, budget, size)
        self.fitted: Rounded | None = None

    @contextmanager
    def trainer(
        self, student: nn.Module, setup: TrainingSetup, args: TrainingArguments, schedule: Schedule, cache: TargetCache | None
    ) -> Iterator[CodedTrainer]:
        """The trainer of a run (see ``hpr.healing.train.run``). It writes no checkpoints, and gradients are not clipped."""
        args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
        args.max_grad_norm = 0.0  # the price of a bit is in units of the loss, so a gradient keeps its size
        yield CodedTrainer(student, setup, args, schedule, cache, self)

    def optimizer(self, groups: list[dict[str, Any]], learning_rate: float) -> CodedAdam:
        """Trains latents, and everything in ``groups`` that is no weight of a site."""
        weights = {id(latent.weight) for latent in self.latents}
        floats = [group for group in groups if id(group["params"][0]) not in weights]
        return CodedAdam(floats, self.latents, STEPS * learning_rate, self.pressure)

    @contextmanager
    def as_file(self) -> Iterator[Rounded | None]:
        """The student as its file would hold it now, within its budget, and the codes; None, and as it is, if none fits."""
        weights = {id(latent.weight) for latent in self.latents}
        floats = {name: one for name, one in self.student.named_parameters() if id(one) not in weights}
        kept = {name: one.detach().clone() for name, one in floats.items()}
        nearest = self.budget.file(self.student, self.latents)
        self.pressure.correct(nearest.bytes)
        fitted = self.budget.fit(self.student, self.latents, nearest)
        if fitted is not None:
            put(self.student, fitted)
        try:
            yield fitted
        finally:
            with torch.no_grad():
                for name, one in floats.items():
                    one.copy_(kept[name])
            self.latents.write(self.budget.rule())


class CodedTrainer(HealingTrainer):
    """Trains latents in place of weights. ``best`` holds the weights of the file of least validation loss."""

    def __init__(
        self,
        student: nn.Module,
        setup: TrainingSetup,
        args: TrainingArguments,
        schedule: Schedule,
        cache: TargetCache | None,
        healing: CodedHealing,
    ):
        super().__init__(student, setup, args, schedule, cache)
        self.healing = healing

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.healing.optimizer(self.groups, self.setup.recipe.learning_rate)
        return self.optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.healing.pressure.begin(float(loss.detach()))
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.healing.as_file() as fitted:
            metrics = super().evaluate(*args, **kwargs)
            value = metrics[VALIDATION]
            if fitted is not None and (self.best is None or value < self.best.validation):
                weights = {name: one.detach().clone() for name, one in self.student.state_dict().items()}
                self.best = BestWeights(self.state.global_step, value, weights)
                self.healing.fitted = fitted
        return metrics
