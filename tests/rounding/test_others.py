import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import hpr
from hpr.rounding.others import round_others


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-8, 1e6), st.floats(1e-6, 1e-1), st.integers(0, 5))
def test_a_parameter_costs_no_more_than_its_grid_allows(sensitivity: float, step: float, seed: int) -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    [codes] = round_others({"bias": values}, {"bias": sensitivity}, step).values()
    errors = codes.weight().flatten().double() - values.double()
    unit = step * 2.0 ** (codes.rows[0] / 2)
    assert float(errors.abs().max()) <= 0.5 * unit + 1e-6  # and what float32 adds
    assert unit <= 0.6 * float(values.std())  # never coarser than about 3 bits
    wanted = step * (2 / sensitivity) ** 0.5
    if 2.0**-20 < wanted < 0.4:
        assert unit == pytest.approx(wanted, rel=0.19)  # half octaves


def test_constants_zeros_and_numbers_that_are_not_finite() -> None:
    values = {"ones": torch.ones(4), "zeros": torch.zeros(3), "broken": torch.tensor([1.0, float("nan")])}
    codes = round_others(values, dict.fromkeys(values, 0.0), 1e-3)
    assert set(codes) == {"ones", "zeros"}
    assert torch.allclose(codes["ones"].weight(), torch.ones(4), rtol=0.3)
    assert np.array_equal(codes["zeros"].values, np.zeros((1, 3)))


def test_values_computed_from_weights_before_rounding_are_given_up(tmp_path) -> None:
    """Levit keeps its attention biases from the first pass in evaluation mode on."""
    torch.manual_seed(0)
    sizes = {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8] * 3,
    }
    model = tf.LevitForImageClassification(tf.LevitConfig(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("attention_biases"):
            parameter.data.normal_()
    batches = [{"pixel_values": torch.randn(4, 3, 64, 64)} for _ in range(8)]
    made = hpr.compress(model, "25%bytes", batches, tmp_path / "out", hpr.PlanOptions(plans=1))
    loaded = tf.LevitForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, made.student(**batches[0]).logits)
    assert not made.student.training
