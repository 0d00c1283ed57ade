"""Damping: any finite moment becomes positive definite, and factors and solutions are those of the dense formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpr.errors import HprError
from hpr.operators import damping
from hpr.operators.identity_block import divide

SCALES = st.sampled_from([1e-40, 1e-20, 1e-3, 1.0, 1e6, 1e20])


def moment_of(rank: int, size: int, scale: float, seed: int) -> Tensor:
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * rows.T @ rows


@given(
    rank=st.integers(0, 6),
    size=st.integers(1, 6),
    scale=SCALES,
    noise=st.sampled_from([0.0, 1e-16, -1e-16]),
    seed=st.integers(0, 99),
)
def test_every_moment_has_a_root(rank: int, size: int, scale: float, noise: float, seed: int) -> None:
    raw = moment_of(rank, size, scale, seed)
    raw = raw + noise * scale * torch.eye(size).double()  # what rounding leaves of a centred moment may be negative
    size_of = float(raw.diagonal().abs().max()) + damping.NOTHING
    lost = 100 * abs(noise) * scale
    for matrix, slack in ((raw, 1e-8), (damping.damped(raw, damping.INPUT), 1e-12)):
        lower = damping.cholesky(matrix)
        assert torch.isfinite(lower).all()
        assert (lower.diagonal() > 0).all()
        assert (lower @ lower.T - matrix).abs().max() <= slack * size_of + lost
        assert torch.isfinite(damping.solve(matrix, torch.eye(size).double())).all()
    assert (damping.damped(raw.diagonal(), damping.INPUT) > 0).all()


def test_damping_is_relative_to_what_it_damps() -> None:
    raw = moment_of(5, 4, 1.0, 0)
    small = damping.damped(1e-9 * raw, 0.1)
    torch.testing.assert_close(small * 1e9, damping.damped(raw, 0.1))
    torch.testing.assert_close(damping.damped(raw, 0.1), raw + 0.1 * raw.diagonal().mean() * torch.eye(4).double())
    indefinite = torch.tensor([[-1e-18, 0.0], [0.0, 2.0]]).double()
    assert torch.linalg.eigvalsh(damping.damped(indefinite, 0.1)).min() > 0.09


def test_a_solution_is_that_of_the_dense_system() -> None:
    matrix, right = moment_of(9, 5, 1.0, 1), torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(damping.solve(matrix, right), torch.linalg.solve(matrix, right))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_said(value: float) -> None:
    matrix = torch.eye(3).double()
    matrix[1, 1] = value
    with pytest.raises(HprError, match=r"is not finite.*check the weights and the data"):
        damping.cholesky(matrix)


def test_a_factor_of_lower_rank_has_an_identity_block() -> None:
    """A pruned layer gives factors of zeros, or of lower rank than the plan allows."""
    tall = torch.randn(6, 1, generator=torch.Generator().manual_seed(0)).double() @ torch.ones(1, 3).double()
    for factor in (tall, torch.zeros(6, 3).double()):
        rest, order, square = divide(factor)
        torch.testing.assert_close(torch.cat([torch.eye(3).double(), rest])[order] @ square, factor)
