"""Interventions on layers, and plans that drop them or let them reuse attention."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

import hpr
import tiny_families
from hpr.anatomy.describe import describe
from hpr.evaluation.divergence import divergence
from hpr.layer_reuse.ablation import drops, intervene, reuses
from hpr.layer_reuse.install import with_states
from hpr.nn.bank import parameters
from hpr.pipeline.layer_plans import reusing_plans
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from hpr.plans.layer_states import DROPPED, KEYS, WEIGHTS
from hpr.profiling.objectives import OBJECTIVES

GOAL = OBJECTIVES["causal-lm"]


@pytest.fixture
def model() -> tf.PreTrainedModel:
    """A Llama of five layers, of which layer 3 does next to nothing, and layer 1 attends as layer 0 does: to all alike."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny_families.DECODER | {"num_hidden_layers": 5})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        for module in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            module.weight.mul_(1e-4)
        for layer in (0, 1):
            model.model.layers[layer].self_attn.q_proj.weight.zero_()
    return model


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [tiny_families.text(draw) for _ in range(3)]


def test_interventions_are_true_divergences(model: tf.PreTrainedModel, batches: list) -> None:
    found = intervene(model, batches, GOAL)
    assert set(found) == {f"layers.{layer}" for layer in range(1, 5)}
    assert all(set(damages) == {WEIGHTS, KEYS, DROPPED} for damages in found.values())
    assert found["layers.3"][DROPPED] < 1e-4 < found["layers.2"][DROPPED]
    assert found["layers.1"][WEIGHTS] < 1e-6 < found["layers.2"][WEIGHTS]
    expected = divergence(with_states(model, {"layers.2": KEYS}), model, batches, GOAL).mean
    assert found["layers.2"][KEYS] == expected


def test_reuses_grow_layer_by_layer(model: tf.PreTrainedModel, batches: list) -> None:
    anatomy = describe(model)
    found = reuses(model, intervene(model, batches, GOAL), batches, GOAL, lambda one: 1e-7 * one.parameters(anatomy))
    assert [set(one.states) for one in found] == [{"layers.3"}, {"layers.1", "layers.3"}]
    assert found[1].states == {"layers.1": WEIGHTS, "layers.3": DROPPED}
    assert found[1].parameters(describe(model)) > found[0].parameters(describe(model)) > 0
    assert reuses(model, intervene(model, batches, GOAL), batches, GOAL, lambda one: 0.0) == []


def test_drops_grow_from_the_least_harmful_layer(model: tf.PreTrainedModel, batches: list) -> None:
    found = list(drops(model, intervene(model, batches, GOAL), batches, GOAL))
    assert [len(one.states) for one in found] == [1, 2, 3, 4]
    assert found[0].states == {"layers.3": DROPPED}
    assert found[1].damage == divergence(with_states(model, found[1].states), model, batches, GOAL).mean


def test_the_planner_takes_reuse_where_it_pays(model: tf.PreTrainedModel, batches: list, tmp_path: Path) -> None:
    profile = hpr.profile(model, batches)
    profile = replace(profile, interventions=intervene(model, batches, GOAL))
    profile.save(tmp_path / "profile.safetensors")
    assert hpr.Profile.load(tmp_path / "profile.safetensors").interventions == profile.interventions
    draft = planner.draft(model, profile)
    budget = draft.budget("70%")
    (best, *_) = (proposal.plan for proposal in reusing_plans(model, profile, draft, budget, batches, GOAL))
    assert best.layers["layers.3"] == DROPPED
    assert best.damage < draft.best(budget).damage
    best.validate(draft.anatomy)
    student = hpr.share(model, best, profile)
    assert parameters(student) == best.parameters(draft.anatomy) <= budget.parameters
    assert best.parameters(draft.anatomy) > 0.99 * budget.parameters
    assert "layers.3 dropped" in best.diagnostics["label"]
    narrow = planner.draft(model, profile, PlanOptions(only="layers.*.mlp.*"))
    assert reusing_plans(model, profile, narrow, narrow.budget("70%"), batches, GOAL) == []


def test_compress_tries_reuse_where_it_is_asked_to(model: tf.PreTrainedModel, tmp_path: Path) -> None:
    texts = torch.randint(3, 96, (64, 24), generator=torch.Generator().manual_seed(2)).numpy()
    np.save(tmp_path / "ids.npy", texts)
    options = hpr.PlanOptions(reuse=True, refit=False)
    made = hpr.compress(model, "70%", tmp_path / "ids.npy", tmp_path / "out", options)
    assert made.plan.layers["layers.3"] == DROPPED
    assert any("dropped" in row["label"] for row in made.metrics["plans"])
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.as_tensor(texts[:4])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made.student(ids).logits)
    assert "dropped" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
