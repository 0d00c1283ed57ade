"""Budgets in bytes of models whose experts are slices of one parameter."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf

import hpr
import hpr.nn.coded
from conftest import MIXTURES
from hpr.evaluation.cost import disk_bytes
from hpr.healing.coded.heal import check_recipe
from hpr.nn.coded import chained, codes_of, unchained


@pytest.fixture(params=MIXTURES)
def model(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    found = tf.AutoModelForCausalLM.from_config(MIXTURES[request.param]()).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return found


@pytest.mark.parametrize("packed_below", [1 << 17, 100])  # all weights in the pack, and large ones with streams of their own
def test_experts_are_coded_and_load_with_bit_equal_outputs(
    packed_below: int, model: tf.PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpr.nn.coded, "_PACKED_BELOW", packed_below)
    inputs = {"input_ids": torch.arange(36).view(3, 12) % 40}
    profile = hpr.profile(model, [inputs], structure=False)
    plan = hpr.plan(model, profile, "40%bytes")
    student = hpr.share(model, plan, profile)
    experts = [name for name in codes_of(student) if ".experts." in name]
    assert len(experts) == 16
    folder = hpr.save(student, tmp_path / "coded")
    size = (folder / "model.safetensors").stat().st_size
    assert size == disk_bytes(student) == plan.diagnostics["bytes"] <= 0.4 * disk_bytes(model)
    loaded = type(model).from_pretrained(folder)
    with torch.no_grad():
        expected = student(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
        assert not torch.equal(model(**inputs).logits, expected)
        assert torch.equal(hpr.load(copy.deepcopy(model), folder)(**inputs).logits, expected)
    again = hpr.save(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    base = tf.AutoModel.from_pretrained(folder)
    wanted = student.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(base.get_parameter("layers.1.mlp.experts.down_proj"), wanted)
    hpr.extras.keep_integers(loaded)  # experts stay floats
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    stock = tmp_path / "stock"
    base.save_pretrained(stock)
    assert torch.equal(tf.AutoModel.from_pretrained(stock).get_parameter("layers.1.mlp.experts.down_proj"), wanted)


def test_healing_of_such_experts_is_refused_by_name() -> None:
    model = tf.AutoModelForCausalLM.from_config(MIXTURES["mixtral"]())
    with pytest.raises(hpr.HprError, match=r"experts.*is an expert"):
        check_recipe(model, hpr.Recipe(3))


def test_a_chain_of_streams_is_taken_apart_and_a_damaged_one_is_an_error() -> None:
    streams = [b"one", b"", b"three"]
    assert unchained(chained(streams)) == streams
    for damaged in (b"", chained(streams)[:-1], chained(streams) + b"x", b"\xff\xff\xff\xff"):
        with pytest.raises(hpr.HprError, match="damaged"):
            unchained(damaged)
