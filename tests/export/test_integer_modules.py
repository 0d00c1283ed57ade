"""Products and tables of integers compute what the coded weights say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpr.coding.codes import Codes, Product
from hpr.export.integer_modules import IntegerProduct, IntegerTable, LowRankIntegerProduct, LowRankIntegerTable


def codes_of(draw: np.random.Generator, out: int, width: int, spread: float = 30.0) -> Codes:
    values = draw.normal(0, spread, (out, width)).round().astype(np.int32)
    return Codes(values, draw.integers(-6, 6, out, dtype=np.int32), draw.integers(-4, 4, width, dtype=np.int32), 0.013)


@given(st.integers(0, 2**31), st.sampled_from([16, 48, 128]), st.booleans(), st.sampled_from([1.0, 40.0, 400.0]))
def test_a_product_is_that_of_the_weight(seed, width, tokens, spread):
    """With few vectors the input is not rounded outside an export; else it is, to 256 steps."""
    draw = np.random.default_rng(seed)
    found = codes_of(draw, 9, width, spread)
    x, bias = torch.from_numpy(draw.normal(size=(2, 5, width)).astype(np.float32)), torch.randn(9)
    given = IntegerProduct(found, tokens=tokens)(x, bias)
    weight = found.weight().double()
    wanted = x.double() @ weight.T + bias.double()
    if tokens:
        torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        return
    scaled = x * torch.from_numpy(2.0 ** (found.columns / 2)).float()
    step = float(scaled.max().clamp(min=0) - scaled.min().clamp(max=0)) / 255
    rows = torch.from_numpy(found.scale * 2.0 ** (found.rows / 2))
    most = 0.51 * step * rows * torch.from_numpy(np.abs(found.values).sum(1)) + 1e-5 * wanted.abs().max()
    assert ((given.double() - wanted).abs() <= most).all()


@pytest.mark.parametrize("spread", [1.0, 400.0])
def test_a_table_gives_rows_of_the_weight(spread):
    found = codes_of(np.random.default_rng(0), 50, 16, spread)
    ids = torch.tensor([[0, 49], [7, 7]])
    torch.testing.assert_close(IntegerTable(found)(ids), found.weight()[ids], rtol=1e-6, atol=0)
    assert IntegerTable(found).codes.dtype == (torch.int8 if spread < 100 else torch.int16)


@pytest.mark.parametrize("tokens", [False, True])
def test_few_codes_beyond_eight_bits_are_kept_exactly(tokens):
    found = codes_of(np.random.default_rng(0), 50, 16, 10.0)
    found.values[7, 3], found.values[9, 3] = 5057, -131
    table, product = IntegerTable(found), IntegerProduct(found, tokens=tokens)
    assert table.codes.dtype == torch.int8
    assert table.far is not None
    torch.testing.assert_close(table(torch.arange(50)), found.weight(), rtol=1e-6, atol=0)
    one = torch.zeros(16)
    one[3] = 1.0  # an input that eight bits hold exactly
    torch.testing.assert_close(product(one), found.weight()[:, 3], rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_a_table_reads_the_codes_of_its_head(spread):
    found = codes_of(np.random.default_rng(0), 50, 16, spread)
    head = IntegerProduct(found, tokens=True, tied=True)
    table = IntegerTable(found, head=head)
    ids = torch.tensor([[0, 49], [7, 7]])
    torch.testing.assert_close(table(ids), found.weight()[ids], rtol=1e-6, atol=0)
    assert table.codes.data_ptr() == head.codes.data_ptr()  # also where codes would fit four bits


def test_few_codes_are_packed_two_in_a_byte():
    draw = np.random.default_rng(0)
    found = Codes(draw.integers(-7, 8, (5, 32), dtype=np.int32), np.zeros(5, np.int32), np.zeros(32, np.int32), 0.5)
    product = IntegerProduct(found, tokens=True)
    x = torch.randn(3, 32)
    assert product.codes.numel() == 5 * 16
    torch.testing.assert_close(product(x), x @ found.weight().T)


@pytest.mark.parametrize("spread", [3.0, 300.0])
def test_products_of_two_factors(spread):
    draw = np.random.default_rng(1)
    found = Product(codes_of(draw, 40, 16, 3.0), codes_of(draw, 16, 32, spread))
    ids, x = torch.tensor([[1, 39]]), torch.randn(4, 32)
    weight = found.weight()
    torch.testing.assert_close(LowRankIntegerTable(found)(ids), weight[ids], rtol=1e-4, atol=1e-4 * float(weight.abs().max()))
    wanted = x @ weight.T
    torch.testing.assert_close(
        LowRankIntegerProduct(found, tokens=True)(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
    )
    assert (LowRankIntegerProduct(found)(x) - wanted).norm() < 0.05 * wanted.norm()
