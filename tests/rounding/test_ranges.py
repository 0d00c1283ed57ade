import torch

from hpr.rounding.ranges import coarser


def loss(sizes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, largest: float) -> float:
    grid = torch.exp2((rows[:, None] + columns) / 2)
    return float(((sizes - largest * grid).clamp(min=0).square() + grid.square() / 12).sum())


def test_numbers_within_the_range_keep_their_grid() -> None:
    rows, columns = coarser(7 * torch.rand(5, 6, generator=torch.Generator().manual_seed(0)), 7)
    assert not rows.any()
    assert not columns.any()


def test_each_row_has_the_exponent_of_least_loss_given_the_columns_and_the_other_way_round() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 4 * torch.randn(12, 20, generator=generator, dtype=torch.float64).abs()
    sizes[3] *= 30
    sizes[:, 5] *= 100
    rows, columns = (torch.from_numpy(part) for part in coarser(sizes, 7))
    assert rows[3] >= 4
    assert columns[5] > 8
    least = loss(sizes, rows, columns, 7)
    assert least < 0.1 * loss(sizes, torch.zeros(12), torch.zeros(20), 7)
    for place in range(20):
        for change in (-1, 1):
            other = columns.clone()
            other[place] = max(0, int(other[place]) + change)
            assert loss(sizes, rows, other, 7) >= least * (1 - 1e-12)
