"""Training: a student imitates its teacher on batches, and ends with the best weights on the validation set."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hpr.anatomy.describe import describe
from hpr.data.sources import named
from hpr.errors import HprError
from hpr.evaluation.divergence import Estimate
from hpr.healing.distributed import agreed, shard
from hpr.healing.duration import parse_duration, steps_within
from hpr.healing.history import history
from hpr.healing.loss import GlobalLoss
from hpr.healing.recipe import CHECKPOINTING, Recipe, arguments
from hpr.healing.resume import check_resume, facts_of, steps_begun
from hpr.healing.schedule import Schedule
from hpr.healing.setup import TrainingSetup
from hpr.healing.teacher_cache import TargetCache
from hpr.healing.trainer import HealingTrainer, last_checkpoint, load_weights
from hpr.nn.bank import recorded_objective
from hpr.nn.coded import refuse_coded
from hpr.profiling.objectives import objective_for
from hpr.runtime.batch import BatchLike, as_batches
from hpr.runtime.hooks import eval_mode, transformers_quiet

MakeTrainer = Callable[
    [nn.Module, TrainingSetup, TrainingArguments, Schedule, TargetCache | None], AbstractContextManager[HealingTrainer]
]
TARGETS = "targets"  # the folder of the teacher's targets, beside the checkpoints
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Healing:
    """The result of a run.

    ``before`` and ``after``: ``GlobalLoss.validate``, the divergence from the teacher in nats per example on the validation set
    (without labels). ``best_step``: the step whose weights the student has now, 0 if no check was better than the start.
    ``history``: one row per check, with step, loss and validation loss. ``gains``: one row per stage, with the validation loss
    before and after; empty without stages. ``settings``: the recipe as JSON, with its ``steps``.

    >>> healing = heal(student, teacher, "texts.txt", Recipe("500steps"))
    >>> healing.after.mean <= healing.before.mean
    True
    """

    before: Estimate
    after: Estimate
    best_step: int
    seconds: float
    history: list[dict[str, float]]
    gains: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def steps(self) -> int:
        """Steps of the optimiser in the whole run."""
        return int(self.settings["steps"])

    def as_metrics(self) -> dict[str, Any]:
        """The entry ``healing`` of metrics.json."""
        return {
            "before": self.before.mean,
            "after": self.after.mean,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "recipe": self.settings,
            "history": self.history,
            "stages": self.gains,
        }


def train(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[BatchLike] | Mapping[str, Sequence[BatchLike]],
    validation: Sequence[BatchLike],
    recipe: Recipe | None = None,
    shares: Mapping[str, float] | None = None,
) -> Healing:
    """Train a student in place to imitate its teacher on prepared batches. ``heal`` does the same from data of any kind.

    ``batches``: inputs, with or without labels; or several sources of them by name, with the fraction of the steps for each in
    ``shares``. ``validation``: batches of other data. The student ends with the weights of least validation loss, and keeps the
    weights of the start if no check was better. ``recipe.augment="auto"`` means no augmentation here.

    Under ``torchrun`` or ``accelerate launch`` every process calls this with the same arguments, and a step sees ``accumulate``
    batches of each process. Raises ``HprError`` if there are no batches, for a loss that is not finite, and for a folder with
    the checkpoints of another run.
    """
    refuse_coded(student, "healed")
    return run(student, set_up(student, teacher, batches, validation, recipe or Recipe(), shares))


def run(student: nn.Module, setup: TrainingSetup, trainer: MakeTrainer | None = None) -> Healing:
    """Train a student in place as a setup says (see ``train``). ``trainer`` makes its trainer, by default the recipe's."""
    start, device, initial = time.perf_counter(), next(student.parameters()).device, copy.deepcopy(student.state_dict())
    loss, teacher = setup.loss, setup.loss.teacher
    before = loss.validate(student, setup.validation)
    processes = PartialState(cpu=device.type == "cpu")
    with _checkpoint_folder(setup.recipe) as folder:
        checkpoint = None
        if setup.recipe.checkpoints is not None:
            with processes.main_process_first():
                check_resume(folder, facts_of(student, setup))
                checkpoint = last_checkpoint(folder)
        best_step, log = _trained(student, setup, folder, checkpoint, trainer or trainer_of(setup.recipe))
        after = loss.validate(student, setup.validation)
        if not after.mean < before.mean:
            student.load_state_dict(initial)
            after, best_step = before, 0
        processes.wait_for_everyone()  # before the folder is removed
    student.zero_grad(set_to_none=True)
    student.to(device)
    teacher.to(device)
    rows = history(log)
    gains: list[dict[str, Any]] = []
    if setup.recipe.staged:
        from hpr.healing import stages

        gains = stages.gains(rows, stages.stages_of(setup.recipe, setup.steps), before.mean)
    return Healing(before, after, best_step, time.perf_counter() - start, rows, gains, setup.settings())


def set_up(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[BatchLike] | Mapping[str, Sequence[BatchLike]],
    validation: Sequence[BatchLike],
    recipe: Recipe,
    shares: Mapping[str, float] | None = None,
) -> TrainingSetup:
    """What a run needs (see ``train``). A time becomes steps; a run that continues keeps the steps that it began with."""
    sources = {name: as_batches(source) for name, source in named(batches).items()}
    if recipe.augment == "auto":
        recipe = replace(recipe, augment=None)
    goal = objective_for(teacher, recipe.objective or recorded_objective(student))
    loss = GlobalLoss(teacher, describe(teacher), goal, recipe.weights)
    steps, seconds = parse_duration(recipe.duration)
    steps = steps or steps_begun(None if recipe.checkpoints is None else Path(recipe.checkpoints))
    if steps is None:
        assert seconds is not None
        steps = steps_within(seconds, student, loss, list(chain(*sources.values())), recipe.accumulate)
        _log.info("%g seconds are %d steps", seconds, steps)
    return TrainingSetup(recipe, steps, seconds, loss, sources, shares, as_batches(validation))


def trainer_of(recipe: Recipe) -> MakeTrainer:
    """What makes the trainer for a recipe."""
    if recipe.staged:
        from hpr.healing.stages import staged_trainer

        return staged_trainer
    return lambda *given: nullcontext(HealingTrainer(*given))


def _trained(
    student: nn.Module, setup: TrainingSetup, folder: Path, checkpoint: Path | None, make: MakeTrainer
) -> tuple[int, list[dict[str, float]]]:
    """Train, and load the best weights into the student. Return their step and the Trainer's log."""
    recipe, teacher = setup.recipe, setup.loss.teacher
    with ExitStack() as stack:
        stack.enter_context(eval_mode(student))  # restores the mode of every module at the end
        args = arguments(recipe, setup.steps, folder.resolve(), next(student.parameters()).device)
        length = setup.steps * recipe.accumulate * args.world_size
        assert recipe.augment != "auto"
        schedule = Schedule(setup.sources, length, recipe.seed, recipe.augment, setup.shares)
        cache = TargetCache(folder / TARGETS, args.device) if schedule.repeats else None
        teacher.to(args.device)  # type: ignore[arg-type]
        learner = student.to(args.device)  # type: ignore[arg-type]
        if recipe.sharded:
            learner = shard(copy.deepcopy(student), setup.loss.anatomy, args.device)
        stack.enter_context(_restored(learner, recipe))
        trainer = stack.enter_context(make(learner, setup, args, schedule, cache))
        if checkpoint is not None:
            _log.info("continuing from %s", checkpoint)
        with transformers_quiet():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best_step = trainer.state.best_global_step or 0
    if trainer.best is not None:
        student.load_state_dict(trainer.best.weights)
        best_step = trainer.best.step
    elif best_step:
        load_weights(student, folder / f"{PREFIX_CHECKPOINT_DIR}-{best_step}")
    return best_step, trainer.state.log_history


@contextmanager
def _checkpoint_folder(recipe: Recipe) -> Iterator[Path]:
    """The recipe's folder, or a temporary one that all processes use."""
    if recipe.checkpoints is not None:
        yield Path(recipe.checkpoints)
        return
    with tempfile.TemporaryDirectory(prefix="hpr-heal-") as folder:
        yield agreed(Path(folder))


@contextmanager
def _restored(learner: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Undo, at the end, everything that the Trainer and accelerate leave behind on a model."""
    config, own = getattr(learner, "config", None), set(vars(learner))
    cached = getattr(config, "use_cache", None)
    if recipe.checkpointing and not isinstance(learner, PreTrainedModel):
        raise HprError(f"{type(learner).__name__} cannot compute activations again: set checkpointing to False")
    try:
        yield
    finally:
        for name in {"forward", "_original_forward", "_is_accelerate_prepared"} - own:
            vars(learner).pop(name, None)
        if cached is not None:
            config.use_cache = cached  # type: ignore[union-attr]
        if recipe.checkpointing:
            getattr(learner, f"{CHECKPOINTING}_disable")()
            learner.disable_input_require_grads()  # type: ignore[operator]
