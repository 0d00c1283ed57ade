from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpr.coding.codes import Codes, Product
from hpr.coding.pack import Pack
from hpr.coding.record import Coded


def codes(shape: tuple[int, int], largest: int, seed: int, scale: float = 0.03) -> Codes:
    random = np.random.default_rng(seed)
    values = random.integers(-largest, largest + 1, shape).astype(np.int32)
    rows, columns = (random.integers(-12, 13, count).astype(np.int32) for count in shape)
    return Codes(values, rows, columns, scale)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 3, 90, 40_000]), st.integers(0, 99))
def test_a_product_is_that_of_its_factors(height: int, width: int, rank: int, largest: int, seed: int) -> None:
    product = Product(codes((height, rank), largest, seed), codes((rank, width), largest, seed + 1, 0.5))
    exact = product.u.weight().double() @ product.v.weight().double()
    size = product.u.weight().double().abs() @ product.v.weight().double().abs()
    assert product.is_exact
    assert bool((product.weight().double() - exact).abs().le(1e-4 * size + 1e-12).all())
    assert product.rank == rank


def test_the_sums_of_a_product_are_exact_so_their_order_does_not_matter() -> None:
    product = Product(codes((40, 16), 900, 0), codes((16, 40), 900, 1))
    order = np.random.default_rng(2).permutation(16)
    u, v = product.u, product.v
    shuffled = Product(
        Codes(u.values[:, order], u.rows, u.columns[order], u.scale), Codes(v.values[order], v.rows[order], v.columns, v.scale)
    )
    assert torch.equal(product.weight(), shuffled.weight())


def test_scales_of_whole_octaves_give_the_exact_product() -> None:
    random = np.random.default_rng(3)
    even = lambda count: 2 * random.integers(-3, 4, count).astype(np.int32)  # noqa: E731
    u = Codes(random.integers(-9, 10, (5, 4)).astype(np.int32), even(5), even(4), 0.5)
    v = Codes(random.integers(-9, 10, (4, 6)).astype(np.int32), even(4), even(6), 0.25)
    found = Product(u, v).weight()
    for i in range(5):
        for j in range(6):
            terms = (
                Fraction(int(u.values[i, k]) * int(v.values[k, j])) * Fraction(2) ** int((u.columns[k] + v.rows[k]) // 2)
                for k in range(4)
            )
            exact = sum(terms) * Fraction(2) ** int((u.rows[i] + v.columns[j]) // 2) / 8
            assert float(found[i, j]) == pytest.approx(float(exact), rel=1e-6)


def test_a_product_of_zeros_is_zero() -> None:
    product = Product(codes((3, 2), 0, 0), codes((2, 4), 5, 1))
    assert not product.weight().any()


def test_streams_and_packs_give_back_whole_weights_and_products() -> None:
    product, whole = Product(codes((30, 4), 5, 0), codes((4, 20), 5, 1)), codes((30, 20), 3, 2)
    found = Coded.of(product).codes()
    assert isinstance(found, Product)
    assert torch.equal(found.weight(), product.weight())
    assert torch.equal(Coded.of(product).weight(), product.weight())
    pack = Pack.from_bytes(Pack({"a": whole, "b": product, "c": whole}, {"n": codes((1, 7), 9, 3)}).to_bytes())
    assert torch.equal(pack.weights["a"].weight(), whole.weight())
    assert torch.equal(pack.weights["b"].weight(), product.weight())
    assert torch.equal(pack.weights["c"].weight(), whole.weight())
    assert torch.equal(pack.others["n"].weight(), codes((1, 7), 9, 3).weight())
