import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpr.coding import tables
from hpr.coding.codes import Codes, half_octaves
from hpr.coding.stream import decode, encode
from hpr.errors import CheckpointError


def codes(shape: tuple[int, int], size: float, seed: int = 0) -> Codes:
    random = np.random.default_rng(seed)
    values = np.rint(random.standard_normal(shape) * size * 2 ** random.normal(0, 0.7, (shape[0], 1))).astype(np.int32)
    return Codes(
        values, random.integers(-5, 6, shape[0]).astype(np.int32), random.integers(-5, 6, shape[1]).astype(np.int32), 0.3
    )


def equal(left: Codes, right: Codes) -> bool:
    return left.scale == right.scale and all(
        np.array_equal(getattr(left, part), getattr(right, part)) for part in ("values", "rows", "columns")
    )


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.2, 1.0, 30.0, 4e3, 1e8]), st.integers(0, 9))
def test_decoding_gives_what_was_encoded(height: int, width: int, size: float, seed: int) -> None:
    given = codes((height, width), size, seed)
    assert equal(decode(encode([given]))[0], given)


def test_a_stream_is_close_to_the_entropy_of_its_rows() -> None:
    given = codes((300, 400), 1.5)
    bits = 0.0
    for row in given.values:
        _, counts = np.unique(row, return_counts=True)
        bits -= float((counts * np.log2(counts / len(row))).sum())
    assert 8 * len(encode([given])) < 1.04 * bits  # bits are those of a table for each row, which costs nothing here


def test_large_sizes_are_tried_in_the_layout_of_large_weights() -> None:
    given = codes((700, 500), 0.8)
    assert equal(decode(encode([given]))[0], given)


@pytest.mark.parametrize("size", [0.5, 200.0])
def test_any_changed_byte_is_an_error(size: float) -> None:
    stream = encode([codes((12, 9), size)])
    for place in range(len(stream)):
        for change in (1, 0x80, 0xFF):
            damaged = bytearray(stream)
            damaged[place] ^= change
            with pytest.raises(CheckpointError, match="coded weight"):
                decode(bytes(damaged))


def test_a_stream_that_is_cut_short_is_an_error() -> None:
    stream = encode([codes((12, 9), 1.0)])
    for length in (0, 10, len(stream) - 4, len(stream) - 1):
        with pytest.raises(CheckpointError, match="download"):
            decode(stream[:length])


def test_a_weight_is_the_code_times_its_scales() -> None:
    given = codes((6, 5), 3.0)
    expected = given.values * given.scale * 2.0 ** (given.rows[:, None] / 2) * 2.0 ** (given.columns / 2)
    assert torch.allclose(given.weight().double(), torch.from_numpy(expected), rtol=1e-6, atol=0)


def test_even_exponents_are_exact_powers_of_two() -> None:
    exponents = np.arange(-40, 42, 2, dtype=np.int32)
    assert np.array_equal(half_octaves(exponents), np.ldexp(1.0, exponents // 2))


def test_without_constriction_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = encode([codes((4, 4), 1.0)])
    monkeypatch.setattr(tables, "constriction", None)
    with pytest.raises(CheckpointError, match="pip install constriction"):
        decode(stream)


def test_table_weights_are_powers_of_two_in_eighths() -> None:
    assert np.allclose(tables._WEIGHTS[:200] / tables._WEIGHTS[0], 2.0 ** (-np.arange(200) / 8), rtol=1e-4)
