"""Heal: train what sharing has left, by a global loss, until the student does again what its teacher does."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hpr.anatomy import describe
from hpr.errors import HprError
from hpr.evaluation.metrics import Estimate, divergence
from hpr.healing.augmentation import Augmentation
from hpr.healing.cache import LIMIT, Cache
from hpr.healing.claim import claim, facts_of
from hpr.healing.losses import GlobalLoss, Weights
from hpr.healing.schedule import Schedule
from hpr.healing.stages import Course, Stages, gains
from hpr.healing.trainer import GUARD, HealingTrainer, Watch, groups, history, last_checkpoint
from hpr.models import quietly
from hpr.profiling.curvature import Progress, silent
from hpr.profiling.objectives import Batch, Objective, evaluating, objective_for

_NAMES = ("activation_checkpointing", "gradient_checkpointing")  # the second until transformers 5.22
_CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)
TARGETS = "targets"  # what the teacher gives, beside the checkpoints


@dataclass(frozen=True)
class Recipe:
    """How to heal. ``steps`` of the optimiser, each on ``accumulate`` batches per process.

    ``rate``: the peak learning rate (AdamW) relative to the scale of each parameter (see ``trainer.groups``), reached after
    ``warmup`` of the steps and taken down to 0 by a cosine; shared factors get ``shared_rate`` times it. ``blocks`` and
    ``ramp``: shares of the steps for the first two stages (see ``stages``). ``delta_decay``:
    weight decay of private deltas; nothing else decays. Gradients are clipped to norm 1 over all unique parameters.
    ``dropout``: as the model has it, or none. ``checks``: how often the guard is measured and a checkpoint written. ``bf16``:
    products in bfloat16. ``checkpointing``: activations are computed again on the way back, to save memory.
    """

    steps: int = 300
    rate: float = 1e-3
    warmup: float = 0.1
    blocks: float = 0.0
    ramp: float = 0.0
    weights: Weights = field(default_factory=Weights)
    dropout: bool = False
    shared_rate: float = 1.0
    delta_decay: float = 0.01
    accumulate: int = 1
    checks: int = 10
    bf16: bool = False
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.accumulate, self.checks) < 1:
            raise HprError(f"steps {self.steps}, accumulate {self.accumulate} and checks {self.checks} must be at least 1")
        if not (self.rate > 0 and self.shared_rate >= 0 and self.delta_decay >= 0 and 0 <= self.warmup < 1):
            raise HprError(
                f"rate {self.rate} must be above 0, shared_rate {self.shared_rate} and delta_decay {self.delta_decay} not "
                f"below 0, warmup {self.warmup} from 0 to below 1"
            )
        if not (min(self.blocks, self.ramp) >= 0 and self.blocks + self.ramp <= 1):
            raise HprError(f"blocks {self.blocks} and ramp {self.ramp} are shares of the steps: from 0 to 1, together too")

    @property
    def stages(self) -> Stages:
        """The stages in steps, each that is wanted at least one."""
        blocks, ramp = (math.ceil(share * self.steps) for share in (self.blocks, self.ramp))
        return Stages(self.steps, blocks, min(ramp, self.steps - blocks))


@dataclass(frozen=True)
class Healing:
    """What came of it: divergence from the teacher on the guard batches, nats per example, before and after.

    ``best_step``: the step whose weights the student has now, 0 where none was better than at the start. ``history``: one row
    a check, with step, loss and guard. ``gains``: one row a stage, with the guard before and after.
    """

    before: Estimate
    after: Estimate
    best_step: int
    steps: int
    seconds: float
    history: list[dict[str, float]]
    gains: list[dict[str, Any]]


def heal(
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
    before = divergence(student, teacher, guard, goal)
    anatomy, device, initial = describe(teacher), next(student.parameters()).device, copy.deepcopy(student.state_dict())
    with ExitStack() as stack:
        processes = PartialState(cpu=device.type == "cpu")
        if folder is None:
            folder = _common(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpr-heal-"))))
        with processes.main_process_first():
            claim(folder, facts_of(asdict(recipe), student, anatomy.fingerprint, batches, shares))
            checkpoint = last_checkpoint(folder)
        stack.enter_context(evaluating(student))  # for its end: every module is left in the mode that it was in
        args = _arguments(recipe, folder, device)
        schedule = Schedule(batches, recipe.steps * recipe.accumulate * args.world_size, recipe.seed, augment, shares)
        loss = GlobalLoss(teacher.to(args.device), anatomy, goal, recipe.weights)
        if augment is None and len(schedule) > schedule.different and _fits(loss, schedule):
            loss.cache = Cache(folder / TARGETS)
        course = Course(recipe.stages, student.to(args.device), teacher, anatomy, original or teacher)
        stack.callback(course.close)
        if recipe.checkpointing and isinstance(student, PreTrainedModel):  # the Trainer leaves it on
            stack.callback(getattr(student, f"{_CHECKPOINTING}_disable"))
            stack.callback(student.disable_input_require_grads)
        trainer = HealingTrainer(
            student,
            args,
            schedule,
            loss,
            guard,
            groups(student, recipe.rate, recipe.shared_rate, recipe.delta_decay),
            recipe.dropout,
            course,
            progress,
            watch,
        )
        with quietly():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        best_step = trainer.state.best_global_step or 0
        if not (trainer.state.best_metric or math.inf) < before.mean:
            student.load_state_dict(initial)
            best_step = 0
        student.zero_grad(set_to_none=True)
        student.to(device)
        teacher.to(device)
    after = divergence(student, teacher, guard, goal)
    rows, seconds = history(trainer.state.log_history), time.perf_counter() - start
    return Healing(before, after, best_step, recipe.steps, seconds, rows, gains(rows, recipe.stages, before.mean))


def _common(folder: Path) -> Path:
    """The folder of the first process, for all of them."""
    names = [str(folder)]
    broadcast_object_list(names)
    return Path(names[0])


def _fits(loss: GlobalLoss, schedule: Schedule) -> bool:
    """Whether what the teacher gives for all batches may lie on disk, by what it gives for the first."""
    batch = send_to_device(schedule[0], next(loss.teacher.parameters()).device)
    paths = loss.paths if loss.weights.hidden else []
    return loss.taught(batch, paths).bytes * schedule.different <= LIMIT


def _arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    every = max(1, recipe.steps // recipe.checks)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # an item is a batch
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(recipe.warmup * recipe.steps),
        max_grad_norm=1.0,
        bf16=recipe.bf16,
        **{_CHECKPOINTING: recipe.checkpointing},  # type: ignore[arg-type]
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model=GUARD,
        greater_is_better=False,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        label_names=[],
        ddp_find_unused_parameters=True,  # a pooler that nothing reads
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
    )
