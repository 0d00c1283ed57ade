"""What a model's predictions are the parameters of: a choice of one class, several yes/no answers, or a vector of numbers.

Each class says how far two predictions are apart (a KL divergence in nats) and which loss has that divergence's second
derivative as its Fisher matrix, so that what a profile predicts and what an evaluation measures have one unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Distribution(ABC):
    """How predictions (…, d) are read. ``logits``: whether they are logits, which a temperature divides."""

    logits = True

    @abstractmethod
    def loss(self, predictions: Float[Tensor, "... d"], temperature: float, generator: torch.Generator) -> Float[Tensor, ...]:
        """The loss (…) of each prediction in nats, with a target drawn from the prediction itself."""

    @abstractmethod
    def distance(
        self, expected: Float[Tensor, "... d"], predicted: Float[Tensor, "... d"], temperature: float = 1.0
    ) -> Float[Tensor, ...]:
        """KL(expected ‖ predicted) at a temperature, (…), in nats."""

    @abstractmethod
    def uncertainty(self, predictions: Float[Tensor, "... d"], temperature: float) -> Float[Tensor, ...]:
        """The chance that two draws from a prediction differ, relative to that of a uniform distribution: 0 to 1, (…)."""

    def same(self, expected: Float[Tensor, "... d"], predicted: Float[Tensor, "... d"]) -> Float[Tensor, ...] | None:
        """The share of answers, from 0 to 1, that two predictions have in common, (…); None if they have no answers."""
        return None


class Categorical(Distribution):
    """The d numbers are the logits of one choice between d classes."""

    def loss(self, predictions: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        log_probabilities = F.log_softmax(predictions.float() / temperature, dim=-1)
        flat = log_probabilities.detach().exp().reshape(-1, predictions.shape[-1])
        drawn = torch.multinomial(flat.to(generator.device), 1, generator=generator).to(predictions.device)
        return -log_probabilities.gather(-1, drawn.reshape(*predictions.shape[:-1], 1)).squeeze(-1)

    def distance(self, expected: Tensor, predicted: Tensor, temperature: float = 1.0) -> Tensor:
        log_p, log_q = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (expected, predicted))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def uncertainty(self, predictions: Tensor, temperature: float) -> Tensor:
        same = F.softmax(predictions.float() / temperature, dim=-1).square().sum(-1)
        return (1 - same) / (1 - 1 / predictions.shape[-1])

    def same(self, expected: Tensor, predicted: Tensor) -> Tensor:
        return (expected.argmax(-1) == predicted.argmax(-1)).double()


class Bernoulli(Distribution):
    """Each of the d numbers is the logit of a yes/no answer of its own, as in multi-label classification."""

    def loss(self, predictions: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        logits = predictions.float() / temperature
        drawn = torch.rand(logits.shape, generator=generator).to(logits.device) < logits.detach().sigmoid()
        return F.binary_cross_entropy_with_logits(logits, drawn.float(), reduction="none").sum(-1)

    def distance(self, expected: Tensor, predicted: Tensor, temperature: float = 1.0) -> Tensor:
        p, q = (logits.float() / temperature for logits in (expected, predicted))
        yes = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
        no = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
        return (yes + no).sum(-1)

    def uncertainty(self, predictions: Tensor, temperature: float) -> Tensor:
        chance = (predictions.float() / temperature).sigmoid()
        return (4 * chance * (1 - chance)).mean(-1)

    def same(self, expected: Tensor, predicted: Tensor) -> Tensor:
        return ((expected > 0) == (predicted > 0)).double().mean(-1)


class Gaussian(Distribution):
    """The d numbers are the mean of a Gaussian with covariance I. Two of them are ½‖e − ê‖² nats apart."""

    logits = False

    def loss(self, predictions: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        direction = torch.randn(predictions.shape, generator=generator, dtype=torch.float32).to(predictions.device)
        return (predictions.float() * direction).sum(-1)

    def distance(self, expected: Tensor, predicted: Tensor, temperature: float = 1.0) -> Tensor:
        return 0.5 * (expected.float() - predicted.float()).square().sum(-1)

    def uncertainty(self, predictions: Tensor, temperature: float) -> Tensor:
        return torch.ones(predictions.shape[:-1], device=predictions.device)


CATEGORICAL, BERNOULLI, GAUSSIAN = Categorical(), Bernoulli(), Gaussian()
