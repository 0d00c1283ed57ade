"""Transformers' Trainer for shared factors: a learning rate per parameter, a validation set, and exact resuming."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hpr.errors import HprError
from hpr.healing.distributed import whole_weights
from hpr.healing.history import ENTROPY, VALIDATION, history
from hpr.healing.optimizer import parameter_groups
from hpr.healing.schedule import Schedule, Shown
from hpr.healing.setup import TrainingSetup
from hpr.healing.teacher_cache import TargetCache, TeacherTargets
from hpr.runtime.batch import Batch
from hpr.runtime.files import WEIGHTS
from hpr.runtime.progress import progress

_log = logging.getLogger(__name__)
_STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
_PARTS = (_STATE, "optimizer.pt", "scheduler.pt", WEIGHTS)


class BestWeights(NamedTuple):
    """The best weights of a sharded model so far, unsharded, with their step and validation loss."""

    step: int
    validation: float
    weights: dict[str, torch.Tensor]


class HealingTrainer(Trainer):
    """Trains a student by a global loss. The items of its data set are the batches of a ``Schedule``, in order.

    ``evaluate`` computes ``GlobalLoss.validate`` on the validation batches. ``cache``: keeps the teacher's targets; None
    computes them at each step.
    """

    def __init__(
        self,
        student: nn.Module,
        setup: TrainingSetup,
        args: TrainingArguments,
        schedule: Schedule,
        cache: TargetCache | None = None,
    ):
        super().__init__(
            model=student,
            args=args,
            train_dataset=schedule,
            eval_dataset=schedule,  # never read: evaluate() has its own batches
            data_collator=_as_mapping,
            callbacks=[CheckAfter(frozenset({setup.steps})), _Checks()],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch, so accumulated batches are averaged
        recipe = setup.recipe
        self.student, self.setup, self.cache, self.global_loss = student, setup, cache, setup.loss
        self.groups = parameter_groups(
            student, recipe.learning_rate, recipe.shared_rate, recipe.delta_decay, recipe.router_rate
        )
        self.entropy: torch.Tensor | None = None  # of the routes on the last training batch
        self.best: BestWeights | None = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # a guess for dense models, and no batch of one tensor has a main input

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.groups, lr=self.args.learning_rate, weight_decay=0.0)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the weights under their names in this model: ``save_pretrained`` renames those of some families."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.student, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.student, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Do nothing: ``train`` loads the best weights, because the folder may have another name by then."""

    def targets_of(self, batch: Batch, number: int | None) -> TeacherTargets | None:
        """What the teacher gives for a batch, from the cache; None leaves it to the loss to run the teacher."""
        loss, layers = self.global_loss, self.global_loss.layers(self.student)
        if self.cache is None or number is None or not loss.needs_teacher(layers):
            return None
        return self.cache(number, lambda: loss.targets(batch, layers))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if not self.setup.recipe.dropout:
            model.eval()  # activations are then stored: layers compute them again in training mode only
        batch, done = inputs["batch"], self.state.global_step / self.state.max_steps
        loss = self.global_loss(model, batch, done, self.targets_of(batch, inputs["number"]))
        self.entropy = loss.entropy
        if not torch.isfinite(loss.total):
            raise HprError(
                f"the loss of step {self.state.global_step + 1} is {loss.total.item()}: lower the learning rate "
                f"({self.args.learning_rate:g}), or remove non-finite inputs"
            )
        return loss.total

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        value = self.global_loss.validate(self.student, self.setup.validation).mean
        metrics = {VALIDATION: value}
        if self.entropy is not None:
            metrics[ENTROPY] = float(self.entropy)
        if getattr(self, "is_distributed_loading_by_transformers", False) and (
            self.best is None or value < self.best.validation
        ):
            self.best = BestWeights(self.state.global_step, value, whole_weights(self.student))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class CheckAfter(TrainerCallback):
    """Asks for a check and a checkpoint after the given steps."""

    def __init__(self, steps: frozenset[int]):
        self._steps = steps

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            control.should_log = control.should_evaluate = True
            control.should_save = args.save_strategy != SaveStrategy.NO


class _Checks(TrainerCallback):
    """Reports the progress of each step, and logs each check."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            progress("heal", state.global_step, state.max_steps)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            row = history(state.log_history)[-1]
            _log.info(
                "step %d: loss %.4g, divergence on the validation set %.4g nats", row["step"], row["loss"], row["validation"]
            )


def load_weights(student: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into a student."""
    load_model(student, str(checkpoint / WEIGHTS))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint; remove those that a crash left half-written."""
    by_step: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            json.loads((path / _STATE).read_text(encoding="utf-8"))
            complete = all((path / name).is_file() for name in _PARTS)
        except (OSError, ValueError):
            complete = False
        if complete:
            by_step[int(path.name.rsplit("-", 1)[1])] = path
        else:
            shutil.rmtree(path)
    return by_step[max(by_step)] if by_step else None


def _as_mapping(items: list[Shown]) -> dict[str, Any]:
    (item,) = items
    return item._asdict()
