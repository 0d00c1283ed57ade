import math

import pytest
import torch
from torch import nn

import hpr
from hpr.profiling.profile import SiteStatistics
from hpr.rounding.limit import Limit


def moment(size: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T / (2 * size)


def test_the_damage_is_that_of_the_metric() -> None:
    left, right = moment(5, 0), moment(7, 1)
    weight, change = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    limit = Limit(0.1, 0.2)
    limit.add("linear", SiteStatistics(left, right, 3.0), weight, change)
    left = left + 0.1 * left.diagonal().mean() * torch.eye(5).double()
    right = right + 0.2 * right.diagonal().mean() * torch.eye(7).double()
    assert limit.damage == pytest.approx(float(1.5 * torch.trace(left @ change @ right @ change.T)), rel=1e-12)


def test_at_many_bits_each_number_gets_its_share() -> None:
    """Rate distortion of independent Gaussians: D = n · (geometric mean of variances) · 2^(-2 R / n)."""
    left, right, rows, columns = torch.tensor([1.0, 4.0]), moment(3, 2), torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.5, 1.0])
    weight = (rows[:, None] * columns).double()
    limit = Limit(1e-12, 1e-12)
    limit.add("linear", SiteStatistics(left.double(), right, 2.0), weight, torch.ones(2, 3).double())
    squares = weight.square()
    variances = squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()  # 0.5 · N is 1
    log2 = float(variances.log2().sum() + 3 * left.double().log2().sum() + 2 * torch.linalg.slogdet(right)[1] / math.log(2))
    assert limit.least(60.0) == pytest.approx(6 * 2 ** (log2 / 6 - 2 * 60 / 6), rel=1e-4)
    assert limit.decibels(60.0) == pytest.approx(10 * math.log10(limit.damage / limit.least(60.0)))


def test_without_bits_everything_is_lost_and_small_variances_get_no_bits() -> None:
    limit = Limit(1e-12, 1e-12)
    limit.add(
        "linear",
        SiteStatistics(torch.ones(1).double(), torch.tensor([1.0, 1e-6]).double(), 2.0),
        *2 * [torch.ones(1, 2).double()],
    )
    assert limit.least(0.0) == pytest.approx(1 + 1e-6)
    assert limit.least(3.0) == pytest.approx(2.0**-6 + 1e-6)  # reverse water-filling by hand
    assert limit.least(1e9) == pytest.approx(0.0, abs=1e-30)


def test_a_site_without_gradient_and_no_site_do_no_damage() -> None:
    limit = Limit(0.15, 0.15)
    assert limit.least(10.0) == 0.0
    limit.add("linear", SiteStatistics(torch.ones(2), torch.ones(2), 0.0), torch.ones(2, 2), torch.ones(2, 2))
    assert limit.damage == 0.0
    assert limit.decibels(10.0) is None


def test_every_plan_in_bytes_says_how_far_above_the_limit_it_stands(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "40%bytes")
    assert 0.5 < plan.diagnostics["decibels"] < 12
    assert f"{plan.diagnostics['decibels']:.1f} decibels above the limit" in str(plan)
