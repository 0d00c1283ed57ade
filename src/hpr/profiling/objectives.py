"""Objectives: how to read a model's outputs, so that damage to the model has a unit.

An objective answers two questions. Which numbers of the output count: class logits, token logits, an embedding, hidden states?
And how far apart are the outputs of two models? The answer to the second question is a divergence in nats per example.

- *Categorical* outputs are logits of one choice. The divergence is KL(teacher ‖ student), summed over the predictions of an
  example. If a classifier gives the probabilities (0.5, 0.5) and its compressed copy gives (0.8, 0.2), the divergence is
  0.5 · ln(0.5 / 0.8) + 0.5 · ln(0.5 / 0.2) = 0.223 nats.
- *Bernoulli* outputs are logits of several yes/no answers. Their divergences add up.
- *Gaussian* outputs are vectors, which count as means of unit Gaussians. The divergence is ½‖e − ê‖². The embeddings (1, 0) and
  (0.8, 0.6) have ½ · (0.2² + 0.6²) = 0.2 nats. A single number, such as the score of a reranker, is read so, too.

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
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hpr.errors import HprError
from hpr.profiling.distributions import BERNOULLI, CATEGORICAL, GAUSSIAN, Distribution
from hpr.profiling.outputs import (
    read_decoder,
    read_first_token,
    read_frames,
    read_hidden,
    read_mean_pooled,
    read_pair,
    read_pixels,
    read_scores,
    read_spans,
    read_tokens,
)
from hpr.runtime.batch import Batch, BatchLike, as_batches
from hpr.runtime.hooks import eval_mode, run

_log = logging.getLogger(__name__)
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
UNCERTAIN = 0.3  # the least chance that two draws from an output differ, relative to that of a uniform distribution


@dataclass(frozen=True)
class Objective:
    """One way to read a model's outputs. To add one, add an entry to ``OBJECTIVES``: other code reads its fields only.

    ``read(outputs, batch)`` returns the predictions (batch, …, d) and their weights (batch, …). A position of weight 0, such as
    padding, does not count. ``distribution`` says what the predictions are: logits of one choice, logits of yes/no answers, or
    means of Gaussians with covariance I. ``temperature``: divides logits in ``loss``.

    ``labels``: the content of a batch's ``labels``: ``"tokens"`` (one per position), ``"classes"`` (one per example) or None.
    ``shifts_labels``: position t predicts the token at t + 1. Texts then serve as labels, long texts may be split, and the only
    stack is a decoder. ``writes_targets``: the teacher generates the targets for batches without labels.
    ``upper_stack_predicts``: the positions of all stacks but the first are those of the labels. ``classes``: the mappings of
    transformers that list the model classes with this default objective.
    """

    name: str
    read: Callable[[Any, Batch], tuple[Float[Tensor, "batch ... d"], Float[Tensor, "batch ..."]]]
    distribution: Distribution
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
        return (self.distribution.loss(predictions, self.temperature, generator) * weight).sum() * self.temperature

    def divergence(self, teacher: Any, student: Any, batch: Batch) -> Float[Tensor, " batch"]:
        """Return the divergence of each example in nats: KL(teacher ‖ student), summed over its predictions."""
        expected, weight = self.read(teacher, batch)
        predicted, _ = self.read(student, batch)
        distance = self.distribution.distance(expected, predicted)
        return (distance * weight).flatten(1).sum(1) if distance.dim() > 1 else distance * weight


def softened(objective: Objective, model: nn.Module, batches: Sequence[BatchLike]) -> Objective:
    """Return the objective with the lowest of ``TEMPERATURES`` at which the model's outputs are uncertain enough.

    The measure is the chance that two labels drawn from one output differ, relative to that of a uniform distribution: for one
    choice the mean of 1 − Σ p² over the predictions on these batches. It must be at least ``UNCERTAIN``; if no temperature
    reaches that, the highest is used. An objective with Gaussian outputs is returned unchanged. Raises ``HprError`` for a
    categorical output with one label.
    """
    if not objective.distribution.logits:
        return objective
    differing, count = torch.zeros(len(TEMPERATURES), dtype=torch.float64), 0.0
    with torch.no_grad(), eval_mode(model):
        for batch in as_batches(batches):
            predictions, weight = objective.read(run(model, batch), batch)
            if predictions.shape[-1] == 1 and objective.distribution is CATEGORICAL:
                raise HprError(
                    f"{type(model).__name__} has one label, and objective {objective.name!r} gives it the probability 1 for "
                    f"every input, so no weight has a gradient: use --objective score (objective='score' in Python), "
                    f"which compares the scores"
                )
            for index, temperature in enumerate(TEMPERATURES):
                differing[index] += float((objective.distribution.uncertainty(predictions, temperature) * weight).sum())
            count += float(weight.sum())
    enough = (differing >= UNCERTAIN * count).tolist()
    return replace(objective, temperature=TEMPERATURES[enough.index(True) if any(enough) else -1])


def _mappings(*kinds: str) -> tuple[str, ...]:
    """The names in transformers of the mappings that list the classes of some kinds of heads."""
    return tuple(f"MODEL_FOR_{kind}_MAPPING_NAMES" for kind in kinds)


_CLASSIFIERS = _mappings("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION")
_WRITERS = _mappings("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_IMAGE_MODELING")
_CHOICES = _mappings("NEXT_SENTENCE_PREDICTION", "MULTIPLE_CHOICE")  # their number of outputs has another meaning

# The order matters: the first objective that lists a model's class is its default. BART's class is a masked LM, too.
OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("embedding", read_mean_pooled, GAUSSIAN),
        Objective("cls-embedding", read_first_token, GAUSSIAN),
        Objective(
            "seq2seq",
            read_decoder,
            CATEGORICAL,
            labels="tokens",
            writes_targets=True,
            upper_stack_predicts=True,
            classes=_mappings("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
        ),
        Objective("causal-lm", read_tokens, CATEGORICAL, labels="tokens", shifts_labels=True, classes=_WRITERS),
        Objective("masked-lm", read_tokens, CATEGORICAL, labels="tokens", classes=_mappings("MASKED_LM")),
        Objective("classification", read_scores, CATEGORICAL, labels="classes", classes=_CLASSIFIERS + _CHOICES),
        Objective("multi-label", read_scores, BERNOULLI),
        Objective("score", read_scores, GAUSSIAN),
        Objective("token-classification", read_tokens, CATEGORICAL, labels="tokens", classes=_mappings("TOKEN_CLASSIFICATION")),
        Objective("spans", read_spans, CATEGORICAL, classes=_mappings("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING")),
        Objective("ctc", read_frames, CATEGORICAL, classes=_mappings("CTC")),
        Objective("frames", read_frames, BERNOULLI, classes=_mappings("AUDIO_FRAME_CLASSIFICATION")),
        Objective("contrastive", read_pair, GAUSSIAN, classes=_mappings("ZERO_SHOT_IMAGE_CLASSIFICATION")),
        Objective("segmentation", read_pixels, CATEGORICAL, classes=_mappings("SEMANTIC_SEGMENTATION")),
        Objective("hidden", read_hidden, GAUSSIAN),
    )
}


def objective_for(model: nn.Module, name: str | None = None) -> Objective:
    """Return the objective of that name, else the default for the model's class; ``hidden`` if the class has none.

    A classifier has ``multi-label`` if its configuration says that it gives several labels at once, and ``score`` if its labels
    are numbers or it has one output. Raises ``HprError`` for a name that is not in ``OBJECTIVES``.
    """
    if name is not None:
        if not isinstance(name, str) or name not in OBJECTIVES:
            raise HprError(f"no objective {name!r}: use one of {', '.join(OBJECTIVES)}")
        return OBJECTIVES[name]
    for kind in type(model).__mro__:  # a class of one's own has the head of its parent
        for objective in OBJECTIVES.values():
            if any(kind.__name__ in _classes(mapping) for mapping in objective.classes):
                return OBJECTIVES[_problem(model, kind) or _writing(model, objective.name)]
    if _predicts_tokens(model):
        writes = type(model).can_generate()  # type: ignore[attr-defined]
        return OBJECTIVES[_writing(model, "causal-lm" if writes else "masked-lm")]
    _log.info("the objective is hidden states, because %s has no known task head", type(model).__name__)
    return OBJECTIVES["hidden"]


def _writing(model: Any, name: str) -> str:
    """The objective of a model that writes: ``seq2seq`` if it has an encoder, else ``causal-lm``; others keep their ``name``.

    Transformers lists models of pictures and sounds together, whether they read them by an encoder of the text's decoder or as
    a part of the text.
    """
    separate = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    if name not in ("causal-lm", "seq2seq") or separate is None:
        return name
    return "seq2seq" if separate else "causal-lm"


def _predicts_tokens(model: nn.Module) -> bool:
    """Whether a model of transformers has a head over the tokens of a vocabulary."""
    return isinstance(model, PreTrainedModel) and isinstance(model.get_output_embeddings(), nn.Linear)


def _problem(model: nn.Module, kind: type) -> str | None:
    """The objective that a classifier's configuration asks for instead of one choice; None for any other model."""
    config = getattr(model, "config", None)
    if not any(kind.__name__ in _classes(mapping) for mapping in _CLASSIFIERS):
        return None
    if getattr(config, "problem_type", None) == "multi_label_classification":
        return "multi-label"
    numbers = getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", None) == 1
    return "score" if numbers else None


def _classes(mapping: str) -> set[str]:
    """Return the class names in a mapping of transformers, whose values are names or tuples of names."""
    values = getattr(modeling_auto, mapping, {}).values()
    return {name for names in values for name in ((names,) if isinstance(names, str) else names)}
