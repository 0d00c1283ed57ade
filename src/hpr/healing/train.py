"""The training itself: a student follows its teacher on batches, and keeps the best weights that it met on the guard."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hpr.anatomy.describe import describe
from hpr.data.sources import named
from hpr.errors import HprError
from hpr.evaluation.divergence import Estimate
from hpr.healing.augmentation import Augmentation
from hpr.healing.distributed import agreed, shard
from hpr.healing.history import Watch, history
from hpr.healing.loss import GlobalLoss
from hpr.healing.optimizer import groups
from hpr.healing.recipe import CHECKPOINTING, Recipe, arguments
from hpr.healing.resume import claim, facts_of
from hpr.healing.schedule import Schedule
from hpr.healing.stages import Course, gains
from hpr.healing.teacher_cache import Cache
from hpr.healing.trainer import HealingTrainer, last_checkpoint, load_weights
from hpr.profiling.objectives import Objective, objective_for
from hpr.runtime.batch import BatchLike, as_batches
from hpr.runtime.hooks import eval_mode, transformers_quiet

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
    batches: Sequence[BatchLike] | Mapping[str, Sequence[BatchLike]],
    guard: Sequence[BatchLike],
    recipe: Recipe | None = None,
    objective: Objective | None = None,
    augment: Augmentation | None = None,
    shares: Mapping[str, float] | None = None,
    folder: Path | None = None,
    original: nn.Module | None = None,
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
    data, guard = {name: as_batches(source) for name, source in named(batches).items()}, as_batches(guard)
    anatomy, device, initial = describe(teacher), next(student.parameters()).device, copy.deepcopy(student.state_dict())
    loss = GlobalLoss(teacher, anatomy, goal, recipe.weights)
    before = loss.guard(student, guard)
    processes = PartialState(cpu=device.type == "cpu")
    with ExitStack() as outer:
        place = folder or agreed(Path(outer.enter_context(tempfile.TemporaryDirectory(prefix="hpr-heal-"))))
        with processes.main_process_first():
            claim(place, facts_of(recipe, student, loss, data, guard, shares, augment, original))
            checkpoint = last_checkpoint(place)
        with ExitStack() as stack:
            stack.enter_context(eval_mode(student))  # for its end: every module is left in the mode that it was in
            args = arguments(recipe, place.resolve(), device)
            schedule = Schedule(data, recipe.steps * recipe.accumulate * args.world_size, recipe.seed, augment, shares)
            if schedule.repeats:
                loss.cache = Cache(place / TARGETS)
                stack.callback(setattr, loss, "cache", None)
            teacher.to(args.device)
            learner = student.to(args.device)
            if recipe.sharded:
                learner = shard(copy.deepcopy(student), anatomy, args.device)
            stack.callback(_as_it_was(learner, recipe))
            course = Course(recipe.stages, learner, teacher, anatomy, (original or teacher).to(args.device))
            stack.callback(course.close)
            course.check(lambda: loss.guard(learner, guard[:1]).mean)
            trainer = HealingTrainer(
                learner,
                args,
                schedule,
                loss,
                guard,
                groups(learner, recipe.rate, recipe.shared_rate, recipe.delta_decay, recipe.router_rate),
                recipe.dropout,
                course,
                watch,
            )
            with transformers_quiet():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        best_step = trainer.state.best_global_step or 0
        if trainer.kept is not None:
            student.load_state_dict(trainer.kept.weights)
            best_step = trainer.kept.step
        elif best_step:
            load_weights(student, place / f"{PREFIX_CHECKPOINT_DIR}-{best_step}")
        after = loss.guard(student, guard)
        if not after.mean < before.mean:
            student.load_state_dict(initial)
            after, best_step = before, 0
        processes.wait_for_everyone()  # before the folder is cleared away
    student.zero_grad(set_to_none=True)
    student.to(device)
    teacher.to(device)
    rows, seconds = history(trainer.state.log_history), time.perf_counter() - start
    return Healing(before, after, best_step, seconds, rows, gains(rows, recipe.stages, before.mean), recipe)


def _as_it_was(learner: nn.Module, recipe: Recipe) -> Callable[[], None]:
    """What undoes all that the Trainer and accelerate leave behind on a model."""
    config, own = getattr(learner, "config", None), set(vars(learner))
    cached = getattr(config, "use_cache", None)
    if recipe.checkpointing and not isinstance(learner, PreTrainedModel):
        raise HprError(f"{type(learner).__name__} cannot compute activations again: set checkpointing to False")

    def undo() -> None:
        for name in {"forward", "_original_forward", "_is_accelerate_prepared"} - own:
            vars(learner).pop(name, None)
        if cached is not None:
            config.use_cache = cached  # type: ignore[union-attr]
        if recipe.checkpointing:
            getattr(learner, f"{CHECKPOINTING}_disable")()
            learner.disable_input_require_grads()  # type: ignore[operator]

    return undo
