"""Heal: train what sharing has left, by a global loss, until the student does again what its teacher does."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hpr.anatomy import describe
from hpr.errors import HprError
from hpr.evaluation.metrics import Estimate, divergence
from hpr.healing.augmentation import Augmentation
from hpr.healing.losses import GlobalLoss, Weights
from hpr.healing.schedule import Schedule
from hpr.healing.trainer import GUARD, HealingTrainer, Watch, groups, history, last_checkpoint
from hpr.models import quietly
from hpr.planning.plan import write_text
from hpr.profiling.curvature import Progress, silent
from hpr.profiling.objectives import Batch, Objective, evaluating, examples_in, objective_for

RECIPE = "recipe.json"  # beside the checkpoints: what they belong to


@dataclass(frozen=True)
class Recipe:
    """How to heal. ``steps`` of the optimiser, each on ``accumulate`` batches per process.

    ``rate``: the peak learning rate (AdamW) relative to the scale of each parameter (see ``trainer.groups``), reached after
    ``warmup`` of the steps and taken down to 0 by a cosine; shared factors get ``shared_rate`` times it. ``delta_decay``:
    weight decay of private deltas; nothing else decays. Gradients are clipped to norm 1 over all unique parameters.
    ``dropout``: as the model has it, or none. ``checks``: how often the guard is measured and a checkpoint written. ``bf16``:
    products in bfloat16. ``checkpointing``: activations are computed again on the way back, to save memory.
    """

    steps: int = 300
    rate: float = 1e-3
    warmup: float = 0.1
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


@dataclass(frozen=True)
class Healing:
    """What came of it: divergence from the teacher on the guard batches, nats per example, before and after.

    ``best_step``: the step whose weights the student has now, 0 where none was better than at the start. ``history``: one row
    a check, with step, loss and guard.
    """

    before: Estimate
    after: Estimate
    best_step: int
    steps: int
    seconds: float
    history: list[dict[str, float]]


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
    progress: Progress = silent,
    watch: Watch | None = None,
) -> Healing:
    """Train a student in place until it does again what its teacher does; it is left with the best weights that were met.

    ``batches``: inputs, with or without labels, or several sources of them by name with ``shares`` of the steps. ``guard``:
    batches of other data; the weights of least divergence on them are kept, those of the start among them, so healing
    never makes that worse. ``augment`` changes inputs at random; the teacher labels what the student is shown. ``folder``:
    where checkpoints go; a run that was cut off and is started again with the same arguments goes on from the last one, and
    ends with the very weights that it would have had. Raises ``HprError`` for no batches, for a loss that is not
    finite, and for a folder with the checkpoints of another run.
    """
    recipe, goal, start = recipe or Recipe(), objective or objective_for(teacher), time.perf_counter()
    before = divergence(student, teacher, guard, goal)
    anatomy, device, initial = describe(teacher), next(student.parameters()).device, copy.deepcopy(student.state_dict())
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpr-heal-")))
        _claim(folder, _facts(recipe, student, batches, shares))
        stack.enter_context(evaluating(student))  # for its end: every module is left in the mode that it was in
        args = _arguments(recipe, folder, device)
        schedule = Schedule(batches, recipe.steps * recipe.accumulate * args.world_size, recipe.seed, augment, shares)
        trainer = HealingTrainer(
            student,
            args,
            schedule,
            GlobalLoss(teacher.to(args.device), anatomy, goal, recipe.weights),
            guard,
            groups(student, recipe.rate, recipe.shared_rate, recipe.delta_decay),
            recipe.dropout,
            progress,
            watch,
        )
        checkpoint = last_checkpoint(folder)
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
    return Healing(before, after, best_step, recipe.steps, time.perf_counter() - start, history(trainer.state.log_history))


def steps_begun(folder: Path | None) -> int | None:
    """The steps of the run whose checkpoints a folder holds, None where there is none."""
    found = None if folder is None else _known(folder)
    return None if found is None else int(found["recipe"]["steps"])


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
        activation_checkpointing=recipe.checkpointing,
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


def _facts(recipe: Recipe, student: nn.Module, batches: Any, shares: Mapping[str, float] | None) -> dict[str, Any]:
    """What decides the weights of every step, as far as it is known beforehand."""
    sources = dict(batches) if isinstance(batches, Mapping) else {"data": batches}
    return {
        "recipe": asdict(recipe),
        "model": type(student).__name__,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "examples": {name: sum(examples_in(batch) for batch in source) for name, source in sources.items()},
        "shares": None if shares is None else dict(shares),
    }


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Take a folder for checkpoints. Raises where it holds those of another run."""
    known = _known(folder)
    if known is None:
        if any(folder.glob("checkpoint-*")):
            raise HprError(f"{folder} holds checkpoints of something else: choose another folder")
        write_text(folder / RECIPE, json.dumps(facts, indent=1) + "\n")
    elif different := [key for key in facts if known.get(key) != json.loads(json.dumps(facts[key]))]:
        raise HprError(
            f"{folder} holds checkpoints of a run with other {', '.join(different)}: choose another folder, or remove it"
        )


def _known(folder: Path) -> dict[str, Any] | None:
    """What ``_claim`` wrote into a folder. Raises where that cannot be read."""
    path = folder / RECIPE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise HprError(f"{path} is not JSON ({error}): remove the folder to start anew") from error
    return found
