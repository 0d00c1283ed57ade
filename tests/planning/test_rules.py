"""Rules by hand: which layers share, copy and reuse."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers as tf
from torch import nn

from hpr.anatomy.describe import describe
from hpr.errors import PlanError
from hpr.planning.rules import Replication, replication

Build = Callable[..., nn.Module]


def read(model: nn.Module, rules: Any) -> Replication:
    return replication(rules, model, describe(model))


@pytest.mark.parametrize(
    ("hidden", "attention", "computed_with", "copied", "reused"),
    [
        ([False], [False], {}, (), ()),
        ([True], [False], {"encoder.1": "encoder.0", "encoder.2": "encoder.0"}, (), ()),
        (["share"], [False], {"encoder.1": "encoder.0", "encoder.2": "encoder.0"}, (), ()),
        ([False, True], [False], {"encoder.1": "encoder.0"}, (), ()),
        ([False, False, True], [False], {"encoder.2": "encoder.1"}, (), ()),
        ([False, "copy"], [False], {}, ("encoder.1",), ()),
        ([False, "copy", True], [False], {"encoder.2": "encoder.0"}, ("encoder.1",), ()),
        ([False], [True], {}, (), ("encoder.1", "encoder.2")),
        ([False], [False, True], {}, (), ("encoder.1",)),
        ([True], [True], {"encoder.1": "encoder.0", "encoder.2": "encoder.0"}, (), ("encoder.1", "encoder.2")),
        ([False, "copy"], [False, True], {}, ("encoder.1",), ()),
    ],
)
def test_the_rule_table(build: Build, hidden: list, attention: list, computed_with: dict, copied: tuple, reused: tuple) -> None:
    found = read(build("bert"), {"encoder": {"hidden_states": hidden, "attention_weights": attention}})
    assert (found.computed_with, found.copied, found.reused) == (computed_with, copied, reused)


def test_what_has_no_effect_is_noted(build: Build) -> None:
    found = read(
        build("bert"),
        {
            "encoder": {"hidden_states": [True, "copy"], "attention_weights": [True]},
            "decoder": {"hidden_states": [False], "attention_weights": [True]},
        },
    )
    assert found.reused == ("encoder.2",)
    assert found.copied == ("encoder.1",)
    assert found.computed_with == {"encoder.2": "encoder.0"}
    assert [note.split(" ")[0] for note in found.notes] == ["encoder.0", "encoder.1", "BertModel"]
    assert "has no decoder" in found.notes[-1]


def test_a_rule_that_is_left_out_means_own(build: Build) -> None:
    assert read(build("bert"), {"encoder": {}}) == Replication()
    assert read(build("bert"), {}) == Replication()
    assert read(build("bert"), {"encoder": {"hidden_states": [False, True]}}).computed_with == {"encoder.1": "encoder.0"}


def test_stacks_are_known_by_role_and_by_name(build: Build) -> None:
    rule = {"hidden_states": [False, True]}
    assert set(read(build("bart"), {"encoder": rule, "decoder": rule}).computed_with) == {"encoder.1", "decoder.1"}
    gpt2 = build("gpt2", tf.AutoModelForCausalLM)
    (stack,) = describe(gpt2).stacks
    for name in ("decoder", stack.name):
        assert set(read(gpt2, {name: rule}).computed_with) == {f"{stack.name}.1"}
    assert "has no encoder" in read(gpt2, {"encoder": rule}).notes[0]


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ([], "give a dictionary"),
        ({"middle": {"hidden_states": [True]}}, "names a stack 'middle'"),
        ({"encoder": [True]}, "are a list"),
        ({"encoder": {"hidden": [True]}}, "a rule 'hidden'"),
        ({"encoder": {"hidden_states": []}}, "is empty"),
        ({"encoder": {"hidden_states": True}}, "give a list"),
        ({"encoder": {"hidden_states": "share"}}, "give a list"),
        ({"encoder": {"hidden_states": [True] * 4}}, "has 4 values, the stack has 3 layers"),
        ({"encoder": {"hidden_states": [1]}}, "1 means nothing"),
        ({"encoder": {"hidden_states": ["tie"]}}, "'tie' means nothing"),
        ({"encoder": {"attention_weights": ["copy"]}}, "'copy' means nothing for 'attention_weights'"),
        ({"encoder": {"attention_weights": [None]}}, "None means nothing"),
        ({"decoder": {"attention_weights": ["copy"]}}, "'copy' means nothing"),
        ({"encoder": {"hidden_states": [True]}, "decoder": {"hidden_states": ["no"]}}, "'no' means nothing"),
    ],
)
def test_rules_that_mean_nothing(build: Build, rules: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        read(build("bert"), rules)


def test_one_stack_is_ruled_once(build: Build) -> None:
    gpt2 = build("gpt2", tf.AutoModelForCausalLM)
    (stack,) = describe(gpt2).stacks
    with pytest.raises(PlanError, match="the same stack"):
        read(gpt2, {"decoder": {"hidden_states": [True]}, stack.name: {"hidden_states": [True]}})
