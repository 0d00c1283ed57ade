"""The metric: every operation of a side against its dense formula, damage against the trace, token frequencies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpr.anatomy.describe import describe
from hpr.anatomy.model import Site
from hpr.operators import damping
from hpr.operators.metric import Measured, Side, eigenvectors, measure, smooth_frequencies, tails


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, diagonal: bool = False, seed: int = 0) -> Tensor:
    rows = drawn(3 * size, size, seed=seed)
    full = rows.T @ rows / len(rows)
    return full.diagonal().clone() if diagonal else full


def dense(side: Side) -> Tensor:
    return side.moment.diag() if side.diagonal else side.moment


@pytest.mark.parametrize("diagonal", [False, True])
def test_side_computes_what_its_dense_matrix_does(diagonal: bool) -> None:
    raw = moment(6, diagonal)
    side, matrix = Side(raw), drawn(6, 4, seed=1)
    full = dense(side)
    extra = damping.INPUT * (raw if diagonal else raw.diagonal()).mean() * torch.eye(6).double()
    torch.testing.assert_close(full, (raw.diag() if diagonal else raw) + extra)
    root = side.root.diag() if diagonal else side.root
    torch.testing.assert_close(root @ root.T, full)
    torch.testing.assert_close(side.times(matrix), full @ matrix)
    torch.testing.assert_close(side.whiten(matrix), root.T @ matrix)
    torch.testing.assert_close(side.unwhiten(matrix), torch.linalg.inv(root).T @ matrix)
    torch.testing.assert_close(side.unwhiten(side.whiten(matrix)), matrix)
    torch.testing.assert_close(side.solve(matrix), torch.linalg.inv(full) @ matrix)
    torch.testing.assert_close(dense(side.part(2, 5)), full[2:5, 2:5])


def test_a_singular_or_zero_moment_still_has_a_root() -> None:
    for raw in (torch.zeros(3).double(), torch.zeros(3, 3).double(), torch.ones(3, 3).double()):
        side = Side(raw)
        assert torch.isfinite(side.root).all()
        assert torch.isfinite(side.solve(torch.eye(3).double() * 1e-9)).all()


@given(
    out=st.integers(1, 7),
    columns=st.integers(1, 7),
    left=st.booleans(),
    right=st.booleans(),
    rows=st.floats(0.1, 100),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_damage_is_half_the_weighted_trace(out: int, columns: int, left: bool, right: bool, rows: float, seed: int) -> None:
    one = Measured(
        Site("s", "linear", out, columns, True),
        drawn(out, columns, seed=seed),
        Side(moment(out, left, seed + 1)),
        Side(moment(columns, right, seed + 2)),
        rows,
    )
    change = drawn(out, columns, seed=seed + 3)
    expected = 0.5 * rows * float((dense(one.left) @ change @ dense(one.right) @ change.T).trace())
    assert one.damage(change) == pytest.approx(expected, rel=1e-10)
    assert one.transposed.damage(change.T) == pytest.approx(expected, rel=1e-10)
    assert one.damage(torch.zeros_like(change)) == 0


def test_segment_is_the_damage_of_its_rows_alone() -> None:
    one = Measured(Site("s", "embedding", 6, 4, False), drawn(6, 4), Side(moment(6, True)), Side(moment(4)), 2.0)
    change = drawn(6, 4, seed=5)
    parts = [one.segment(0, 2).damage(change[:2]), one.segment(2, 6).damage(change[2:])]
    assert sum(parts) == pytest.approx(one.damage(change), rel=1e-12)  # a diagonal left side couples no rows


def test_singular_values() -> None:
    matrix = drawn(4, 9)
    values, vectors = eigenvectors(matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix).square())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4).double())
    torch.testing.assert_close(tails(values)[0], matrix.square().sum())
    assert tails(values).tolist() == sorted(tails(values).tolist(), reverse=True)
    assert tails(values)[-1] == 0


@given(size=st.integers(2, 2000), seed=st.integers(0, 20), share=st.floats(0.01, 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_frequencies_are_a_distribution_that_no_token_falls_out_of(size: int, seed: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    counts = torch.poisson(1000 / torch.arange(1, size + 1).double(), generator=draw)
    counts[torch.rand(size, generator=draw) > share] = 0
    counts[0] += 1
    found = smooth_frequencies(counts)
    assert found.dtype == torch.float64
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.min()) >= 0.2 / size * (1 - 1e-12)
    assert (found >= 0.2 * counts / counts.sum()).all()
    assert (found <= 0.2 * counts / counts.sum() + 0.8).all()


def test_frequencies_keep_the_order_of_magnitude() -> None:
    counts = 1e6 / torch.arange(1, 3001).double()  # Zipf, in order of frequency
    found, seen = smooth_frequencies(counts), counts / counts.sum()
    assert (found[:10] > 5 * found[1000:].max()).all()
    middle = slice(300, 2000)
    assert ((found / seen)[middle] < 3).all()
    assert ((found / seen)[middle] > 1 / 3).all()


def test_frequencies_of_an_unsorted_vocabulary_prefer_what_was_seen() -> None:
    counts = torch.zeros(1000).double()
    seen = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:100]
    counts[seen] = 10
    found = smooth_frequencies(counts)
    unseen = torch.ones(1000, dtype=torch.bool)
    unseen[seen] = False
    assert found[seen].min() > found[unseen].max()
    assert found[unseen].max() < 10 * found[unseen].min()


def test_without_a_profile_damage_is_half_the_squared_norm(build) -> None:
    model = build("bert")
    measured = measure(model, describe(model), None)
    for one in measured.values():
        change = torch.ones_like(one.weight)
        assert one.damage(change) == pytest.approx(0.5 * change.numel(), rel=0.06)  # but for the damping of both sides
        assert one.mean is None
