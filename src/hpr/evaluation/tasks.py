"""Scores on tasks with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from hpr.data.batches import text_batches
from hpr.errors import HprError
from hpr.evaluation.divergence import accuracy, embeddings
from hpr.profiling.objectives import OBJECTIVES, Objective
from hpr.runtime.batch import Batch

Embed = Callable[[Sequence[str]], Tensor]
EMBEDDING = OBJECTIVES["embedding"]
CLASSIFICATION = OBJECTIVES["classification"]


def embedder(
    model: nn.Module, tokenizer: Any, objective: Objective = EMBEDDING, batch_size: int = 64, max_length: int = 256
) -> Embed:
    """A function from n texts to their embeddings (n, d), in order."""
    return lambda texts: embeddings(model, text_batches(texts, tokenizer, batch_size, max_length), objective)


def sts_correlation(embed: Embed, pairs: tuple[Sequence[str], Sequence[str], Sequence[float]]) -> float:
    """Spearman correlation between the cosine of each pair of sentences and its score, from −1 to 1.

    0 for an embedding that is the same for all pairs. Raises ``HprError`` for lists of different length and for scores
    that do not vary.
    """
    first, second, scores = pairs
    if not len(first) == len(second) == len(scores):
        raise HprError(
            f"{len(first)} first and {len(second)} second sentences, {len(scores)} scores: as many of each are needed"
        )
    if len(set(scores)) < 2:
        raise HprError(f"{len(scores)} scores, all alike: a correlation needs at least two that differ")
    sentences = list(dict.fromkeys((*first, *second)))  # many stand in several pairs
    place = {sentence: row for row, sentence in enumerate(sentences)}
    rows = embed(sentences)
    left, right = (rows[[place[sentence] for sentence in side]].double() for side in (first, second))
    similarity = F.cosine_similarity(left, right, dim=-1).cpu().numpy()
    if np.ptp(similarity) < 1e-12:
        return 0.0
    return float(spearmanr(similarity, scores).statistic)


def classification_accuracy(model: nn.Module, batches: Sequence[Batch], labels: Sequence[int] | Tensor) -> float:
    """Share of examples classified as labelled; ``labels`` are in the order of the user's data."""
    return accuracy(embeddings(model, batches, CLASSIFICATION), labels)
