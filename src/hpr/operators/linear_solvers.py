"""Iterative solvers for weights that several sites share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpr.operators.metric import Measured, Side

QUICK, THOROUGH = 2, 25  # conjugate-gradient steps for a curve, and for a fit


def solve_shared(
    group: Sequence[Measured], lefts: Sequence[Side], targets: Sequence[Tensor], start: Tensor, steps: int = THOROUGH
) -> Tensor:
    """X with Σ N L_s X A_s = Σ N T_s A_s, for left sides L_s (k, k) and targets T_s (k, in); A_s are the members' inputs'."""
    right_sides = [one.right.times(target.T).T for one, target in zip(group, targets, strict=True)]
    return _solve(group, lefts, right_sides, start, steps)


def _solve(
    group: Sequence[Measured], lefts: Sequence[Side], right_sides: Sequence[Tensor], start: Tensor, steps: int = THOROUGH
) -> Tensor:
    """Conjugate gradients, preconditioned by (mean left)⁻¹ · (mean right)⁻¹; exact at once where all sides agree."""
    total = sum(one.rows for one in group)
    shares = [one.rows / total for one in group]
    mean_left = _mean(lefts, shares)
    mean_right = _mean([one.right for one in group], shares)
    zero = torch.zeros_like(right_sides[0])
    goal = sum((share * side for share, side in zip(shares, right_sides, strict=True)), zero)

    def apply(x: Tensor) -> Tensor:
        parts = [share * one.right.times(left.times(x).T).T for share, one, left in zip(shares, group, lefts, strict=True)]
        return torch.stack(parts).sum(0)

    def precondition(x: Tensor) -> Tensor:
        return mean_right.solve(mean_left.solve(x).T).T

    return conjugate_gradients(apply, goal, start, precondition, steps)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    goal: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    steps: int,
    tolerance: float = 1e-5,
) -> Tensor:
    """Solve apply(X) = goal for a symmetric positive definite linear map on matrices."""
    x = start
    residual = goal - apply(x)
    direction = z = precondition(residual)
    rho = (residual * z).sum()
    scale = (goal * precondition(goal)).sum()
    for number in range(steps):
        if rho <= tolerance**2 * scale:
            break
        image = apply(direction)
        step = rho / (direction * image).sum()
        x = x + step * direction
        if number == steps - 1:
            break
        residual = residual - step * image
        z = precondition(residual)
        rho, before = (residual * z).sum(), rho
        direction = z + rho / before * direction
    return x


def _mean(sides: Sequence[Side], shares: Sequence[float]) -> Side:
    moments = [side.moment for side in sides]
    if any(side.diagonal for side in sides):
        moments = [m if m.dim() == 1 else m.diagonal() for m in moments]
    return Side(torch.stack([share * m for share, m in zip(shares, moments, strict=True)]).sum(0), damping=1e-6)
