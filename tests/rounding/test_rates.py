import math

import numpy as np
import pytest
from torch import nn

import hpr
from hpr.coding.codes import Codes
from hpr.coding.record import Coded
from hpr.rounding.model import Rounder
from hpr.rounding.rates import Rates, estimated_bytes


def drawn(height: int, width: int, size: float) -> Codes:
    draw = np.random.default_rng(0)
    spread = size * np.exp2(draw.normal(size=(height, 1)) + draw.normal(size=width))
    values = np.rint(draw.normal(size=(height, width)) * spread).astype(np.int32)
    return Codes(values, np.zeros(height, np.int32), np.zeros(width, np.int32), 1.0)


@pytest.mark.parametrize("size", [0.2, 1.0, 30.0, 3000.0])
def test_the_estimate_is_near_what_the_coder_needs(size: float) -> None:
    codes = drawn(1024, 384, size)
    assert estimated_bytes({"a": codes}) == pytest.approx(len(Coded.of(codes).stream), rel=0.03)


def test_some_rows_stand_for_all_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"a": drawn(4096, 256, 2.0)}
    whole = estimated_bytes(codes)
    monkeypatch.setattr("hpr.rounding.rates._COUNTED", 1 << 17)
    assert estimated_bytes(codes) == pytest.approx(whole, rel=0.02)


def test_codes_of_any_size_are_counted_in_bounded_memory() -> None:
    values = np.array([[2**30, -(2**30)], [0, 1]], np.int32)
    assert estimated_bytes({"a": Codes(values, np.zeros(2, np.int32), np.zeros(2, np.int32), 1.0)}) > 0


def test_the_prediction_meets_the_bits_that_are_asked_for_and_falls_with_the_step(
    bert: nn.Module, profile: hpr.Profile
) -> None:
    rounder = Rounder(bert, profile, 0.15, 0.15)
    rates = Rates(rounder.sites)
    assert rates.numbers == sum(site.weight.numel() for site in rounder.sites)
    step = rates.step(3 * rates.numbers, rounder.finest, 1e3)
    assert rates.bits(step) == pytest.approx(3 * rates.numbers, rel=1e-3)
    finer = (math.log(rates.bits(step / 2)) - math.log(rates.bits(step))) / math.log(1 / 2)
    assert rates.slope(step) == pytest.approx(finer, rel=0.2)


def test_the_slope_is_that_of_the_size_of_real_codes(bert: nn.Module, profile: hpr.Profile) -> None:
    rounder = Rounder(bert, profile, 0.15, 0.15)
    rates = Rates(rounder.sites)
    step = rates.step(4 * rates.numbers, rounder.finest, 1e3)
    sizes = [math.log(estimated_bytes(rounder.codes(each))) for each in (step, 1.1 * step)]
    assert (sizes[1] - sizes[0]) / math.log(1.1) == pytest.approx(rates.slope(step), rel=0.25)
