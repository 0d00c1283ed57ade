"""A gzip stream of integers is what gzip reads, and smaller than gzip's own."""

from __future__ import annotations

import gzip

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpr.export import deflate


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_gzip_gives_the_bytes_back(data, piece):
    kept, deflate._PIECE = deflate._PIECE, piece
    try:
        assert gzip.decompress(deflate.deflated(data)) == data
    finally:
        deflate._PIECE = kept


def test_small_integers_take_fewer_bytes_than_gzip_makes_of_them():
    codes = np.random.default_rng(0).normal(0, 1.5, 400_000).round().astype(np.int8).tobytes()
    assert len(deflate.deflated(codes)) < 0.95 * len(gzip.compress(codes, 9))
