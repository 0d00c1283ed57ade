"""Transformers' Trainer for shared factors: groups of learning rates, a guard instead of an evaluation loss, exact resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
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
from hpr.healing.history import ENTROPY, GUARD, Watch, history
from hpr.healing.loss import GlobalLoss
from hpr.healing.stages import Course, Stages
from hpr.runtime.batch import Batch
from hpr.runtime.files import WEIGHTS
from hpr.runtime.progress import progress

_STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
_PARTS = (_STATE, "optimizer.pt", "scheduler.pt", WEIGHTS)


class Kept(NamedTuple):
    """The best weights of a sharded model so far, whole, with their step and guard metric."""

    step: int
    guard: float
    weights: dict[str, torch.Tensor]


class HealingTrainer(Trainer):
    """Trains a student by a global loss. Its dataset's items are whole batches, in the order of the steps.

    ``evaluate`` is ``GlobalLoss.guard`` on the guard batches. One learning rate for each group of ``groups``.
    """

    def __init__(
        self,
        student: nn.Module,
        args: TrainingArguments,
        schedule: Dataset,
        loss: GlobalLoss,
        guard: Sequence[Batch],
        groups: list[dict[str, Any]],
        dropout: bool,
        course: Course,
        watch: Watch | None = None,
    ):
        super().__init__(
            model=student,
            args=args,
            train_dataset=schedule,
            eval_dataset=schedule,  # never read: evaluate() has batches of its own
            data_collator=_only,
            callbacks=[_Shown(course.stages, watch)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch, so accumulated batches are averaged
        self.student, self.global_loss, self.guard = student, loss, guard
        self.groups, self.dropout, self.course = groups, dropout, course
        self.kept: Kept | None = None

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
        """The weights under their names in this model: ``save_pretrained`` renames those of some families."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.student, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.student, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Left to who trains: the folder may have another name by then."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if not self.dropout:
            model.eval()  # activations are then kept: layers compute them again in training mode only
        self.global_loss.progress = self.state.global_step / self.state.max_steps
        loss, _ = self.global_loss(model, inputs, self.course.enter(self.state.global_step))
        if not torch.isfinite(loss):
            raise HprError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: lower the learning rate "
                f"({self.args.learning_rate:g}), or remove non-finite inputs"
            )
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        self.course.leave()
        found = self.global_loss.guard(self.student, self.guard)
        metrics = {GUARD: found.mean}
        if self.global_loss.entropy is not None:
            metrics[ENTROPY] = self.global_loss.entropy
        if getattr(self, "is_distributed_loading_by_transformers", False) and (
            self.kept is None or found.mean < self.kept.guard
        ):
            self.kept = Kept(self.state.global_step, found.mean, whole_weights(self.student))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Shown(TrainerCallback):
    """Reports each step, with the last loss and guard metric; a stage ends with a check."""

    def __init__(self, stages: Stages, watch: Watch | None):
        self._stages, self._watch = stages, watch

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._stages.ends:
            control.should_log = control.should_evaluate = True
            control.should_save = args.save_strategy != SaveStrategy.NO
        if state.is_world_process_zero:
            progress("heal", state.global_step, state.max_steps)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._watch is not None:
            self._watch(history(state.log_history)[-1])


def load_weights(student: nn.Module, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a student."""
    load_model(student, str(checkpoint / WEIGHTS))


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole; what a crash left half-written is removed."""
    whole: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            json.loads((path / _STATE).read_text(encoding="utf-8"))
            complete = all((path / name).is_file() for name in _PARTS)
        except (OSError, ValueError):
            complete = False
        if complete:
            whole[int(path.name.rsplit("-", 1)[1])] = path
        else:
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item
