"""Orders and rotations in the metric, against brute force and planted answers."""

import itertools

import pytest
import torch
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.anatomy.symmetry import AxisSlice, transformed
from hpr.operators import low_rank, shared_basis
from hpr.operators.matching import Pair, best_order, best_rotation, principal_rotation
from hpr.operators.metric import Measured, measured_site
from hpr.profiling.profile import SiteStatistics

DRAW = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def site(weight: Tensor, left: Tensor | None = None, right: Tensor | None = None, rows: float = 3.0) -> Measured:
    out_features, in_features = weight.shape
    draws = normal(out_features, 2 * out_features), normal(in_features, 2 * in_features)
    moments = [
        part @ part.T / part.shape[1] if known is None else known for part, known in zip(draws, (left, right), strict=True)
    ]
    known = Site("s", "linear", out_features, in_features, has_bias=False)
    return measured_site(known, weight, SiteStatistics(moments[0], moments[1], rows))


def rotations(blocks: int, size: int) -> Tensor:
    return torch.linalg.qr(normal(blocks, size, size))[0]


def test_turned_rows_by_hand() -> None:
    matrix = torch.arange(14.0).reshape(7, 2)
    order = transformed(matrix, AxisSlice("s", "rows", 1, 7), torch.tensor([2, 0, 1]))
    assert torch.equal(order, matrix[[0, 5, 6, 1, 2, 3, 4]])
    transform = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])  # one rotation that serves three users
    rotated = transformed(matrix, AxisSlice("s", "rows", 1, 7), transform)
    assert torch.equal(rotated[1::2], matrix[2::2])
    assert torch.equal(rotated[2::2], -matrix[1::2])
    assert torch.equal(rotated[0], matrix[0])


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_the_best_order_is_that_of_brute_force(side) -> None:
    diagonal = torch.rand(5, generator=DRAW, dtype=torch.float64) + 0.1
    moment = normal(4, 9)
    moment = moment @ moment.T
    weights = [normal(5, 4) for _ in range(2)]
    lefts = [diagonal, diagonal.flip(0)]
    if side == "rows":
        ones = [site(weight, left.diag(), moment) for weight, left in zip(weights, lefts, strict=True)]
    else:
        ones = [site(weight.T, moment, left.diag()) for weight, left in zip(weights, lefts, strict=True)]
    fixed, moved = (one if side == "rows" else one.transposed for one in ones)
    a, b = (one.rows * one.left.moment.diagonal() for one in (fixed, moved))

    def cost(order: tuple[int, ...]) -> float:
        change = fixed.weight - moved.weight[list(order)]
        inner = (fixed.right.moment + moved.right.moment) / 2
        return float((a * b[list(order)] / (a + b[list(order)]) * ((change @ inner) * change).sum(1)).sum())

    found = best_order([], [Pair(AxisSlice("s", side, 0, 5), *ones)], 5)
    assert cost(tuple(found.tolist())) == pytest.approx(min(map(cost, itertools.permutations(range(5)))))


def test_heads_are_found_in_other_places_and_axes() -> None:
    """Two users share each rotation of the values' heads, as where queries share a key."""
    value, output = normal(6, 5), normal(4, 12)
    order, transform = torch.tensor([2, 0, 1]), rotations(3, 2)
    slices = AxisSlice("v", "rows", 0, 6), AxisSlice("o", "columns", 0, 12)
    plain = torch.eye(6).double(), torch.eye(5).double(), torch.eye(4).double(), torch.eye(12).double()
    fixed = site(value, *plain[:2]), site(output, *plain[2:])
    weights = value, output.T
    for one in (order, transform):
        weights = tuple(transformed(weight, axis_slice, one) for weight, axis_slice in zip(weights, slices, strict=True))
    moved = site(weights[0], *plain[:2]), site(weights[1].T, *plain[2:])
    pairs = [Pair(axis_slice, one, other) for axis_slice, one, other in zip(slices, fixed, moved, strict=True)]
    found = best_order([pairs], [], 3)
    assert torch.equal(order[found], torch.arange(3))
    placed = [transformed(weight, axis_slice, found) for weight, axis_slice in zip(weights, slices, strict=True)]
    again = [site(placed[0], *plain[:2]), site(placed[1].T, *plain[2:])]
    back = best_rotation([Pair(s, one, other) for s, one, other in zip(slices, fixed, again, strict=True)], 3)
    torch.testing.assert_close(back @ back.transpose(1, 2), torch.eye(2).double().expand(3, 2, 2))
    torch.testing.assert_close(transformed(placed[0], slices[0], back), value)
    torch.testing.assert_close(transformed(placed[1], slices[1], back), output.T)


def test_blocks_of_one_are_signs() -> None:
    weight = normal(6, 4)
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1]).double()
    ones = (
        site(weight, torch.eye(6).double(), torch.eye(4).double()),
        site(signs[:, None] * weight, torch.eye(6).double(), torch.eye(4).double()),
    )
    pair = Pair(AxisSlice("s", "rows", 0, 6), *ones)
    assert torch.equal(best_order([[pair]], [], 6), torch.arange(6))
    torch.testing.assert_close(best_rotation([pair], 6).flatten(), signs)


def test_no_rotation_brings_blocks_closer() -> None:
    moment = torch.eye(5).double()
    fixed, moved = (site(normal(6, 5), torch.eye(6).double(), moment) for _ in range(2))
    axis_slice = AxisSlice("s", "rows", 0, 6)
    best = best_rotation([Pair(axis_slice, fixed, moved)], 2)
    least = float((transformed(moved.weight, axis_slice, best) - fixed.weight).norm())
    for _ in range(50):
        assert least <= float((transformed(moved.weight, axis_slice, rotations(2, 3)) - fixed.weight).norm()) + 1e-12


def test_in_principal_axes_one_basis_serves_as_well_as_two() -> None:
    """With one head and outputs that all count alike, a shared basis costs what private ones of its rank do."""
    axis_slice = AxisSlice("s", "rows", 0, 6)
    plain = [site(normal(6, 8), torch.eye(6).double()) for _ in range(2)]
    transforms = [principal_rotation([(axis_slice, one)], 1) for one in plain]
    ones = [
        site(transformed(one.weight, axis_slice, transform), torch.eye(6).double(), one.right.moment)
        for one, transform in zip(plain, transforms, strict=True)
    ]
    private = sum(torch.as_tensor(low_rank.damages(one)[1:6]) for one in ones)
    before, after = (torch.as_tensor(shared_basis.output_candidate(group).damages[:5]) for group in (plain, ones))
    torch.testing.assert_close(after, private, rtol=1e-3, atol=0)
    assert (before > 1.05 * after).all()


def test_principal_axes_of_heads_are_sorted_by_what_all_users_weigh() -> None:
    slices = AxisSlice("v", "rows", 0, 6), AxisSlice("o", "columns", 0, 12)
    value, output = site(normal(6, 5)), site(normal(4, 12))
    transform = principal_rotation([(slices[0], value), (slices[1], output)], 3)
    torch.testing.assert_close(transform @ transform.transpose(1, 2), torch.eye(2).double().expand(3, 2, 2))
    gram = torch.zeros(3, 2, 2).double()
    for start, one in ((2, value), (4, output.transposed)):
        for index, block in enumerate(one.weight.split(2)):
            moment = one.left.moment[2 * index : 2 * index + 2, 2 * index : 2 * index + 2]
            values, vectors = torch.linalg.eigh(moment)
            root = vectors @ values.sqrt().diag() @ vectors.T
            gram[index * 2 // start] += one.rows * root @ block @ one.right.moment @ block.T @ root
    transformed_gram = transform @ gram @ transform.transpose(1, 2)
    torch.testing.assert_close(transformed_gram[:, 0, 1], torch.zeros(3).double(), rtol=0, atol=1e-8 * float(gram.norm()))
    assert (transformed_gram[:, 0, 0] > transformed_gram[:, 1, 1]).all()
