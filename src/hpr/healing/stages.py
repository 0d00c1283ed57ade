"""Two optional stages before the usual training: each layer by itself, then a blend from the original's weights.

Both stages lose against plain training (``docs/experiments.md``). ``train`` imports this module only if a recipe asks for them
(``Recipe.blocks``, ``Recipe.ramp``).

Block by block, each layer of the student gets the inputs of the teacher's same layer, so no layer has to correct the layers
below it (FitNets, Romero et al. 2015, train stage-wise; SHARP, Wang et al. 2025, warms up layer by layer). On the ramp, a site
returns (1 − t) · W x + t · Ŵ x, with the original weight W, the student's weight Ŵ, and t from 0 to 1.

Both work by hooks on the student. The hooks stay for the whole run, because the backward pass may compute activations again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import TrainingArguments

from hpr.anatomy.lookup import has_module, module_at
from hpr.anatomy.model import Anatomy
from hpr.errors import HprError
from hpr.healing.loss import GlobalLoss
from hpr.healing.recipe import Recipe
from hpr.healing.schedule import Schedule
from hpr.healing.setup import TrainingSetup
from hpr.healing.teacher_cache import TargetCache, TeacherTargets
from hpr.healing.trainer import CheckAfter, HealingTrainer
from hpr.nn.experts import SharedExperts
from hpr.nn.site import SharedSite
from hpr.runtime.batch import Batch

BLOCKS, RAMP, WHOLE = "block by block", "ramp", "end to end"


@dataclass(frozen=True)
class Stages:
    """The stage of each step: the first ``blocks`` steps, the next ``ramp`` steps, and the rest of ``steps``."""

    steps: int
    blocks: int = 0
    ramp: int = 0

    def at(self, step: int) -> str:
        """The stage of a step, from 0."""
        return BLOCKS if step < self.blocks else RAMP if step < self.blocks + self.ramp else WHOLE

    def blend(self, step: int) -> float:
        """The share of the student's own weights at a step; 1 outside the ramp."""
        return (step - self.blocks + 1) / (self.ramp + 1) if self.at(step) == RAMP else 1.0

    @property
    def ends(self) -> dict[int, str]:
        """The number of steps done at the end of each stage → its name. Empty stages are left out."""
        ends = ((self.blocks, BLOCKS), (self.blocks + self.ramp, RAMP), (self.steps, WHOLE))
        return {step: name for step, name in ends if step and self.at(step - 1) == name}


def stages_of(recipe: Recipe, steps: int) -> Stages:
    """The stages of a run of so many steps. A stage that is asked for has at least one step."""
    blocks, ramp = (math.ceil(share * steps) for share in (recipe.blocks, recipe.ramp))
    return Stages(steps, blocks, min(ramp, steps - blocks))


def gains(history: Sequence[Mapping[str, Any]], stages: Stages, before: float) -> list[dict[str, Any]]:
    """For each stage its steps and the validation loss before and after it, if it was measured."""
    measured = {row["step"]: row["validation"] for row in history if "validation" in row}
    rows, start = [], 0
    for end, name in stages.ends.items():
        after = measured.get(end)
        rows.append({"stage": name, "steps": end - start, "before": before, "after": after})
        start, before = end, before if after is None else after
    return rows


@contextmanager
def staged_trainer(
    learner: nn.Module, setup: TrainingSetup, args: TrainingArguments, schedule: Schedule, cache: TargetCache | None
) -> Iterator[HealingTrainer]:
    """Give a trainer whose run has stages; remove its hooks at the end.

    Raises ``HprError`` if a ramp would start from weights that are worse than the student's.
    """
    original = (setup.recipe.original or setup.loss.teacher).to(args.device)  # type: ignore[arg-type]
    runner = StageRunner(stages_of(setup.recipe, setup.steps), learner, setup.loss, original)
    try:
        runner.check(setup)
        loss = setup.loss if runner.forcing is None else BlockwiseLoss(setup.loss, runner.forcing)
        yield StagedTrainer(learner, replace(setup, loss=loss), args, schedule, cache, runner)
    finally:
        runner.close()


class StageRunner:
    """Switches the parts of the stages on at each step, and off for validation.

    ``original``: the model that the ramp starts from, the teacher or the aligned teacher.
    """

    def __init__(self, stages: Stages, student: nn.Module, loss: GlobalLoss, original: nn.Module):
        self.stages, self.student = stages, student
        self.forcing = TeacherForcing(student, loss.teacher, loss.anatomy) if stages.blocks else None
        self.ramp = WeightBlend(student, original) if stages.ramp else None

    def enter(self, step: int) -> None:
        """Set everything as a step needs it."""
        if self.ramp is not None:
            self.ramp.share = self.stages.blend(step)
        if self.forcing is not None:
            self.forcing.active = self.stages.at(step) == BLOCKS

    def leave(self) -> None:
        """Leave the student alone, without forcing and blending."""
        self.enter(self.stages.steps)

    def check(self, setup: TrainingSetup) -> None:
        """Raise ``HprError`` if a ramp starts from weights worse than the student's: another model's, or not aligned ones."""
        if self.ramp is None:
            return
        student_alone = setup.loss.validate(self.student, setup.validation[:1]).mean
        self.ramp.share = 0.0
        original = setup.loss.validate(self.student, setup.validation[:1]).mean
        self.leave()
        if not original < max(student_alone, 1e-12):
            raise HprError(
                f"the ramp starts at {original:.4g} nats per example, the student itself is at {student_alone:.4g}: if the "
                f"plan aligns layers, give the aligned teacher as original; else leave the ramp out"
            )

    def close(self) -> None:
        """Remove all hooks."""
        for part in (self.forcing, self.ramp):
            if part is not None:
                part.close()


class StagedTrainer(HealingTrainer):
    """A ``HealingTrainer`` whose steps belong to stages. Each stage ends with a check."""

    def __init__(
        self,
        student: nn.Module,
        setup: TrainingSetup,
        args: TrainingArguments,
        schedule: Schedule,
        cache: TargetCache | None,
        runner: StageRunner,
    ):
        super().__init__(student, setup, args, schedule, cache)
        self.runner = runner
        self.add_callback(_StageEnds(frozenset(runner.stages.ends)))

    def targets_of(self, batch: Batch, number: int | None) -> TeacherTargets | None:
        """Forced layers need the teacher to run at each step."""
        forcing = self.runner.forcing
        return None if forcing is not None and forcing.active else super().targets_of(batch, number)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        self.runner.enter(self.state.global_step)
        return super().compute_loss(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.runner.leave()
        return super().evaluate(*args, **kwargs)


class _StageEnds(CheckAfter):
    """Asks for a check at the end of each stage. Its class differs because a Trainer warns of two callbacks of one class."""


class TeacherForcing:
    """While ``active``, each layer of a student gets the inputs of the teacher's same layer in the teacher's last run.

    These are the hidden states, and other inputs that depend on the student's parameters: the encoder's output, shared
    positions. ``own``: path → the input that the lowest layer of each stack would have got from the student.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, anatomy: Anatomy):
        self.active = False
        self.inputs: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self._calls: dict[str, tuple[tuple, dict]] = {}
        self._lowest = {stack.block(0) for stack in anatomy.stacks}
        self._handles: list[RemovableHandle] = []
        for path in anatomy.blocks:
            if has_module(student, path):  # some are dropped
                source, target = module_at(teacher, path), module_at(student, path)
                self._handles.append(source.register_forward_pre_hook(self._note(path), with_kwargs=True))
                self._handles.append(target.register_forward_pre_hook(self._replace(path), with_kwargs=True))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _note(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.active:
                self._calls[path] = args, kwargs
                self.inputs[path] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _replace(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.active:
                return None
            if path in self._lowest:
                self.own[path] = args[0] if args else kwargs["hidden_states"]
            positional, named = self._calls[path]
            forced = tuple(
                _forced(value, positional[place] if place < len(positional) else None) for place, value in enumerate(args)
            )
            return forced, {name: _forced(value, named.get(name)) for name, value in kwargs.items()}

        return hook


def _forced(own: Any, teachers: Any) -> Any:
    """The teacher's tensor if the student's depends on its parameters."""
    return teachers if isinstance(own, Tensor) and own.requires_grad and isinstance(teachers, Tensor) else own


class BlockwiseLoss(GlobalLoss):
    """While the forcing is active: the error of each layer by itself, and of the outputs. Else the same as ``loss``."""

    def __init__(self, loss: GlobalLoss, forcing: TeacherForcing):
        super().__init__(loss.teacher, loss.anatomy, loss.objective, loss.weights)
        self.forcing = forcing

    @property
    def hidden_weight(self) -> float:
        return 1.0 if self.forcing.active else super().hidden_weight

    def layers(self, student: nn.Module) -> list[str]:
        return self.blocks_in(student) if self.forcing.active else super().layers(student)

    def hidden_pairs(
        self, layers: Sequence[str], targets: TeacherTargets, hidden: Mapping[str, Tensor]
    ) -> list[tuple[str, Tensor, Tensor]]:
        pairs = super().hidden_pairs(layers, targets, hidden)
        if self.forcing.active:
            pairs += [(path, self.forcing.inputs[path], own) for path, own in self.forcing.own.items()]
        return pairs


class WeightBlend:
    """Blends the output of each shared site with that of the original's site. ``share``: the part of the student's own."""

    def __init__(self, student: nn.Module, original: nn.Module):
        self.share = 1.0
        self._handles = [
            module.register_forward_hook(self._blend(module_at(original, module.path)), with_kwargs=True)
            for module in student.modules()
            if isinstance(module, SharedSite | SharedExperts)
        ]

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _blend(self, source: nn.Module) -> Any:
        fixed = {name: value.detach() for name, value in source.named_parameters()}  # views: nothing is copied

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            return None if self.share == 1 else functional_call(source, fixed, args, kwargs).lerp(output, self.share)

        return hook
