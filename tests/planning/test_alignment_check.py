"""The look at one pair of layers: what promises to pay is chosen, what does not is left alone."""

import pytest
import torch
import transformers as tf

import hpr
from hpr.anatomy.describe import describe
from hpr.anatomy.symmetry import layers_of, transform_site
from hpr.operators.metric import measure
from hpr.operators.registry import OPERATORS
from hpr.planning.alignment_check import alignment_targets


@pytest.fixture(scope="module")
def case():
    """A BERT whose second feed-forward is the first in another order, and whose attentions differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = tf.BertModel(tf.BertConfig(**sizes, vocab_size=100, max_position_embeddings=24, initializer_range=0.2)).eval()
    batches = [{"input_ids": torch.randint(3, 100, (16, 12))}]
    neurons = next(one for one in hpr.profile(model, batches).symmetries if one.kind == "order" and one.blocks == 64)
    lower, upper = model.encoder.layer
    for name in ("intermediate", "output"):
        getattr(upper, name).load_state_dict(getattr(lower, name).state_dict())
    for axis_slice in neurons.slices:
        transform_site(model, layers_of(describe(model), neurons)[1][axis_slice.slot], axis_slice, torch.randperm(64))
    return model, hpr.profile(model, batches)


def targets(case, operators=OPERATORS, chosen=None, margin: float = 0.02):
    model, profile = case
    anatomy = describe(model)
    names = {site.name for site in anatomy.sites} if chosen is None else chosen
    return alignment_targets(anatomy, profile, measure(model, anatomy, profile), names, set(operators), margin)


def test_a_permuted_copy_promises_to_pay(case) -> None:
    found = targets(case, ["tie"])
    assert any(target.symmetry.blocks == 64 and target.align_to == "layer below" for target in found)


def test_private_operators_gain_nothing(case) -> None:
    assert targets(case, ["keep", "low rank"], margin=0.0) == ()


def test_the_margin_decides(case) -> None:
    assert set(targets(case, margin=0.9)) <= set(targets(case, margin=0.02)) | set(targets(case, margin=0.0))
    assert targets(case, margin=1.0) == ()


def test_only_what_is_planned_is_looked_at(case) -> None:
    assert targets(case, chosen=set()) == ()
    attention = {site.name for site in describe(case[0]).sites if "attention" in site.name}
    assert all("attention" in slot for target in targets(case, ["tie"], attention) for slot in target.symmetry.slots)
