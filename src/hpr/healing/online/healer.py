"""Online learning: a student learns from a stream, batch by batch, and cannot get worse on its validation set."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.healing.loss import GlobalLoss
from hpr.healing.online.check import BatchCheck, check_tensors
from hpr.healing.online.drift import Drift
from hpr.healing.online.journal import Journal, flat, optimiser_tensors, parted, set_optimiser, unflat
from hpr.healing.online.moments import Moments
from hpr.healing.online.options import OnlineOptions
from hpr.healing.optimizer import parameter_groups
from hpr.healing.resume import check_resume, hash_of
from hpr.nn.coded import refuse_coded
from hpr.profiling.objectives import objective_for
from hpr.runtime.batch import Batch, BatchLike, as_batch, as_batches
from hpr.runtime.hooks import eval_mode, to_device_of

_CLIP = 1.0
_WARM = 20  # steps until the learning rate is reached: AdamW's first steps know only the signs of gradients
_LESS, _MORE = 0.5, 1.1  # what a lost check, or a won one, multiplies the scale of steps by
_NUMBERS = ("step", "seen", "taken", "step_scale", "best", "start")  # stored in the journal as they are
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one batch did. ``step`` counts all batches; ``loss`` is the batch's own, before the student learnt from it.

    ``refused``: why the student did not learn from the batch. ``validation``: the validation loss after this batch, if it was
    measured (nats per example; with labels the loss itself). ``rolled_back``: the validation loss was too high, and everything
    is again as at the last check. ``drift``: batches have become harder than those before.
    """

    step: int
    loss: float | None = None
    refused: str | None = None
    validation: float | None = None
    rolled_back: bool = False
    drift: bool = False


class OnlineHealer:
    """Updates a student in place, from a teacher's outputs or from labels in the batches.

    ``validation``: batches that are never learnt from. They are measured after every ``options.every`` batches. If the loss is
    then more than ``options.tolerance`` above the best so far, weights, the optimiser's moments and memory go back to their
    values at the last check, bit for bit. ``teacher``: None to learn from labels. ``moments``: the statistics that ``refit``
    fits to; every check adds the batches that were kept.

    A batch that is not finite, or that the model cannot read, is refused and changes nothing. Other errors are raised.

    The constructor keeps nothing on disk: use ``OnlineHealer.open`` for a learner that survives a crash. Raises ``HprError``
    without validation batches, and if labels count and a batch has none.

    >>> healer = OnlineHealer(student, validation, teacher, OnlineOptions(every=4))
    >>> for batch in stream:
    ...     update = healer.update(batch)
    >>> healer.settle() <= healer.start * 1.01
    True
    """

    def __init__(
        self,
        student: nn.Module,
        validation: Sequence[BatchLike],
        teacher: nn.Module | None = None,
        options: OnlineOptions | None = None,
        moments: Moments | None = None,
    ):
        refuse_coded(student, "trained")
        if not validation:
            raise HprError("validation is empty: at least one batch that is not learnt from is needed")
        self.student, self.validation, self.teacher, self.moments = student, as_batches(validation), teacher, moments
        self.options = options = options or OnlineOptions()
        self.loss = _loss(student, teacher, options)
        groups = parameter_groups(student, options.learning_rate, 1.0, 0.0)
        self.optimiser = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.memory: list[Batch] = []
        self.recent: list[Batch] = []  # learnt from since the last check
        self.step = self.seen = self.taken = 0  # batches; batches offered to the memory; steps of the optimiser
        self.step_scale = 1.0  # of the learning rate: smaller after a lost check, larger after a won one
        self.drift = Drift()
        self.journal: Journal | None = None
        self.best = self.start = self.measure()
        self._check_batch = BatchCheck(student, self.loss.objective.name, self.validation)
        self._accepted = self._state()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        student: nn.Module,
        validation: Sequence[BatchLike],
        teacher: nn.Module | None = None,
        options: OnlineOptions | None = None,
        moments: Moments | None = None,
    ) -> OnlineHealer:
        """Return a learner whose state is in a folder. The same call continues after a crash at any point, with equal weights.

        ``student`` and ``moments``: as they were at the first call; the folder's state goes into them. The folder holds the
        moments too (about as much as ``hpr.profile`` writes). If an error that no check foresaw ended the last call, its batch
        is the last file in ``folder/batches``: remove it to go on without it.

        Raises ``CheckpointError`` for a folder with the state of another learner, ``HprError`` for damaged files, and as the
        constructor does.

        >>> healer = OnlineHealer.open("state", student, validation, teacher)
        >>> healer.step
        0
        """
        healer = cls(student, validation, teacher, options, moments)
        check_resume(Path(folder), healer._facts())
        journal = Journal(Path(folder))
        healer._resume(journal)
        return healer

    def update(self, batch: BatchLike) -> Update:
        """Learn from a batch, unless it is refused. A learner with a folder writes the batch there first.

        Raises ``DataError`` if a value of the batch is not a tensor.
        """
        batch = as_batch(batch)
        check_tensors(batch)
        if self.journal is not None:
            self.journal.note(self.step + 1, batch)
        return self._learn(batch)

    def settle(self) -> float:
        """Check the batches since the last check, as at the end of a stream. Return the validation loss of the student then."""
        if self.recent:
            self._check()
        return self.measure()

    def refit(self) -> Update:
        """Fit all factors again, without gradients, to the recent stream; undo it if the validation loss does not fall.

        A refit discards what healing had changed in the factors. Use it for a student as ``share`` made it, on a stream unlike
        the text that it was shared on. Raises ``HprError`` for a learner without moments.
        """
        if self.moments is None:
            raise HprError("no moments to refit to: give OnlineHealer(..., moments=Moments(teacher, plan, profile))")
        if self.recent:
            self._check()
        before, weights, present = self.measure(), self.moments.fitted().state_dict(), self.student.state_dict()
        if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in present.items()}:
            raise HprError("the plan of the moments is not that of this student: give Moments the plan that it was shared by")
        self.student.load_state_dict(weights)
        try:
            value = self.measure()
        except HprError:  # outputs that are not finite
            value = None
        rolled_back = value is None or not value < before
        if value is None or rolled_back:
            self._go_back()
        else:
            self.best = min(self.best, value)
            self._accepted = self._state()
            if self.journal is not None:
                self._write(self.journal)
        return Update(self.step, validation=value, rolled_back=rolled_back)

    def measure(self) -> float:
        """Return the validation loss of the student."""
        return self.loss.validate(self.student, self.validation).mean

    def _learn(self, batch: Batch) -> Update:
        self.step += 1
        loss, refused = self._stepped(batch)
        drift = loss is not None and self.drift(loss)
        if refused is None:
            self.recent.append(batch)
        value, rolled_back = None, False
        if self.step % self.options.every == 0:
            value, rolled_back = self._check()
        return Update(self.step, loss, refused, value, rolled_back, drift)

    def _stepped(self, batch: Batch) -> tuple[float | None, str | None]:
        """Take a step along a batch. Return its loss before that, and why there was no step."""
        if (fault := self._check_batch(batch)) is not None:
            return None, fault
        with eval_mode(self.student):
            try:
                loss = self.loss(self.student, to_device_of(batch, self.student)).total
            except ValueError as error:  # how transformers and this package refuse an input, a picture of another size say
                message = " ".join(str(error).split())
                return None, f"the model cannot read the batch ({type(error).__name__}: {message:.120})"
            if not torch.isfinite(loss):
                return None, f"the loss of the batch is {float(loss.detach())}"
            value = float(loss.detach())
            if self.memory:
                past = self.memory[int(torch.randint(len(self.memory), (1,), generator=self._draw(0)))]
                loss = (loss + self.loss(self.student, to_device_of(past, self.student)).total) / 2
            loss.backward()
        finite = torch.isfinite(torch.nn.utils.clip_grad_norm_(self.student.parameters(), _CLIP))
        if finite:
            self._walk()
        self.optimiser.zero_grad(set_to_none=True)
        return (value, None) if finite else (None, "the gradient of the batch is not finite")

    def _walk(self) -> None:
        self.taken += 1
        share = self.step_scale * min(1.0, self.taken / _WARM)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = share * rate
        self.optimiser.step()

    def _check(self) -> tuple[float | None, bool]:
        """Measure the validation loss (None if outputs are not finite); keep what was learnt, or go back."""
        try:
            value = self.measure()
        except HprError:
            value = None
        rolled_back = value is None or not value <= self.best * (1 + self.options.tolerance)
        if value is None or rolled_back:
            self._go_back()
            self.step_scale *= _LESS
        else:
            self.best = min(self.best, value)
            self.step_scale = min(1.0, self.step_scale * _MORE)
            for batch in self.recent:
                self._remember(batch)
            if self.moments is not None and self.recent:
                self.moments.add(self.recent, self.step)
            self._accepted = self._state()
        self.recent = []
        if self.journal is not None:
            self._write(self.journal)
        return value, rolled_back

    def _remember(self, batch: Batch) -> None:
        """Offer a batch to the memory. Reservoir sampling keeps each past batch with the same probability."""
        self.seen += 1
        if len(self.memory) < self.options.replay:
            self.memory.append(batch)
            return
        place = int(torch.randint(self.seen, (1,), generator=self._draw(self.seen)))
        if place < self.options.replay:
            self.memory[place] = batch

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        weights = {name: value.detach().clone() for name, value in self.student.state_dict().items()}
        return weights, copy.deepcopy(optimiser_tensors(self.optimiser)), self.taken

    def _go_back(self) -> None:
        weights, moments, self.taken = self._accepted
        self.student.load_state_dict(weights)
        set_optimiser(self.optimiser, moments)

    def _write(self, journal: Journal) -> None:
        tensors = {f"optimiser.{name}": value for name, value in optimiser_tensors(self.optimiser).items()}
        tensors |= {f"memory.{name}": value for name, value in flat(self.memory).items()}
        if self.moments is not None:
            tensors |= {f"moments.{name}": value for name, value in self.moments.tensors().items()}
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {"drift": asdict(self.drift)}
        journal.snapshot(self.step, self.student, tensors, numbers)

    def _facts(self) -> dict[str, Any]:
        """Everything that decides the weights after each batch, for the check on resuming."""
        moments = self.moments
        return {
            "recipe": self.options.to_dict(self.loss.weights),
            "objective": self.loss.objective.name,
            "student": hash_of(self.student.state_dict()),
            "teacher": None if self.teacher is None else describe(self.teacher).fingerprint,
            "validation": [hash_of(batch) for batch in self.validation],
            "moments": None if moments is None else [moments.forget, hash_of(moments.tensors())],
        }

    def _resume(self, journal: Journal) -> None:
        """Restore the last snapshot, and learn again from the batches after it. Write a first snapshot if there is none."""
        self.journal = journal
        snapshot = journal.restore(self.student)
        if snapshot is None:
            self._write(journal)
        else:
            self._restore(*snapshot)
        self._accepted = self._state()
        for _, batch in journal.after(self.step):
            self._learn(batch)
        _log.info("%s holds a learner after %d batches", journal.folder, self.step)

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take the state from a snapshot, whose weights the student has already."""
        parts = parted(tensors)
        set_optimiser(self.optimiser, parts.get("optimiser", {}))
        self.memory = unflat(parts.get("memory", {}))
        if self.moments is not None:
            self.moments.restore(parts["moments"])
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.drift = Drift(**numbers["drift"])

    def _draw(self, kind: int) -> torch.Generator:
        """Random numbers that depend on the seed and the step alone."""
        return torch.Generator().manual_seed(((self.options.seed * 1_000_003 + self.step) * 1_000_003 + kind) % 2**63)


def _loss(student: nn.Module, teacher: nn.Module | None, options: OnlineOptions) -> GlobalLoss:
    original = student if teacher is None else teacher
    weights = options.weights_for(teacher)
    return GlobalLoss(original, describe(original), objective_for(original, options.objective), weights)
