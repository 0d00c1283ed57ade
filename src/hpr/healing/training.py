"""The training itself: a student follows its teacher on batches, and keeps the best weights that it met on the guard."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from transformers import PreTrainedModel

from hpr.anatomy import describe
from hpr.evaluation.metrics import Estimate
from hpr.healing.augmentation import Augmentation
from hpr.healing.cache import LIMIT, Cache
from hpr.healing.claim import claim, facts_of
from hpr.healing.losses import GlobalLoss
from hpr.healing.recipe import CHECKPOINTING, Recipe, arguments
from hpr.healing.schedule import Schedule
from hpr.healing.sharding import shard
from hpr.healing.stages import Course, gains
from hpr.healing.trainer import HealingTrainer, Watch, groups, history, last_checkpoint
from hpr.models import quietly
from hpr.profiling.curvature import Progress, silent
from hpr.profiling.objectives import Batch, Objective, evaluating, objective_for

TARGETS = "targets"  # what the teacher gives, beside the checkpoints


@dataclass(frozen=True)
class Healing:
    """What came of it: ``GlobalLoss.guard`` before and after (divergence from the teacher, nats per example, without labels).

    ``best_step``: the step whose weights the student has now, 0 where none was better than at the start. ``history``: one row
    a check, with step, loss and guard. ``gains``: one row a stage, with the guard before and after.
    """

    before: Estimate
    after: Estimate
    best_step: int
    seconds: float
    history: list[dict[str, float]]
    gains: list[dict[str, Any]]
    recipe: Recipe

    def as_metrics(self) -> dict[str, Any]:
        """What metrics.json keeps of it."""
        return {
            "before": self.before.mean,
            "after": self.after.mean,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
            "history": self.history,
            "stages": self.gains,
        }


def train(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch] | Mapping[str, Sequence[Batch]],
    guard: Sequence[Batch],
    recipe: Recipe | None = None,
    objective: Objective | None = None,
    augment: Augmentation | None = None,
    shares: Mapping[str, float] | None = None,
    folder: Path | None = None,
    original: nn.Module | None = None,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> Healing:
    """Train a student in place until it does again what its teacher does; it is left with the best weights that were met.

    ``batches``: inputs, with or without labels, or several sources of them by name with ``shares`` of the steps. ``guard``:
    batches of other data; the weights of least divergence on them are kept, those of the start among them, so healing
    never makes that worse. ``augment`` changes inputs at random; the teacher labels what the student is shown. ``folder``:
    where checkpoints go; a run that was cut off and is started again with the same arguments goes on from the last one, and
    ends with the very weights that it would have had. ``original``: where the plan aligns layers, the aligned teacher
    (``alignment.align``), whose weights a ramp starts from. Under ``torchrun`` or ``accelerate launch`` every process calls
    this alike, and a step sees ``accumulate`` batches of each. Raises ``HprError`` for no batches, for a loss that is not
    finite, and for a folder with the checkpoints of another run.
    """
    recipe, goal, start = recipe or Recipe(), objective or objective_for(teacher), time.perf_counter()
    anatomy, device, initial = describe(teacher), next(student.parameters()).device, copy.deepcopy(student.state_dict())
    loss = GlobalLoss(teacher, anatomy, goal, recipe.weights)
    before = loss.guard(student, guard)
    with ExitStack() as stack:
        processes = PartialState(cpu=device.type == "cpu")
        if folder is None:
            folder = _common(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpr-heal-"))))
        with processes.main_process_first():
            claim(folder, facts_of(asdict(recipe), student, anatomy.fingerprint, batches, shares))
            checkpoint = last_checkpoint(folder)
        stack.enter_context(evaluating(student))  # for its end: every module is left in the mode that it was in
        args = arguments(recipe, folder, device)
        schedule = Schedule(batches, recipe.steps * recipe.accumulate * args.world_size, recipe.seed, augment, shares)
        teacher.to(args.device)
        if _repeats(schedule) and _fits(loss, schedule):
            loss.cache = Cache(folder / TARGETS)
        learner = student.to(args.device)
        if recipe.sharded:
            learner = shard(copy.deepcopy(student), anatomy, args.device)
        course = Course(recipe.stages, learner, teacher, anatomy, original or teacher)
        stack.callback(course.close)
        if recipe.checkpointing and isinstance(learner, PreTrainedModel):  # the Trainer leaves it on
            stack.callback(getattr(learner, f"{CHECKPOINTING}_disable"))
            stack.callback(learner.disable_input_require_grads)
        trainer = HealingTrainer(
            learner,
            args,
            schedule,
            loss,
            guard,
            groups(learner, recipe.rate, recipe.shared_rate, recipe.delta_decay),
            recipe.dropout,
            course,
            progress,
            watch,
        )
        with quietly():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        best_step = trainer.state.best_global_step or 0
        if trainer.kept is not None:
            student.load_state_dict(trainer.kept.weights)
            best_step = trainer.kept.step
        if not (trainer.kept.guard if trainer.kept else trainer.state.best_metric or math.inf) < before.mean:
            student.load_state_dict(initial)
            best_step = 0
        after = loss.guard(student, guard)
        processes.wait_for_everyone()  # before the folder is cleared away
        student.zero_grad(set_to_none=True)
        student.to(device)
        teacher.to(device)
    rows, seconds = history(trainer.state.log_history), time.perf_counter() - start
    return Healing(before, after, best_step, seconds, rows, gains(rows, recipe.stages, before.mean), recipe)


def _common(folder: Path) -> Path:
    """The folder of the first process, for all of them."""
    names = [str(folder)]
    broadcast_object_list(names)
    return Path(names[0])


def _repeats(schedule: Schedule) -> bool:
    """Whether batches come back as they were."""
    return schedule.different is not None and len(schedule) > schedule.different


def _fits(loss: GlobalLoss, schedule: Schedule) -> bool:
    """Whether what the teacher gives for all batches may lie on disk, by what it gives for the first."""
    batch = send_to_device(schedule[0], next(loss.teacher.parameters()).device)
    paths = loss.paths if loss.weights.hidden else []
    return loss.taught(batch, paths).bytes * (schedule.different or 0) <= LIMIT
