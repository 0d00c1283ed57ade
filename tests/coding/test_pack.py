import numpy as np
import pytest
import torch

from hpr.coding.codes import Codes
from hpr.coding.layout import Layout
from hpr.coding.pack import Pack
from hpr.coding.stream import decode, encode
from hpr.errors import CheckpointError


def weight(shape: tuple[int, int], size: float, seed: int = 0) -> Codes:
    random = np.random.default_rng(seed)
    rows, columns = (random.integers(-4, 5, count).astype(np.int32) for count in shape)
    sizes = size * 2.0 ** (-rows[:, None] / 2 - columns / 2)
    return Codes(np.rint(random.standard_normal(shape) * sizes).astype(np.int32), rows, columns, 0.01)


def vector(length: int, centre: int, spread: float, seed: int = 0) -> Codes:
    values = centre + np.rint(spread * np.random.default_rng(seed).standard_normal((1, length))).astype(np.int32)
    return Codes(values, np.array([3], np.int32), np.zeros(length, np.int32), 0.01)


def same(left: Codes, right: Codes) -> bool:
    parts = ("values", "rows", "columns")
    return left.scale == right.scale and all(np.array_equal(getattr(left, part), getattr(right, part)) for part in parts)


@pytest.fixture
def pack() -> Pack:
    plain = {
        "half": torch.arange(6.0).half().view(2, 3),
        "count": torch.tensor(7),
        "none": torch.empty(0, 4),
        "brain": torch.ones(3, dtype=torch.bfloat16),
    }
    return Pack({f"layer.{i}.weight": weight((16, 24), 1.0, i) for i in range(5)}, {"norm.bias": vector(24, 90, 4.0)}, plain)


def test_a_pack_gives_back_what_went_in(pack: Pack) -> None:
    found = Pack.from_bytes(pack.to_bytes())
    assert list(found.weights) == list(pack.weights)
    assert list(found.others) == list(pack.others)
    assert all(same(found.weights[name], codes) for name, codes in pack.weights.items())
    assert same(found.others["norm.bias"], pack.others["norm.bias"])
    assert list(found.plain) == list(pack.plain)
    for name, tensor in pack.plain.items():
        assert found.plain[name].dtype == tensor.dtype
        assert torch.equal(found.plain[name], tensor)


def test_an_empty_pack_and_one_of_plain_tensors_alone() -> None:
    assert Pack.from_bytes(Pack().to_bytes()) == Pack()
    found = Pack.from_bytes(Pack(plain={"x": torch.ones(3)}).to_bytes())
    assert torch.equal(found.plain["x"], torch.ones(3))


def test_any_changed_byte_of_a_pack_is_an_error(pack: Pack) -> None:
    packed = pack.to_bytes()
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 0x10
        with pytest.raises(CheckpointError):
            Pack.from_bytes(bytes(damaged))


def test_a_pack_that_is_cut_short_is_an_error(pack: Pack) -> None:
    packed = pack.to_bytes()
    for length in (0, 12, 40, len(packed) - 1):
        with pytest.raises(CheckpointError):
            Pack.from_bytes(packed[:length])


def test_weights_in_one_stream_share_their_tables() -> None:
    weights = [weight((16, 24), 1.0, seed) for seed in range(20)]
    assert all(same(*pair) for pair in zip(decode(encode(weights)), weights, strict=True))
    assert len(encode(weights)) < 0.8 * sum(len(encode([one])) for one in weights)


def test_numbers_around_a_far_centre_cost_what_their_spread_costs() -> None:
    near, far = (len(encode([vector(4000, centre, 4.0)])) for centre in (0, 5000))
    assert abs(near - far) <= 4
    assert Layout.of(vector(4000, 5000, 4.0)).flat
