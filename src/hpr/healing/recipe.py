"""How to heal: every setting of a run besides the models and the data, and the Trainer's arguments that follow from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainingArguments

from hpr.errors import HprError, check_settings
from hpr.healing.augmentation import Augmentation
from hpr.healing.duration import parse_duration
from hpr.healing.history import VALIDATION
from hpr.healing.loss import Weights
from hpr.healing.optimizer import ROUTER_RATE
from hpr.runtime.seeds import NUMPY, check_seed

_NAMES = ("activation_checkpointing", "gradient_checkpointing")  # the second until transformers 5.22
CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)


@dataclass(frozen=True)
class Recipe:
    """How to heal.

    ``duration``: ``500steps`` (or the number alone), ``90s``, ``10min`` or ``2h``; a time is turned into steps by timing a few.
    A step of the optimiser takes ``accumulate`` batches per process.
    ``checkpoints``: a folder for checkpoints. The same call continues from the last of them, and gives the same weights as an
    uninterrupted run. None keeps no checkpoints.
    ``objective``: a key of ``hpr.profiling.objectives.OBJECTIVES``; by default that of the student's profile, else the
    teacher's.
    ``augment``: a function that changes inputs at random (see ``augmentation``), None for none, ``auto`` for what suits the
    model: numbers vary, texts stay as they are.

    ``learning_rate``: the peak learning rate of AdamW, relative to the scale of each parameter (see
    ``optimizer.parameter_groups``). It is reached after the fraction ``warmup`` of the steps and falls to 0 by a cosine. Shared
    factors get ``shared_rate`` times it, routers ``router_rate`` times. ``delta_decay``: weight decay of private deltas;
    nothing else decays. Gradients are clipped to norm 1 over all unique parameters.
    ``weights``: the parts of the loss. ``dropout``: keep the model's dropout on. ``checks``: how often the validation loss is
    measured and a checkpoint is written. ``seed``: of the order of batches, augmentation and dropout.

    ``bf16``: compute products in bfloat16. ``checkpointing``: compute activations again in the backward pass, to save memory.
    ``sharded``: each process holds a part of every parameter (FSDP2, see ``distributed.shard``); such runs keep no checkpoints.

    ``blocks`` and ``ramp``: fractions of the steps for the two stages in ``stages``, 0 by default because they do not pay.
    ``original``: the aligned teacher (``alignment.align``), from whose weights a ramp starts if the plan aligns layers.

    Raises ``HprError`` for a value out of its range.

    >>> hpr.Recipe(duration="10min", learning_rate=1e-3).checks
    10
    """

    duration: str | int = "300steps"
    checkpoints: str | Path | None = None
    objective: str | None = None
    augment: Augmentation | Literal["auto"] | None = "auto"
    learning_rate: float = 4e-4
    warmup: float = 0.1
    weights: Weights = field(default_factory=Weights)
    dropout: bool = False
    shared_rate: float = 1.0
    router_rate: float = ROUTER_RATE
    delta_decay: float = 0.01
    accumulate: int = 1
    checks: int = 10
    bf16: bool = False
    checkpointing: bool = False
    sharded: bool = False
    seed: int = 0
    blocks: float = 0.0
    ramp: float = 0.0
    original: nn.Module | None = None

    def __post_init__(self) -> None:
        parse_duration(self.duration)
        object.__setattr__(self, "seed", check_seed(self.seed))
        check_settings(self)
        if min(self.accumulate, self.checks) < 1:
            raise HprError(f"accumulate {self.accumulate} and checks {self.checks} must be at least 1")
        finite = all(map(math.isfinite, (self.learning_rate, self.shared_rate, self.delta_decay)))
        if not (finite and self.learning_rate > 0 and min(self.shared_rate, self.delta_decay) >= 0 and 0 <= self.warmup < 1):
            raise HprError(
                f"learning_rate {self.learning_rate} must be a finite number above 0, shared_rate {self.shared_rate} and "
                f"delta_decay {self.delta_decay} not below 0, warmup {self.warmup} from 0 to below 1"
            )
        if self.checkpointing and not self.dropout:
            raise HprError(
                "checkpointing keeps layers in training mode: say dropout=True with it; a model without dropout stays as it is"
            )
        if not (min(self.blocks, self.ramp) >= 0 and self.blocks + self.ramp <= 1):
            raise HprError(f"blocks {self.blocks} and ramp {self.ramp} are shares of the steps: from 0 to 1, together too")

    @property
    def staged(self) -> bool:
        """Whether the run has the stages of ``hpr.healing.stages``."""
        return self.blocks > 0 or self.ramp > 0

    def to_dict(self) -> dict[str, Any]:
        """The settings that are numbers, for metrics.json and for the check on resuming."""
        elsewhere = ("duration", "checkpoints", "objective", "augment", "original", "weights")
        numbers = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in elsewhere}
        return {**numbers, "weights": asdict(self.weights)}


def arguments(recipe: Recipe, steps: int, folder: Path, device: torch.device) -> TrainingArguments:
    """Return the Trainer's arguments for a run of so many steps with checkpoints in ``folder``."""
    every = max(1, steps // recipe.checks)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item is a batch
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(recipe.warmup * steps),
        max_grad_norm=1.0,
        bf16=recipe.bf16,
        **{CHECKPOINTING: recipe.checkpointing},  # type: ignore[arg-type]
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="no" if recipe.sharded else "steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=every,
        load_best_model_at_end=not recipe.sharded,
        metric_for_best_model=VALIDATION,
        greater_is_better=False,
        seed=recipe.seed % NUMPY,  # the Trainer gives it to NumPy as well
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        label_names=[],
        ddp_find_unused_parameters=True,  # a pooler that nothing reads
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,  # batches may be where the model is
    )
    args._n_gpu = min(args.n_gpu, 1)  # several are used by several processes
    return args
