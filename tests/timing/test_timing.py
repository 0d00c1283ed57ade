"""What a call costs, by site; targets and shapes as users write them."""

import copy

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from hpr.anatomy.describe import describe
from hpr.errors import BudgetError
from hpr.evaluation.cost import forward_flops
from hpr.layer_reuse.install import with_states
from hpr.plans.terms import Term
from hpr.timing.call import call_batch
from hpr.timing.clock import measured_costs
from hpr.timing.operations import counted_costs
from hpr.timing.target import Target


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 100}
    return tf.BertModel(tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24)).eval()


@pytest.mark.parametrize(("text", "share"), [("0.7x", 0.7), ("70%", 0.7), (" 1x ", 1.0), (".5 X", 0.5)])
def test_shares_are_read(text, share):
    assert Target("latency", text, "1x128").share == pytest.approx(share)


@pytest.mark.parametrize("text", ["0.7", "2x", "0x", "fast", "", 0.7, None, "-1x"])
def test_other_shares_are_refused(text):
    with pytest.raises(BudgetError, match=r"latency is .*: give a share"):
        Target("latency", text, "1x128")


@pytest.mark.parametrize("shape", ["128", "1x", "0x128", "1x0", "1 by 2", 3, None])
def test_other_shapes_are_refused(shape):
    with pytest.raises(BudgetError, match="give examples and tokens"):
        Target("flops", "0.7x", shape)


def test_calls_have_the_shape(model):
    batch = call_batch(model, Target("flops", "0.7x", "3x20"))
    assert batch["input_ids"].shape == (3, 20)
    with pytest.raises(BudgetError, match="has 24 positions: give fewer tokens"):
        call_batch(model, Target("flops", "0.7x", "1x25"))


def test_other_models_are_called_with_what_is_given():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    batch = call_batch(plain, Target("flops", "0.7x", "2x128"), {"input": torch.zeros(6, 5, 4)})
    assert batch["input"].shape == (2, 5, 4)


def test_operations_are_those_that_the_pass_counts(model):
    batch = call_batch(model, Target("flops", "0.7x", "2x16"))
    costs = counted_costs(model, describe(model), batch)
    assert costs.total == forward_flops(model, batch)
    assert costs.positions == 32
    site = costs.sites["encoder.layer.1.intermediate.dense"]
    assert site.dense == 2 * 32 * 32 * 64
    assert site.of([Term("u", "v", 8)]) == 2 * 32 * 8 * (32 + 64)
    assert site.of([Term("a"), Term("u", "v", 8)]) == site.dense + site.of([Term("u", "v", 8)])
    assert costs.of("no such site", ()) == 0.0
    pooled = costs.sites["pooler.dense"]
    assert pooled.dense == 2 * 2 * 32 * 32, "a pooler sees one vector of each example"


def test_a_dropped_layer_takes_its_attention_with_it(model):
    batch = call_batch(model, Target("flops", "0.7x", "1x16"))
    anatomy = describe(model)
    costs = counted_costs(model, anatomy, batch)
    changed = with_states(model, {"encoder.2": "dropped"})
    assert costs.beside(changed) == pytest.approx(costs.outside * 2 / 3)


def test_times_are_measured_and_the_model_is_left_as_it_was(model):
    batch = call_batch(model, Target("latency", "0.7x", "1x16"))
    before, state = [vars(module).get("forward") for module in model.modules()], copy.deepcopy(model.state_dict())
    outputs = model(**batch).last_hidden_state
    costs = measured_costs(model, describe(model), batch)
    assert [vars(module).get("forward") for module in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**batch).last_hidden_state, outputs)
    assert costs.unit == "ms"
    assert costs.total > costs.outside >= 0
    assert costs.positions == 16
    first, second = (costs.sites[f"encoder.layer.{layer}.output.dense"] for layer in (0, 2))
    assert first.dense == second.dense > 0, "sites of one shape have one time"
    ranks = [first.of([Term("u", "v", rank)]) for rank in range(1, 33)]
    assert costs.total == pytest.approx(costs.outside + sum(site.dense for site in costs.sites.values()))
    assert (np.diff(ranks) >= 0).all()
    assert max(ranks) <= first.dense, "a Linear never takes longer than whole"
    table = costs.sites["embeddings.word_embeddings"]
    assert table.of([Term("u", "v", 8, rows=(0, 50)), Term("w", rows=(50, 100))]) > 0.5 * table.dense


def test_large_weights_take_the_time():
    """Of a layer as wide as this the products are nearly everything, so a thin one saves most of the time."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 768)).eval()
    costs = measured_costs(wide, describe(wide), {"input": torch.randn(1, 256, 768)})
    assert costs.outside < 0.3 * costs.total
    assert costs.sites["0"].of([Term("u", "v", 32)]) < 0.5 * costs.sites["0"].dense


def test_tied_heads_are_timed_with_their_table():
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=120, n_positions=16)
    writer = tf.GPT2LMHeadModel(config).eval()
    anatomy = describe(writer)
    batch = call_batch(writer, Target("latency", "0.7x", "1x8"))
    table = next(site for site in anatomy.sites if site.kind == "embedding" and site.aliases)
    counted, timed = counted_costs(writer, anatomy, batch), measured_costs(writer, anatomy, batch)
    assert len(timed.sites[table.name].readings) == len(counted.sites[table.name].readings) == 2
    assert counted.sites[table.name].dense == 2 * 8 * 120 * 32, "the lookup counts as nothing, the head as a product"
