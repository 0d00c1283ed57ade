import pytest
import torch
from torch import Tensor

from hpr.rounding.matrices import Rule, round_matrices


def moment(size: int, seed: int) -> Tensor:
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, size // 2 :] += rows[:, : size - size // 2]
    return rows.T @ rows / len(rows)


def side(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A Cholesky factor with unit diagonal, and the diagonal that was divided out."""
    root = torch.linalg.cholesky(moment(size, seed))
    return root / root.diagonal(), root.diagonal()


def one_by_one(weight: Tensor, grid: Tensor, left: Tensor, right: Tensor, threshold: float) -> Tensor:
    """The definition: entry after entry from the last, each against what all errors before it do to its own coordinate."""
    codes, errors = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in reversed(range(weight.shape[0])):
        for j in reversed(range(weight.shape[1])):
            target = (weight[i, j] - left[:, i] @ errors @ right[:, j]) / grid[i, j]
            codes[i, j] = target.sign() * (target.abs() + 1 - threshold).floor()
            errors[i, j] = codes[i, j] * grid[i, j] - weight[i, j]
    return codes


@pytest.mark.parametrize("threshold", [0.5, 0.6])
@pytest.mark.parametrize("full", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize(("height", "width"), [(5, 9), (33, 32), (70, 41), (40, 67)])
def test_blocks_give_the_codes_of_the_definition(height: int, width: int, full: tuple[bool, bool], threshold: float) -> None:
    generator = torch.Generator().manual_seed(height)
    weights = torch.randn(2, height, width, generator=generator, dtype=torch.float64)
    lefts, rows = zip(*(side(height, seed) for seed in (1, 2)), strict=True)
    rights, columns = zip(*(side(width, seed) for seed in (3, 4)), strict=True)
    grids = 0.4 / torch.stack(rows), 1 / torch.stack(columns)
    sides = torch.stack(lefts) if full[0] else None, torch.stack(rights) if full[1] else None
    codes = round_matrices(weights, grids, sides, Rule(threshold))
    for number in range(2):
        left = lefts[number] if full[0] else torch.eye(height, dtype=torch.float64)
        right = rights[number] if full[1] else torch.eye(width, dtype=torch.float64)
        grid = grids[0][number][:, None] * grids[1][number]
        assert torch.equal(codes[number], one_by_one(weights[number], grid, left, right, threshold))


def test_rounding_in_succession_costs_a_twelfth_of_a_squared_step_for_each_number() -> None:
    weight = 3 * torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (left, rows), (right, columns) = side(64, 1), side(96, 2)
    step = 0.05
    grids = (step / rows)[None], (1 / columns)[None]
    grid = grids[0][0][:, None] * grids[1][0]

    def damage(codes: Tensor) -> float:
        error = codes * grid - weight[0]
        return float(((left * rows).T @ error @ (right * columns)).square().sum())

    succeeding = damage(round_matrices(weight, grids, (left[None], right[None]))[0])
    apart = damage(round_matrices(weight, grids, (None, None))[0])
    assert succeeding == pytest.approx(weight.numel() * step**2 / 12, rel=0.05)
    assert succeeding < 0.7 * apart
