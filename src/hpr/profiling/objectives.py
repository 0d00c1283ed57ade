"""What a model is for, as two functions: a loss whose gradients give the curvature, and a divergence in nats.

Each objective reads the model's outputs as the mean of a distribution; its divergence is that distribution's KL, and its
loss, drawn from the model itself, has the same Fisher matrix. So predicted damage and measured divergence share a unit:
nats per example. Embeddings and hidden states are means of unit Gaussians: ½‖e − ê‖² nats.

Where a categorical model is certain of what it writes, gradients all but vanish and say nothing about changes that are no
longer small. Then the loss is that of the outputs at a higher temperature (``softened``), as in distillation (Hinton et al.
2015); the divergence stays the true one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from hpr.errors import HprError
from hpr.runtime.batch import IGNORED, Batch, BatchLike, as_batches, mask_of
from hpr.runtime.hooks import eval_mode, run

_log = logging.getLogger(__name__)
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
UNCERTAIN = 0.3  # of what even outputs have, in the mean of 1 − Σ p²: from there on gradients say enough


@dataclass(frozen=True)
class Objective:
    """What a model is for. A new one is one entry in ``OBJECTIVES``: other code asks for its properties, never for its name.

    ``read(outputs, batch)`` gives the predictions (batch, …, d) and their weight (batch, …); ``loss`` and ``divergence`` use
    both. ``categorical``: predictions are logits; otherwise they are means of unit Gaussians.

    ``labels``: what ``labels`` of a batch hold, ``"tokens"`` (one a position), ``"classes"`` (one an example) or None.
    ``shifts_labels``: position t predicts the token at t + 1. Texts are then their own labels, long ones may be read in
    pieces, and the only stack is a decoder. ``writes_targets``: batches without labels get what the teacher writes.
    ``upper_stack_predicts``: positions of the stacks above the first are those of the labels. ``classes``: the mappings of
    transformers that list the model classes for which this objective is the default.
    """

    name: str
    read: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    categorical: bool
    temperature: float = 1.0
    labels: Literal["tokens", "classes"] | None = None
    shifts_labels: bool = False
    writes_targets: bool = False
    upper_stack_predicts: bool = False
    classes: tuple[str, ...] = ()

    def loss(self, outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """The summed loss of a batch against a draw from the model's own output distribution (a scalar, nats).

        At a temperature T its Fisher matrix is that of T² · KL between the outputs at T, which does not shrink with T.
        """
        predictions, weight = self.read(outputs, batch)
        if self.categorical:
            log_probabilities = F.log_softmax(predictions.float() / self.temperature, dim=-1)
            flat = log_probabilities.detach().exp().reshape(-1, predictions.shape[-1])
            drawn = torch.multinomial(flat.to(generator.device), 1, generator=generator).to(predictions.device)
            drawn = drawn.reshape(*predictions.shape[:-1], 1)
            return -(log_probabilities.gather(-1, drawn).squeeze(-1) * weight).sum() * self.temperature
        direction = torch.randn(predictions.shape, generator=generator, dtype=torch.float32).to(predictions.device)
        return ((predictions.float() * direction).sum(-1) * weight).sum()

    def divergence(self, teacher: Any, student: Any, batch: Batch) -> Tensor:
        """Nats per example, (batch,): KL for categorical outputs, ½‖·‖² for Gaussian ones."""
        expected, weight = self.read(teacher, batch)
        found, _ = self.read(student, batch)
        expected, found = expected.float(), found.float()
        if self.categorical:
            log_p, log_q = F.log_softmax(expected, dim=-1), F.log_softmax(found, dim=-1)
            distance = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            distance = 0.5 * (expected - found).square().sum(-1)
        return (distance * weight).flatten(1).sum(1) if distance.dim() > 1 else distance * weight


def softened(objective: Objective, model: nn.Module, batches: Sequence[BatchLike]) -> Objective:
    """The objective at the lowest of ``TEMPERATURES`` at which the model's outputs on these batches are uncertain enough.

    That is measured as the mean of 1 − Σ p² over predictions, against its value for even outputs: the chance that two labels
    drawn from one output differ, and the trace of the covariance that the curvature is made of. Gaussian outputs have no
    temperature. Raises ``HprError`` for a categorical output with one label.
    """
    if not objective.categorical:
        return objective
    differing, count = torch.zeros(len(TEMPERATURES), dtype=torch.float64), 0.0
    with torch.no_grad(), eval_mode(model):
        for batch in as_batches(batches):
            predictions, weight = objective.read(run(model, batch), batch)
            if predictions.shape[-1] == 1:
                raise HprError(
                    f"{type(model).__name__} has one label, and objective {objective.name!r} gives it the probability 1 for "
                    f"every input, so no weight has a gradient: use --objective hidden (objective='hidden' in Python), "
                    f"which compares the scores"
                )
            for index, temperature in enumerate(TEMPERATURES):
                same = F.softmax(predictions.float() / temperature, dim=-1).square().sum(-1)
                differing[index] += float(((1 - same) * weight).sum())
            count += float(weight.sum()) * (1 - 1 / predictions.shape[-1])
    enough = (differing >= UNCERTAIN * count).tolist()
    return replace(objective, temperature=TEMPERATURES[enough.index(True) if any(enough) else -1])


def _hidden(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    hidden = getattr(outputs, "last_hidden_state", None)
    return hidden if isinstance(hidden, Tensor) else outputs[0]


def _logits(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def _read_mean_pooled(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = _hidden(outputs).float()
    mask = mask_of(batch, hidden).unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return F.normalize(pooled, dim=-1), torch.ones(len(pooled), device=pooled.device)


def _read_first_token(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = _hidden(outputs).float()
    return F.normalize(hidden[:, 0], dim=-1), torch.ones(len(hidden), device=hidden.device)


def _read_hidden(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = _hidden(outputs)
    return hidden, mask_of(batch, hidden)


def _read_classes(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = _logits(outputs)
    return logits, torch.ones(logits.shape[:-1], device=logits.device)


def _read_tokens(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = _logits(outputs)
    return logits, mask_of(batch, logits)


def _read_decoder(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = _logits(outputs)
    labels = batch.get("labels")
    mask = batch.get("decoder_attention_mask") if labels is None else labels != IGNORED
    return logits, torch.ones(logits.shape[:2], device=logits.device) if mask is None else mask.float()


_SEQ2SEQ = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES")
_CLASSIFIERS = tuple(f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING_NAMES" for kind in ("SEQUENCE", "IMAGE", "AUDIO"))

# In order: of several that list a model's class, the first is its default. BART's class is listed as a masked LM as well.
OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("embedding", _read_mean_pooled, categorical=False),
        Objective("cls-embedding", _read_first_token, categorical=False),
        Objective(
            "seq2seq",
            _read_decoder,
            categorical=True,
            labels="tokens",
            writes_targets=True,
            upper_stack_predicts=True,
            classes=_SEQ2SEQ,
        ),
        Objective(
            "causal-lm",
            _read_tokens,
            categorical=True,
            labels="tokens",
            shifts_labels=True,
            classes=("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
        ),
        Objective("masked-lm", _read_tokens, categorical=True, labels="tokens", classes=("MODEL_FOR_MASKED_LM_MAPPING_NAMES",)),
        Objective("classification", _read_classes, categorical=True, labels="classes", classes=_CLASSIFIERS),
        Objective("hidden", _read_hidden, categorical=False),
    )
}


def objective_for(model: nn.Module, name: str | None = None) -> Objective:
    """The objective by name, or the first that is the default for the model's class; hidden states if there is none.

    Raises ``HprError`` for a name that is not in ``OBJECTIVES``.
    """
    if name is not None:
        if name not in OBJECTIVES:
            raise HprError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}")
        return OBJECTIVES[name]
    own = type(model).__name__
    for objective in OBJECTIVES.values():
        if any(own in _classes(mapping) for mapping in objective.classes):
            return objective
    _log.info("the objective is hidden states, because %s has no task head that is known", own)
    return OBJECTIVES["hidden"]


def _classes(mapping: str) -> set[str]:
    """Names of the classes in a mapping of transformers, whose values are names or tuples of names."""
    values = getattr(modeling_auto, mapping, {}).values()
    return {name for names in values for name in ((names,) if isinstance(names, str) else names)}
