"""Transformers' Trainer for shared factors: groups of learning rates, a guard instead of an evaluation loss, exact resuming."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hpr.bank import BANK, bank_of, factors_of, module_name, terms_of
from hpr.errors import HprError
from hpr.healing.losses import GlobalLoss
from hpr.healing.sharding import whole, whole_weights
from hpr.healing.stages import Course, Stages
from hpr.hub import WEIGHTS
from hpr.planning.terms import routers_of
from hpr.profiling.curvature import Progress
from hpr.profiling.objectives import Batch

Watch = Callable[[Mapping[str, float]], None]  # step, loss and guard at each check
GUARD = "eval_guard"  # what ``GlobalLoss.guard`` gives, as the Trainer's log names it
ROUTER_RATE = 1.0
ENTROPY = "eval_entropy"  # of routes on the batch before, likewise
SMALLEST = 1e-3  # root mean square: biases that are nearly 0 move all the same
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
        progress: Progress,
        watch: Watch | None = None,
    ):
        super().__init__(
            model=student,
            args=args,
            train_dataset=schedule,
            eval_dataset=schedule,  # never read: evaluate() has batches of its own
            data_collator=_only,
            callbacks=[_Shown(course.stages, progress, watch)],
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

    def __init__(self, stages: Stages, progress: Progress, watch: Watch | None):
        self._stages, self._progress, self._watch = stages, progress, watch

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._stages.ends:
            control.should_log = control.should_evaluate = True
            control.should_save = args.save_strategy != SaveStrategy.NO
        if state.is_world_process_zero:
            self._progress("heal", state.global_step, state.max_steps)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._watch is not None:
            self._watch(history(state.log_history)[-1])


def history(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """One row a check of what the Trainer logged: step, the mean loss since the check before, and guard in nats per example.

    Where weights depend on the input also the ``entropy`` of routes, as a share of that of even ones.
    """
    rows: dict[int, dict[str, float]] = {}
    for entry in log:
        for key, name in (("loss", "loss"), (GUARD, "guard"), (ENTROPY, "entropy")):
            if key in entry:
                rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})[name] = entry[key]
    return [rows[step] for step in sorted(rows)]


def groups(
    student: nn.Module, rate: float, shared_rate: float, delta_decay: float, router_rate: float = ROUTER_RATE
) -> list[dict[str, Any]]:
    """Parameters of an optimiser, each once, in a group of its own: factors that several sites share count once.

    A step of AdamW moves every number by about its rate, whatever the scale of its factor, so a rate is relative
    to the root mean square of its parameter (as in Adafactor, Shazeer & Stern 2018). Shared factors get
    ``shared_rate`` times it and no weight decay; private low-rank factors beside a shared one are pulled back to what is
    shared by ``delta_decay``; all else decays not at all. Routers start at 0: their scale is that at which a Linear is drawn,
    and they get ``router_rate`` times the rate (30 times did harm, see ``experiments.md``).
    """
    shared, deltas, routers = _roles(student)
    found = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            factor = name.rsplit(f"{BANK}.factors.", 1)[-1].removesuffix(".weight") if f"{BANK}.factors." in name else None
            if parameter.dtype not in (torch.float32, torch.float64):
                raise HprError(
                    f"{name} is {str(parameter.dtype).removeprefix('torch.')}: most steps would be lost in rounding. Heal "
                    f"student.float(), with Recipe(bf16=True) for products in bfloat16"
                )
            if factor in routers:
                scale = router_rate * parameter.shape[-1] ** -0.5
            else:
                scale = max(float(whole(parameter.detach()).float().square().mean().sqrt()), SMALLEST)
            lr = rate * scale * (shared_rate if factor in shared else 1.0)
            found.append({"params": [parameter], "lr": lr, "weight_decay": delta_decay if factor in deltas else 0.0})
    if not found:
        raise HprError(f"no parameter of this {type(student).__name__} takes a gradient: nothing can be healed")
    return found


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


def _roles(student: nn.Module) -> tuple[set[str], set[str], set[str]]:
    """Keys of factors that several sites read, of private ones whose site also reads a shared one, and of routers."""
    if bank_of(student) is None:
        return set(), set(), set()
    sites = terms_of(student)
    readers = Counter(factor for terms in sites.values() for factor in factors_of(terms))
    shared = {factor for factor, count in readers.items() if count > 1}
    deltas: set[str] = set()
    for terms in sites.values():
        private = [term for term in terms if shared.isdisjoint(term.factors)]
        if len(private) < len(terms):
            deltas.update(factors_of(private))
    routers = {router for terms in sites.values() for router in routers_of(terms)}
    keys = [{module_name(name) for name in names} for names in (shared, deltas - routers, routers)]
    return keys[0], keys[1], keys[2]


def _only(items: list[Batch]) -> Batch:
    (item,) = items
    return item
