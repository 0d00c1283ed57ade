"""The price of codes: the bits of the real coder, interpolated between whole numbers."""

import numpy as np
import pytest
import torch

from hpr.coding.codes import Codes
from hpr.coding.stream import encode
from hpr.healing.coded.rate import Price, prices


def drawn(spread: float, shape: tuple[int, int] = (192, 256), seed: int = 0) -> Codes:
    draw = np.random.default_rng(seed)
    rows, columns = draw.integers(-3, 4, shape[0]), draw.integers(-3, 4, shape[1])
    sizes = spread * np.exp2(-(rows[:, None] + columns) / 2)
    values = np.rint(draw.laplace(0, 1, shape) * sizes).astype(np.int32)
    return Codes(values, rows.astype(np.int32), columns.astype(np.int32), 0.01)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0, 30.0])
def test_the_price_is_what_the_coder_takes_within_three_percent(spread: float) -> None:
    codes = [drawn(spread), drawn(spread, (64, 100), 1)]
    price = Price(codes)
    bits = float(price([torch.from_numpy(one.values).float() for one in codes]))
    assert bits == pytest.approx(8 * len(encode(codes)), rel=0.03)
    assert bits == pytest.approx(price.bits, rel=1e-5)


@pytest.mark.parametrize("spread", [0.5, 4.0, 30.0])
def test_the_price_foretells_the_bits_of_codes_that_moved(spread: float) -> None:
    codes = drawn(spread)
    price = Price([codes])
    chosen = np.random.default_rng(5).random(codes.values.shape) < 0.05
    moved = Codes(codes.values - np.sign(codes.values) * chosen, codes.rows, codes.columns, codes.scale)
    before, after = (float(price([torch.from_numpy(one.values).float()])) for one in (codes, moved))
    real = 8 * (len(encode([codes])) - len(encode([moved])))
    assert real > 0
    assert before - after == pytest.approx(real, rel=0.25)


def test_the_slope_is_the_derivative_and_points_away_from_zero() -> None:
    codes = drawn(2.0)
    price = Price([codes])
    latents = (torch.from_numpy(codes.values) + 0.3).requires_grad_(True)
    price([latents]).backward()
    slope = price.slope(0, latents.detach())
    assert latents.grad is not None
    assert torch.allclose(latents.grad, slope, atol=1e-6)
    assert (slope * latents.detach().sign() >= 0).all()
    assert (slope.abs() > 0.1).float().mean() > 0.8
    exact = torch.zeros(codes.values.shape)
    assert (price.slope(0, exact) == 0).all()


def test_between_whole_numbers_the_price_is_linear() -> None:
    codes = drawn(1.0)
    price = Price([codes])
    low, high = (price.of(0, torch.full(codes.values.shape, number)) for number in (1.0, 2.0))
    middle = price.of(0, torch.full(codes.values.shape, -1.25))
    assert torch.allclose(middle, 0.75 * low + 0.25 * high, atol=1e-5)
    assert (high >= low).all()


def test_large_weights_have_a_price_of_their_own_and_small_ones_share_one() -> None:
    codes = {"large": drawn(1.0, (512, 256)), "one": drawn(1.0, (16, 16), 1), "other": drawn(1.0, (16, 8), 2)}
    assert [sites for sites, _ in prices(codes)] == [["large"], ["one", "other"]]
