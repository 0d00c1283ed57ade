"""How to heal: all that decides a run beside the models and the data, and what it means to the Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from hpr.errors import HprError
from hpr.healing.history import GUARD
from hpr.healing.loss import Weights
from hpr.healing.optimizer import ROUTER_RATE
from hpr.healing.stages import Stages

_NAMES = ("activation_checkpointing", "gradient_checkpointing")  # the second until transformers 5.22
CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)


@dataclass(frozen=True)
class Recipe:
    """How to heal. ``steps`` of the optimiser, each on ``accumulate`` batches per process.

    ``rate``: the peak learning rate (AdamW) relative to the scale of each parameter (see ``trainer.groups``), reached after
    ``warmup`` of the steps and taken down to 0 by a cosine; shared factors get ``shared_rate`` times it, routers
    ``router_rate`` times. ``blocks`` and
    ``ramp``: shares of the steps for the first two stages (see ``stages``). ``delta_decay``:
    weight decay of private deltas; nothing else decays. Gradients are clipped to norm 1 over all unique parameters.
    ``dropout``: as the model has it, or none. ``checks``: how often the guard is measured and a checkpoint written. ``bf16``:
    products in bfloat16. ``checkpointing``: activations are computed again on the way back, to save memory.
    ``seconds``: the time that the steps were counted for, if a time was asked for.
    ``sharded``: each process keeps a part of every parameter (FSDP2, see ``sharding``); then no checkpoints are written.
    """

    steps: int = 300
    rate: float = 4e-4
    warmup: float = 0.1
    blocks: float = 0.0
    ramp: float = 0.0
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
    seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.steps, self.accumulate, self.checks) < 1:
            raise HprError(f"steps {self.steps}, accumulate {self.accumulate} and checks {self.checks} must be at least 1")
        if not (self.rate > 0 and self.shared_rate >= 0 and self.delta_decay >= 0 and 0 <= self.warmup < 1):
            raise HprError(
                f"rate {self.rate} must be above 0, shared_rate {self.shared_rate} and delta_decay {self.delta_decay} not "
                f"below 0, warmup {self.warmup} from 0 to below 1"
            )
        if self.checkpointing and not self.dropout:
            raise HprError(
                "checkpointing keeps layers in training mode: say dropout=True with it; a model without dropout stays as it is"
            )
        if not (min(self.blocks, self.ramp) >= 0 and self.blocks + self.ramp <= 1):
            raise HprError(f"blocks {self.blocks} and ramp {self.ramp} are shares of the steps: from 0 to 1, together too")

    @property
    def stages(self) -> Stages:
        """The stages in steps, each that is wanted at least one."""
        blocks, ramp = (math.ceil(share * self.steps) for share in (self.blocks, self.ramp))
        return Stages(self.steps, blocks, min(ramp, self.steps - blocks))


def arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    """What the Trainer is told."""
    every = max(1, recipe.steps // recipe.checks)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # an item is a batch
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(recipe.warmup * recipe.steps),
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
        dataloader_pin_memory=False,  # batches may be where the model is
    )
    args._n_gpu = min(args.n_gpu, 1)  # several are used by several processes
    return args
