"""Models made hierarchical by rule: the interface of the source of hierarchical parameter replication."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import hpr
import hpr.nn.bank
import tiny_families
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.errors import HprError
from hpr.evaluation.cost import flops_per_token
from hpr.layer_reuse.install import with_states
from hpr.nn.bank import parameters
from hpr.planning.rules import ByRule
from hpr.runtime.hooks import run

RULED = ["BERT", "GPT-2", "GPT-NeoX", "Llama", "T5", "BART", "Whisper", "ViT"]


def case(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    family = tiny_families.FAMILIES[name]
    return tiny_families.built(family), family.batch(torch.Generator().manual_seed(1))


def rules(model: nn.Module, hidden: list, attention: list) -> dict[str, Any]:
    return {stack.name: {"hidden_states": hidden, "attention_weights": attention} for stack in describe(model).stacks}


def borrowed(model: nn.Module, layers: dict[str, str]) -> nn.Module:
    """The dense model with the whole state of one block copied into another, by hand."""
    anatomy = describe(model)
    stacks = {stack.name: stack.path for stack in anatomy.stacks}
    for layer, owner in layers.items():
        blocks = [module_at(model, f"{stacks[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}") for name in (layer, owner)]
        known = blocks[1].state_dict()
        blocks[0].load_state_dict({key: value for key, value in known.items() if key in blocks[0].state_dict()})
    return model


@pytest.mark.parametrize("name", RULED)
def test_a_layer_computes_with_the_parameters_of_the_layer_below(name: str, tmp_path: Path) -> None:
    model, batch = case(name)
    made = hpr.HierarchicalModel.from_pretrained(model, rules(model, [False, True], [False]))
    assert set(made.replication.computed_with) == {f"{stack.name}.1" for stack in describe(model).stacks}
    found = tiny_families.answer(made, batch)
    assert torch.allclose(found, tiny_families.answer(borrowed(model, made.replication.computed_with), batch), atol=1e-5)
    assert parameters(made.base_model) < parameters(model)
    made.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(tiny_families.answer(again, batch), found)


@pytest.mark.parametrize("name", RULED)
def test_parameters_and_attention_weights_together(name: str, tmp_path: Path) -> None:
    model, batch = case(name)
    made = hpr.HierarchicalModel(model, rules(model, [False, True], [False, True]))
    found = tiny_families.answer(made, batch)
    reused = with_states(
        borrowed(model, made.replication.computed_with), dict.fromkeys(made.replication.reused, "attention reused")
    )
    assert torch.allclose(found, tiny_families.answer(reused, batch), atol=1e-5)
    assert flops_per_token(made.base_model, describe(model)) < flops_per_token(model, describe(model))
    made.save_pretrained(tmp_path / "out")
    assert torch.equal(tiny_families.answer(type(model).from_pretrained(tmp_path / "out").eval(), batch), found)
    output = tiny_families.output_of(run(made.base_model, batch))
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    bank = hpr.nn.bank.bank_of(made.base_model)
    assert all(factor.weight.grad is not None and factor.weight.grad.abs().sum() > 0 for factor in bank.factors.values())


def test_copied_hidden_states_skip_the_layer() -> None:
    model, batch = case("BERT")
    made = hpr.HierarchicalModel(model, {"encoder": {"hidden_states": [False, False, "copy"]}})
    expected = tiny_families.answer(with_states(model, {"encoder.2": "dropped"}), batch)
    assert torch.equal(tiny_families.answer(made, batch), expected)
    assert parameters(made.base_model) < parameters(model)


def test_rules_that_change_nothing() -> None:
    model, batch = case("BERT")
    made = hpr.HierarchicalModel(model, {"encoder": {"hidden_states": [False], "attention_weights": [False]}})
    assert torch.equal(tiny_families.answer(made, batch), tiny_families.answer(model, batch))
    assert parameters(made.base_model) == parameters(model)


def test_the_example_of_the_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = case("BERT")
    model.save_pretrained(tmp_path / "bert")
    with caplog.at_level(logging.WARNING):
        made = hpr.extras.HierarchicalBert(str(tmp_path / "bert"))
    assert "has no decoder: its rules are without effect" in caplog.text
    assert set(made.replication.computed_with) == {"encoder.1", "encoder.2"}
    assert isinstance(made.base_model, tf.BertForMaskedLM)
    assert made.config.model_type == "bert"
    assert tiny_families.output_of(made(batch["input_ids"], batch["attention_mask"])).shape == (8, 24, 96)


def test_its_default_is_not_at_hand_without_a_network() -> None:
    assert hpr.extras.HierarchicalBert.default_base == "bert-base-uncased"
    with pytest.raises(HprError, match="no folder bert-base-uncased"):
        hpr.extras.HierarchicalBert()


def test_a_plan_of_rules_is_a_plan(tmp_path: Path) -> None:
    model, batch = case("GPT-NeoX")
    rule = ByRule(rules(model, [False, True], [False, False, True]))
    plan = rule.plan(model)
    plan.save(tmp_path / "plan.json")
    assert hpr.Plan.load(tmp_path / "plan.json") == plan
    student = hpr.share(model, rule)
    assert parameters(student) == plan.parameters(describe(model)) == plan.budget.parameters
    with pytest.raises(HprError, match="takes no profile"):
        hpr.share(model, rule, hpr.profile(model, [batch]))


def test_what_cannot_be_is_refused() -> None:
    model, _ = case("MPNet")
    with pytest.raises(HprError, match="past transformers' attention interface"):
        hpr.HierarchicalModel(model, {"encoder": {"attention_weights": [True]}})
