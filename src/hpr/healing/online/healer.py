"""Learning on: a student that goes on learning from a stream, batch by batch, and cannot get worse on its guard."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.healing.loss import GlobalLoss, Weights
from hpr.healing.online.drift import Drift
from hpr.healing.online.journal import Journal, flat, optimiser_tensors, parted, set_optimiser, unflat
from hpr.healing.online.moments import Moments
from hpr.healing.optimizer import groups
from hpr.healing.resume import claim
from hpr.healing.teacher_cache import key_of
from hpr.profiling.objectives import objective_for
from hpr.runtime.batch import IGNORED, Batch, BatchLike, as_batch
from hpr.runtime.hooks import eval_mode, to_device_of

_CLIP = 1.0
_WARM = 20  # steps until the rate is reached: the first ones of AdamW know no more than signs
_LESS, _MORE = 0.5, 1.1  # what a check that is lost, or won, makes of the trust in steps
_NUMBERS = ("step", "seen", "taken", "trust", "best", "start")  # kept on disk as they are
_TOKENS = ("causal-lm", "masked-lm", "seq2seq")  # objectives whose labels are tokens
_WRONG_INPUT = (HprError, RuntimeError, ValueError, IndexError, TypeError, KeyError)


@dataclass(frozen=True)
class Update:
    """What one batch did. ``step`` counts all batches; ``loss`` is the batch's own, before it was learnt from.

    ``refused``: why the batch was not learnt from. ``guard``: measured after this batch (nats per example; with labels
    the loss itself). ``rolled_back``: the guard was hurt, and all is again as at the last check. ``drift``: batches have
    become harder than those before.
    """

    step: int
    loss: float | None = None
    refused: str | None = None
    guard: float | None = None
    rolled_back: bool = False
    drift: bool = False


class OnlineHealer:
    """Updates a student in place, from a teacher's answers or from labels in the batches.

    ``guard``: batches that are never learnt from. After every ``every`` batches they are measured, and where that is more than
    ``tolerance`` (a share) above the best so far, weights, moments of the optimiser and memory go back to what they were,
    exactly. ``replay``: so many batches of the past are kept, each past one with the same chance, and one of them is learnt
    from beside each new one. A batch that is not finite, or that the model cannot read, is refused and changes nothing.
    ``rate``: of AdamW, relative to the scale of each parameter; steps become half as large where they hurt the guard, and
    larger again, up to that rate, where they do not. ``moments``: what ``refit`` fits to; batches that were kept are let into
    them at every check, and a ``folder`` then holds the moments as well (about as much as ``hpr.profile`` writes).

    ``folder``: where the state is kept; the same call goes on from there after a crash at any point, with the very weights.
    Raises ``HprError`` for an empty guard, for labels that are not there, and for a folder with the state of another learner.
    """

    def __init__(
        self,
        student: nn.Module,
        guard: Sequence[BatchLike],
        teacher: nn.Module | None = None,
        *,
        weights: Weights | None = None,
        objective: str | None = None,
        rate: float = 1e-4,
        replay: int = 64,
        every: int = 8,
        tolerance: float = 0.01,
        seed: int = 0,
        folder: str | Path | None = None,
        moments: Moments | None = None,
    ):
        if not guard:
            raise HprError("guard is empty: at least one batch that is not learnt from is needed")
        if every < 1 or replay < 0 or not rate > 0 or tolerance < 0:
            raise HprError(
                f"every {every} must be at least 1, replay {replay} and tolerance {tolerance} 0, rate {rate} above 0"
            )
        weights = weights or (Weights() if teacher is not None else Weights(outputs=0.0, labels=1.0))
        if teacher is None and (weights.outputs or weights.hidden or weights.relations):
            raise HprError(f"{weights} follow a teacher: give one, or let labels alone count")
        self.student, self.every, self.tolerance, self.most, self.seed = student, every, tolerance, replay, seed
        self.guarded = [as_batch(batch) for batch in guard]
        original = teacher if teacher is not None else student
        self.loss = GlobalLoss(original, describe(original), objective_for(original, objective), weights)
        self.optimiser = torch.optim.AdamW(groups(student, rate, 1.0, 0.0), lr=rate, weight_decay=0.0)
        self.memory: list[Batch] = []
        self.recent: list[Batch] = []  # learnt from since the last check
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.step = self.seen = self.taken = 0  # batches; those remembered or passed by; steps of the optimiser
        self.trust = 1.0
        self.drift, self.moments = Drift(), moments
        self.best = self.start = self.measure()
        self.journal = None if folder is None else Journal(Path(folder))
        if self.journal is not None:
            settings = {"rate": rate, "replay": replay, "every": every, "tolerance": tolerance, "seed": seed, **asdict(weights)}
            facts = {
                "recipe": settings,
                "objective": self.loss.objective.name,
                "student": key_of(student.state_dict()),
                "teacher": None if teacher is None else describe(teacher).fingerprint,
                "guard": [key_of(batch) for batch in self.guarded],
                "moments": None if moments is None else [moments.forget, key_of(moments.tensors())],
            }
            claim(self.journal.folder, facts)
            self._take_up(self.journal)
        self._accepted = self._state()
        for _, batch in self.journal.after(self.step) if self.journal is not None else ():
            self._learn(batch)

    def update(self, batch: BatchLike) -> Update:
        """Learn from a batch, if it serves. It is on disk before that. Raises ``HprError`` for what are no tensors."""
        batch = as_batch(batch)
        if wrong := next((name for name, value in batch.items() if not isinstance(value, Tensor)), None):
            raise HprError(f"{wrong!r} of a batch is a {type(batch[wrong]).__name__}, not a tensor: convert it")
        if self.journal is not None:
            self.journal.note(self.step + 1, batch)
        return self._learn(batch)

    def settle(self) -> float:
        """Check what was learnt since the last check, as at the end of a stream; the guard metric of what is kept."""
        if self.recent:
            self._check()
        return self.measure()

    def refit(self) -> Update:
        """Fit all factors anew, without gradients, to what the stream has been like lately; taken back where the guard is hurt.

        What healing had changed in them is gone then, so this is for a student as it was shared, on a stream unlike the
        text that it was shared on. Raises ``HprError`` for a learner without moments.
        """
        if self.moments is None:
            raise HprError("no moments to refit to: give OnlineHealer(..., moments=Moments(teacher, plan, profile))")
        if self.recent:
            self._check()
        before, weights, own = self.measure(), self.moments.fitted().state_dict(), self.student.state_dict()
        if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in own.items()}:
            raise HprError("the plan of the moments is not that of this student: give Moments the plan that it was shared by")
        self.student.load_state_dict(weights)
        try:
            guard = self.measure()
        except HprError:  # outputs that are not finite
            guard = None
        rolled_back = guard is None or not guard < before
        if guard is None or rolled_back:
            self._go_back()
        else:
            self.best = min(self.best, guard)
            self._accepted = self._state()
            if self.journal is not None:
                self._write(self.journal)
        return Update(self.step, guard=guard, rolled_back=rolled_back)

    def measure(self) -> float:
        """The guard metric of the student as it is."""
        return self.loss.guard(self.student, self.guarded).mean

    def _learn(self, batch: Batch) -> Update:
        self.step += 1
        found, refused = self._stepped(batch)
        drift = found is not None and self.drift(found)
        if refused is None:
            self.recent.append(batch)
        guard, rolled_back = None, False
        if self.step % self.every == 0:
            guard, rolled_back = self._check()
        return Update(self.step, found, refused, guard, rolled_back, drift)

    def _stepped(self, batch: Batch) -> tuple[float | None, str | None]:
        """The loss of a batch before a step along it, and why there was none."""
        if any(value.is_floating_point() and not torch.isfinite(value).all() for value in batch.values()):
            return None, "the batch is not finite"
        if (wrong := _out_of_range(self.student, batch, self.loss.objective.name)) is not None:
            return None, wrong
        with eval_mode(self.student):
            try:
                loss, _ = self.loss(self.student, to_device_of(batch, self.student))
            except torch.OutOfMemoryError:
                raise
            except _WRONG_INPUT as error:
                said = " ".join(str(error).split())
                return None, f"the model cannot read the batch ({type(error).__name__}: {said:.120})"
            if not torch.isfinite(loss):
                return None, f"the loss of the batch is {float(loss.detach())}"
            found = float(loss.detach())
            if self.memory:
                past = self.memory[int(torch.randint(len(self.memory), (1,), generator=self._draw(0)))]
                loss = (loss + self.loss(self.student, to_device_of(past, self.student))[0]) / 2
            loss.backward()
        finite = torch.isfinite(torch.nn.utils.clip_grad_norm_(self.student.parameters(), _CLIP))
        if finite:
            self._walk()
        self.optimiser.zero_grad(set_to_none=True)
        return (found, None) if finite else (None, "the gradient of the batch is not finite")

    def _walk(self) -> None:
        self.taken += 1
        share = self.trust * min(1.0, self.taken / _WARM)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = share * rate
        self.optimiser.step()

    def _check(self) -> tuple[float | None, bool]:
        """Measure the guard (None where the outputs are no longer finite); keep what was learnt, or go back."""
        try:
            guard = self.measure()
        except HprError:
            guard = None
        rolled_back = guard is None or not guard <= self.best * (1 + self.tolerance)
        if guard is None or rolled_back:
            self._go_back()
            self.trust *= _LESS
        else:
            self.best = min(self.best, guard)
            self.trust = min(1.0, self.trust * _MORE)
            for batch in self.recent:
                self._remember(batch)
            if self.moments is not None and self.recent:
                self.moments.add(self.recent, self.step)
            self._accepted = self._state()
        self.recent = []
        if self.journal is not None:
            self._write(self.journal)
        return guard, rolled_back

    def _remember(self, batch: Batch) -> None:
        """Reservoir sampling: each batch of the past is kept with the same chance."""
        self.seen += 1
        if len(self.memory) < self.most:
            self.memory.append(batch)
            return
        place = int(torch.randint(self.seen, (1,), generator=self._draw(self.seen)))
        if place < self.most:
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

    def _take_up(self, journal: Journal) -> None:
        """Become what the last snapshot holds; a first one is written where there is none."""
        found = journal.restore(self.student)
        if found is None:
            self._write(journal)
            return
        tensors, numbers = found
        parts = parted(tensors)
        set_optimiser(self.optimiser, parts.get("optimiser", {}))
        self.memory = unflat(parts.get("memory", {}))
        if self.moments is not None:
            self.moments.take_up(parts["moments"])
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.drift = Drift(**numbers["drift"])

    def _draw(self, kind: int) -> torch.Generator:
        """Random numbers that depend on the seed and the step alone."""
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + self.step) * 1_000_003 + kind) % 2**63)


def _out_of_range(model: nn.Module, batch: Batch, objective: str) -> str | None:
    """The first id or class of a batch that the model has nothing for: on a GPU, reading it would end the process.

    Looked at are ids of tokens, and labels where they are tokens or classes of whole examples; nothing else is known enough.
    """
    try:
        table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # a model of sound
        table = None
    tokens = getattr(table, "num_embeddings", None)
    classes = getattr(getattr(model, "config", None), "num_labels", None) if objective == "classification" else None
    limits = {"input_ids": tokens, "decoder_input_ids": tokens}
    limits["labels"] = tokens if objective in _TOKENS else classes if classes is not None and classes > 1 else None
    for name, limit in limits.items():
        value = batch.get(name)
        if limit is None or value is None or value.is_floating_point():
            continue
        known = (value >= 0) & (value < limit) | (value == IGNORED if name == "labels" else False)
        if not known.all():
            return f"{name} holds {int(value[~known][0])}, which is not one of 0 to {limit - 1}"
    return None
