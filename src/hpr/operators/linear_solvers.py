"""Solve for a matrix that several sites share, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hpr.operators import damping
from hpr.operators.metric import Measured, Side

QUICK, THOROUGH = 2, 25  # conjugate-gradient steps: for a curve, for a fit


def solve_shared(
    group: Sequence[Measured],
    lefts: Sequence[Side],
    targets: Sequence[Float[Tensor, "k in"]],
    start: Float[Tensor, "k in"],
    steps: int = THOROUGH,
) -> Float[Tensor, "k in"]:
    """The matrix X (k, in) with Σ N_s L_s X A_s = Σ N_s T_s A_s, summed over the members s of a group.

    ``lefts``: L_s (k, k). ``targets``: T_s (k, in). A_s is the input moment (``right``) of member s and N_s its rows per
    example. ``start``: the first iterate (k, in). ``steps``: conjugate-gradient steps.
    """
    right_sides = [member.right.times(target.T).T for member, target in zip(group, targets, strict=True)]
    return _solve(group, lefts, right_sides, start, steps)


def _solve(
    group: Sequence[Measured], lefts: Sequence[Side], right_sides: Sequence[Tensor], start: Tensor, steps: int = THOROUGH
) -> Tensor:
    """Conjugate gradients with the preconditioner X → (mean left)⁻¹ X (mean right)⁻¹, exact if all members have equal sides."""
    total = sum(member.rows for member in group)
    shares = [member.rows / total for member in group]
    mean_left = _mean(lefts, shares)
    mean_right = _mean([member.right for member in group], shares)
    zero = torch.zeros_like(right_sides[0])
    goal = sum((share * side for share, side in zip(shares, right_sides, strict=True)), zero)

    def apply(x: Tensor) -> Tensor:
        parts = [
            share * member.right.times(left.times(x).T).T for share, member, left in zip(shares, group, lefts, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def precondition(x: Tensor) -> Tensor:
        return mean_right.solve(mean_left.solve(x).T).T

    return conjugate_gradients(apply, goal, start, precondition, steps)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    goal: Float[Tensor, "rows columns"],
    start: Float[Tensor, "rows columns"],
    precondition: Callable[[Tensor], Tensor],
    steps: int,
    tolerance: float = 1e-5,
) -> Float[Tensor, "rows columns"]:
    """Solve apply(X) = goal for a symmetric positive definite linear map ``apply`` on matrices, and return X.

    ``precondition`` approximates the inverse of ``apply``. The solver stops after ``steps`` steps, or if the preconditioned
    norm of the residual is at most ``tolerance`` times that of ``goal``.
    """
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
    return Side(torch.stack([share * m for share, m in zip(shares, moments, strict=True)]).sum(0), damping.PRECONDITIONER)
