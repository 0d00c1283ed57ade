"""What a model is for, as two functions: a loss whose gradients give the curvature, and a divergence in nats.

Each objective reads the model's outputs as the mean of a distribution; its divergence is that distribution's KL, and its
loss, drawn from the model itself, has the same Fisher matrix. So predicted damage and measured divergence share a unit:
nats per example. Embeddings and hidden states are means of unit Gaussians: ½‖e − ê‖² nats.

Where a categorical model is certain of what it writes, gradients all but vanish and say nothing about changes that are no
longer small. Then the loss is that of the outputs at a higher temperature (``softened``), as in distillation (Hinton et al.
2015); the divergence stays the true one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from hpr.errors import HprError
from hpr.runtime.batch import IGNORED, Batch, BatchLike, as_batches, mask_of
from hpr.runtime.hooks import eval_mode, run

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
UNCERTAIN = 0.3  # of what even outputs have, in the mean of 1 − Σ p²: from there on gradients say enough


@dataclass(frozen=True)
class Objective:
    """``read(outputs, batch)`` gives the predictions and a (batch, positions) weight; ``loss`` and ``divergence`` see them."""

    name: str
    read: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    categorical: bool
    temperature: float = 1.0

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
    temperature.
    """
    if not objective.categorical:
        return objective
    differing, count = torch.zeros(len(TEMPERATURES), dtype=torch.float64), 0.0
    with torch.no_grad(), eval_mode(model):
        for batch in as_batches(batches):
            predictions, weight = objective.read(run(model, batch), batch)
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


OBJECTIVES: dict[str, Objective] = {
    "embedding": Objective("embedding", _read_mean_pooled, categorical=False),
    "cls-embedding": Objective("cls-embedding", _read_first_token, categorical=False),
    "classification": Objective("classification", _read_classes, categorical=True),
    "causal-lm": Objective("causal-lm", _read_tokens, categorical=True),
    "masked-lm": Objective("masked-lm", _read_tokens, categorical=True),
    "seq2seq": Objective("seq2seq", _read_decoder, categorical=True),
    "hidden": Objective("hidden", _read_hidden, categorical=False),
}
_BY_MAPPING = (
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "seq2seq"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "seq2seq"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal-lm"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "masked-lm"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "classification"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "classification"),
    ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "classification"),
)


def objective_for(model: nn.Module, name: str | None = None) -> Objective:
    """The objective by name, or the one the model's class is listed under in transformers; hidden states otherwise."""
    if name is not None:
        if name not in OBJECTIVES:
            raise HprError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}")
        return OBJECTIVES[name]
    for mapping, objective in _BY_MAPPING:
        classes = getattr(modeling_auto, mapping, {}).values()
        if any(type(model).__name__ in ((names,) if isinstance(names, str) else names) for names in classes):
            return OBJECTIVES[objective]
    return OBJECTIVES["hidden"]
