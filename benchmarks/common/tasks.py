"""Scores on tasks with known answers, and the readers of their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from hpr.data.batches import text_batches
from hpr.data.files import read_labels, read_texts
from hpr.data.tables import as_label
from hpr.evaluation.divergence import embeddings
from hpr.profiling.objectives import OBJECTIVES

Embed = Callable[[Sequence[str]], Tensor]
Pairs = tuple[Sequence[str], Sequence[str], Sequence[float]]


def sts_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores of an STS benchmark ``.csv`` without a header."""
    scores = [as_label(value, f"{path}, row {row}") for row, value in enumerate(read_texts(path, 2), 1)]
    return read_texts(path, 0), read_texts(path, 1), scores


def labelled_texts(path: Path) -> tuple[list[str], list[int]]:
    """Texts and class numbers of a ``.tsv`` with the columns ``sentence`` and ``label`` (SST-2)."""
    return read_texts(path, "sentence"), [int(label) for label in read_labels(path) or []]


def embedder(model: nn.Module, tokenizer: Any) -> Embed:
    """A function from n texts to their embeddings (n, d), in the order of the texts."""
    return lambda texts: embeddings(model, text_batches(texts, tokenizer, 64, 256), OBJECTIVES["embedding"])


def sts_correlation(embed: Embed, pairs: Pairs) -> float:
    """Spearman correlation between the cosine of each pair of sentences and its score, from −1 to 1.

    It is 0 if all pairs have the same embedding. Raises ``ValueError`` for lists of different length, and for scores that
    do not vary.
    """
    first, second, scores = pairs
    if not len(first) == len(second) == len(scores):
        raise ValueError(
            f"{len(first)} first sentences, {len(second)} second ones and {len(scores)} scores: give equal numbers"
        )
    if len(set(scores)) < 2:
        raise ValueError(f"all {len(scores)} scores are equal: a correlation needs at least two different ones")
    sentences = list(dict.fromkeys((*first, *second)))  # many sentences are in more than one pair
    row_of = {sentence: row for row, sentence in enumerate(sentences)}
    rows = embed(sentences)
    left, right = (rows[[row_of[sentence] for sentence in side]].double() for side in (first, second))
    similarity = F.cosine_similarity(left, right, dim=-1).cpu().numpy()
    if np.ptp(similarity) < 1e-12:
        return 0.0
    return float(spearmanr(similarity, scores).statistic)
