"""Objectives: how to read a model's outputs, so that damage to the model has a unit.

An objective answers two questions. Which numbers of the output count: class logits, token logits, an embedding, hidden states?
And how far apart are the outputs of two models? The answer to the second question is a divergence in nats per example.

- *Categorical* outputs are logits. The divergence is KL(teacher ‖ student), summed over the predictions of an example. If a
  classifier gives the probabilities (0.5, 0.5) and its compressed copy gives (0.8, 0.2), the divergence is
  0.5 · ln(0.5 / 0.8) + 0.5 · ln(0.5 / 0.2) = 0.223 nats.
- *Gaussian* outputs are vectors, which count as means of unit Gaussians. The divergence is ½‖e − ê‖². The embeddings (1, 0) and
  (0.8, 0.6) have ½ · (0.2² + 0.6²) = 0.2 nats.

An objective also has a loss. The loss compares the outputs with a random draw from the model's own output distribution, so it
needs no labels. The expected outer product of its gradients is the Fisher matrix, which is the second derivative of the
divergence. So the damage that a profile predicts and the divergence that an evaluation measures share a unit.

If a categorical model is almost certain of its outputs, its gradients nearly vanish, and they predict large changes badly.
``softened`` then raises the temperature of the loss, as distillation does (Hinton et al. 2015). The divergence always uses
temperature 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from hpr.errors import HprError
from hpr.runtime.batch import IGNORED, Batch, BatchLike, as_batches, mask_of
from hpr.runtime.hooks import eval_mode, run

_log = logging.getLogger(__name__)
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
UNCERTAIN = 0.3  # the least mean of 1 − Σ p², relative to its value for a uniform distribution


@dataclass(frozen=True)
class Objective:
    """One way to read a model's outputs. To add one, add an entry to ``OBJECTIVES``: other code reads its fields only.

    ``read(outputs, batch)`` returns the predictions (batch, …, d) and their weights (batch, …). A position of weight 0, such as
    padding, does not count. ``categorical``: predictions are logits; otherwise they are means of Gaussians with covariance I.
    ``temperature``: divides the logits in ``loss``.

    ``labels``: the content of a batch's ``labels``: ``"tokens"`` (one per position), ``"classes"`` (one per example) or None.
    ``shifts_labels``: position t predicts the token at t + 1. Texts then serve as labels, long texts may be split, and the only
    stack is a decoder. ``writes_targets``: the teacher generates the targets for batches without labels.
    ``upper_stack_predicts``: the positions of all stacks but the first are those of the labels. ``classes``: the mappings of
    transformers that list the model classes with this default objective.
    """

    name: str
    read: Callable[[Any, Batch], tuple[Float[Tensor, "batch ... d"], Float[Tensor, "batch ..."]]]
    categorical: bool
    temperature: float = 1.0
    labels: Literal["tokens", "classes"] | None = None
    shifts_labels: bool = False
    writes_targets: bool = False
    upper_stack_predicts: bool = False
    classes: tuple[str, ...] = ()

    def loss(self, outputs: Any, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the loss of a batch, a scalar in nats: the sum over predictions, with targets drawn from the model's outputs.

        At temperature T, its Fisher matrix is that of T² · KL between the outputs at T. The factor T² keeps its scale.
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

    def divergence(self, teacher: Any, student: Any, batch: Batch) -> Float[Tensor, " batch"]:
        """Return the divergence of each example in nats: KL for categorical outputs, ½‖e − ê‖² for Gaussian ones."""
        expected, weight = self.read(teacher, batch)
        predicted, _ = self.read(student, batch)
        expected, predicted = expected.float(), predicted.float()
        if self.categorical:
            log_p, log_q = F.log_softmax(expected, dim=-1), F.log_softmax(predicted, dim=-1)
            distance = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            distance = 0.5 * (expected - predicted).square().sum(-1)
        return (distance * weight).flatten(1).sum(1) if distance.dim() > 1 else distance * weight


def softened(objective: Objective, model: nn.Module, batches: Sequence[BatchLike]) -> Objective:
    """Return the objective with the lowest of ``TEMPERATURES`` at which the model's outputs are uncertain enough.

    The measure is the mean of 1 − Σ p² over the predictions on these batches. It is the probability that two labels drawn
    from one output differ. It must be at least ``UNCERTAIN`` times its value for a uniform distribution; if no temperature
    reaches that, the highest is used. An objective with Gaussian outputs is returned unchanged. Raises ``HprError`` for a
    categorical output with one label.
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

# The order matters: the first objective that lists a model's class is its default. BART's class is a masked LM, too.
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
    """Return the objective of that name, else the default for the model's class; ``hidden`` if the class has none.

    Raises ``HprError`` for a name that is not in ``OBJECTIVES``.
    """
    if name is not None:
        if name not in OBJECTIVES:
            raise HprError(f"no objective {name!r}: use one of {', '.join(OBJECTIVES)}")
        return OBJECTIVES[name]
    class_name = type(model).__name__
    for objective in OBJECTIVES.values():
        if any(class_name in _classes(mapping) for mapping in objective.classes):
            return objective
    _log.info("the objective is hidden states, because %s has no known task head", class_name)
    return OBJECTIVES["hidden"]


def _classes(mapping: str) -> set[str]:
    """Return the class names in a mapping of transformers, whose values are names or tuples of names."""
    values = getattr(modeling_auto, mapping, {}).values()
    return {name for names in values for name in ((names,) if isinstance(names, str) else names)}
