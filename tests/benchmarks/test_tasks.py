"""Scores on tasks with known answers, and the readers of their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from scipy.stats import spearmanr
from torch import Tensor

from common.tasks import embedder, labelled_texts, sts_correlation, sts_pairs
from hpr.errors import HprError


def test_sts_and_labelled_tables(tmp_path: Path) -> None:
    table = tmp_path / "sts.csv"
    table.write_text('A "dog" thing.,"One, two.",5.0\nb,c,0\n')
    assert sts_pairs(table) == (['A "dog" thing.', "b"], ["One, two.", "c"], [5.0, 0.0])
    table.write_text("a,b,5\na,b,much\n")
    with pytest.raises(HprError, match=r"row 2: the label 'much'"):
        sts_pairs(table)
    labelled = tmp_path / "sst.tsv"
    labelled.write_text('sentence\tlabel\na "quoted \t1\nb\t0\n')
    assert labelled_texts(labelled) == (['a "quoted', "b"], [1, 0])
    labelled.write_text("sentence\tlabel\na\tgood\n")
    with pytest.raises(HprError, match="row 2, column 'label': the label 'good'"):
        labelled_texts(labelled)


def test_sts_with_a_fake_embedder() -> None:
    """Sentences are angles; the score falls with the angle between them."""
    first, second = ["0", "0", "0", "10"], ["5", "90", "45", "12"]
    calls = []

    def embed(texts: list[str]) -> Tensor:
        calls.append(list(texts))
        angles = torch.tensor([float(text) for text in texts]).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    assert sts_correlation(embed, (first, second, [4.0, 0.0, 2.0, 5.0])) == pytest.approx(1)
    assert sts_correlation(embed, (first, second, [1.0, 5.0, 2.0, 0.0])) == pytest.approx(-1)
    found = sts_correlation(embed, (first, second, [1.0, 2.0, 2.0, 0.0]))
    assert found == pytest.approx(spearmanr([-5, -90, -45, -2], [1, 2, 2, 0]).statistic)
    assert calls[0] == ["0", "10", "5", "90", "45", "12"]  # each once
    assert sts_correlation(lambda texts: torch.ones(len(texts), 2), (first, second, [4.0, 0.0, 2.0, 5.0])) == 0
    with pytest.raises(ValueError, match="3 scores"):
        sts_correlation(embed, (first, second, [1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="are equal"):
        sts_correlation(embed, (first, second, [1.0] * 4))


def test_minilm_knows_what_means_the_same(minilm: Path) -> None:
    model, tokenizer = tf.AutoModel.from_pretrained(minilm), tf.AutoTokenizer.from_pretrained(minilm)
    first = ["A man is eating food.", "The girl rides a horse.", "Stocks fell sharply today."]
    second = ["A man eats something.", "A plane is landing at noon.", "The market dropped."]
    embed = embedder(model, tokenizer)
    similarity = (embed(first) * embed(second)).sum(-1)
    assert similarity[1] < 0.3 < similarity[[0, 2]].min()
    assert sts_correlation(embed, (first, second, [5.0, 0.0, 4.0])) > 0.8
    torch.testing.assert_close(embed(first)[1:2], embed(first[1:2]), rtol=0, atol=1e-5)
