"""Many tasks on one body."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import hpr
from hpr.data.sources import Mixture
from hpr.healing.loss import Weights
from hpr.nn.bank import bank_of, parameters
from hpr.nn.multitask import ManyHeads

TASKS = {"parity": 2, "sum": 1}
LABELS_ALONE = Weights(outputs=0.0, labels=1.0)


def body() -> BertModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=60, max_position_embeddings=8, **shape)
    return BertModel(config).eval()


def many() -> ManyHeads:
    dense = body()
    torch.manual_seed(1)
    return ManyHeads(hpr.share(dense, hpr.presets.albert()), TASKS)


def examples(model: ManyHeads, name: str, count: int = 24) -> list[dict]:
    """Whether the first token is odd, or how large it is: what no other task needs."""
    draw = torch.Generator().manual_seed(TASKS[name])
    ids = torch.randint(60, (8 * count, 6), generator=draw)
    labels = ids[:, 0] % 2 if name == "parity" else ids[:, 0] / 60
    found = zip(ids.split(8), labels.split(8), strict=True)
    return model.batches(name, [{"input_ids": one, "labels": label} for one, label in found])


def test_a_further_task_costs_its_head_alone() -> None:
    dense = body()
    one, both = (ManyHeads(dense, {name: TASKS[name] for name in names}) for names in (["sum"], ["sum", "parity"]))
    assert parameters(both) - parameters(one) == 16 * 2 + 2
    assert parameters(one) - parameters(dense) == 16 + 1


def test_the_mean_is_over_what_counts() -> None:
    model = many()
    short = {"input_ids": torch.tensor([[5, 6, 7]]), "task": torch.tensor([0])}
    mask = torch.tensor([[1, 1, 1, 0]])
    long = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": mask, "task": torch.tensor([0])}
    torch.testing.assert_close(model(**long)["logits"], model(**short)["logits"])


def test_a_task_moves_its_own_head_and_the_body() -> None:
    model = many()
    model(**examples(model, "parity", 1)[0])["loss"].backward()
    assert model.heads[1].weight.grad is None
    assert all(factor.weight.grad.abs().sum() > 0 for factor in bank_of(model).factors.values())


def test_outputs_are_read_as_those_of_a_classifier() -> None:
    model, data = many(), examples(many(), "parity", 3)
    found = hpr.evaluate(model, ManyHeads(body(), TASKS), data, "classification", repeats=0)
    assert any(row["name"].startswith("Same first choice") for row in found["quality"])


def test_healed_together_and_read_again(tmp_path: Path) -> None:
    model = many()
    data = {name: examples(model, name) for name in TASKS}
    dense = ManyHeads(body(), TASKS)
    recipe = hpr.Recipe("120steps", learning_rate=2e-2, weights=LABELS_ALONE)
    healing = hpr.heal(model, dense, Mixture(files=data, shares={"parity": 2, "sum": 1}), recipe)
    assert healing.after.mean < 0.8 * healing.before.mean
    hpr.save(model, tmp_path / "out")
    again = hpr.load(ManyHeads(body(), TASKS), tmp_path / "out")
    for name in TASKS:
        batch = data[name][0]
        assert torch.equal(again(**batch)["logits"], model(**batch)["logits"])


def test_what_does_not_fit_is_said() -> None:
    model = many()
    with pytest.raises(hpr.HprError, match="no head for 'rank': there are parity, sum"):
        model.batches("rank", [])
    with pytest.raises(hpr.HprError, match=r"outputs \{'rank': 0\}: at least one task"):
        ManyHeads(body(), {"rank": 0})
    with pytest.raises(hpr.HprError, match="no config with a hidden_size"):
        ManyHeads(copy.deepcopy(model.heads[0]), TASKS)
