"""Tie: one matrix for a group of sites, in the metric rather than by averaging; with private diagonals, "tie + scale".

ALBERT and Takase & Kiyono tie from scratch; a pretrained group is tied to the matrix of least damage,
``argmin Σ N tr(G (M − W) A (M − W)ᵀ)``. The diagonals are those of ResidualTransformer (Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpr.anatomy import Site
from hpr.operators.metric import Measured, Side
from hpr.planning.candidates import Candidate
from hpr.planning.terms import Term

TIE = "tie"
SCALE = "tie + scale"
QUICK, THOROUGH = 2, 25  # conjugate-gradient steps for a curve, and for a fit


def group_name(sites: Sequence[Site]) -> str:
    """``encoder.0-2.mlp.up`` for a run of one slot, ``encoder.0-1+4.mlp.up`` for several; other site names are joined.

    Several slots stand beside each other: ``encoder.0-1.fc1+decoder.2-2.fc1``. The experts of one layer are named by their
    numbers instead: ``decoder.0.mlp.experts.down_proj.0-7``.
    """
    first = sites[0]
    alike = all((site.stack, site.slot) == (first.stack, first.slot) for site in sites)
    if alike and first.expert is not None and len({site.layer for site in sites}) == 1:
        return f"{first.name.rpartition('.')[0]}.{_runs([site.expert for site in sites if site.expert is not None])}"
    layers = [site.layer for site in sites if site.layer is not None]
    experts = {site.expert for site in sites}
    if len(layers) < len(sites) or len(experts) > 1:
        return "+".join(site.name for site in sites)
    if not alike:
        parts = dict.fromkeys((site.stack, site.slot) for site in sites)
        return "+".join(group_name([site for site in sites if (site.stack, site.slot) == part]) for part in parts)
    slot = first.slot if first.expert is None else f"{first.slot}.{first.expert}"
    return f"{first.stack}.{_runs(layers)}.{slot}"


def _runs(numbers: Sequence[int]) -> str:
    """``0-2+5``: numbers in order, neighbours as runs. One alone is 3-3, so that no factor has the name of a site."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    alone = len(runs) == 1
    return "+".join(f"{run[0]}-{run[-1]}" if alone or len(run) > 1 else str(run[0]) for run in runs)


def alike(group: Sequence[Measured]) -> bool:
    """Whether one matrix can stand for some weights as far as moments without their off-diagonals tell.

    In that metric the best one is at once known, entry by entry. It has to lie within half the distance from the weights that
    it would have if these had nothing in common.
    """
    weights = torch.stack([one.weight for one in group])
    counts = torch.stack([one.rows * torch.outer(one.left.diagonal_values, one.right.diagonal_values) for one in group])
    mean = (counts * weights).sum(0) / counts.sum(0)
    apart = (counts * (weights - mean).square()).sum() / (counts * weights.square()).sum()
    return float(apart) < 0.25 * (1 - 1 / len(group))


def candidate(group: Sequence[Measured]) -> Candidate:
    """One point: one matrix instead of many."""
    shared = estimate(tuple(group))
    damage = sum(one.damage(shared - one.weight) for one in group)
    names = tuple(one.site.name for one in group)
    return Candidate(TIE, names, ((),), np.array([group[0].site.parameters]), np.array([damage]))


def scale_candidate(group: Sequence[Measured]) -> Candidate:
    """One point: one matrix, and two diagonals for each site (a bound: the fit also moves the matrix)."""
    shared, rows, columns = tie_and_scale(group, estimate(tuple(group)), rounds=1)
    damage = sum(one.damage(r[:, None] * shared * c - one.weight) for one, r, c in zip(group, rows, columns, strict=True))
    site = group[0].site
    cost = site.parameters + len(group) * (site.out_features + site.in_features)
    return Candidate(SCALE, tuple(one.site.name for one in group), ((),), np.array([cost]), np.array([damage]))


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """The same factor at every site."""
    return {site.name: (Term(group_name(sites)),) for site in sites}


def scale_terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """The same factor at every site, between private diagonals."""
    shared = f"{group_name(sites)}.scaled"
    return {site.name: (Term(shared, row_scale=f"{site.name}.r", column_scale=f"{site.name}.c"),) for site in sites}


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The tied matrix."""
    return {terms[group[0].site.name][0].u: tie(group)}


def scale_fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The tied matrix and the diagonals, stored as (1, n)."""
    shared, rows, columns = tie_and_scale(group, tie(group))
    values = {terms[group[0].site.name][0].u: shared}
    for one, r, c in zip(group, rows, columns, strict=True):
        term = terms[one.site.name][0]
        assert term.row_scale is not None
        assert term.column_scale is not None
        values |= {term.row_scale: r[None], term.column_scale: c[None]}
    return values


@lru_cache(maxsize=4)
def estimate(group: tuple[Measured, ...]) -> Tensor:
    """The tied matrix to within a few steps: what curves are made of. Several operators ask for it in a row."""
    return tie(group, steps=QUICK)


def tie(
    group: Sequence[Measured],
    targets: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
    steps: int = THOROUGH,
) -> Tensor:
    """The (out, in) matrix of least total damage for the members' weights, or for other targets."""
    lefts = [one.left for one in group]
    if targets is None:
        start = torch.stack([one.weight for one in group]).mean(0) if start is None else start
        return _solve(group, lefts, [one.pull for one in group], start, steps)
    right_sides = [one.left.times(target) for one, target in zip(group, targets, strict=True)]
    return solve_shared(group, lefts, right_sides, torch.stack(list(targets)).mean(0) if start is None else start, steps)


def tie_and_scale(group: Sequence[Measured], shared: Tensor, rounds: int = 3) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The shared matrix M and each site's diagonals r (out,), c (in,), by alternation from r = c = 1.

    The last round leaves M alone, so the diagonals are the best for it.
    """
    rows = [shared.new_ones(len(shared)) for _ in group]
    columns = [shared.new_ones(shared.shape[1]) for _ in group]
    for number in range(rounds):
        for index, one in enumerate(group):
            rows[index] = _best_row_scale(one, shared * columns[index])
            columns[index] = _best_row_scale(one.transposed, (rows[index][:, None] * shared).T)
        if number == rounds - 1:
            break
        scaled = [
            Measured(one.site, one.weight, _scaled(one.left, r), _scaled(one.right, c), one.rows)
            for one, r, c in zip(group, rows, columns, strict=True)
        ]
        right_sides = [r[:, None] * one.pull * c for one, r, c in zip(group, rows, columns, strict=True)]
        shared = _solve(scaled, [one.left for one in scaled], right_sides, shared)
    return shared, rows, columns


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
    goal = sum(share * side for share, side in zip(shares, right_sides, strict=True))
    assert isinstance(goal, Tensor)

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


def _scaled(side: Side, diagonal: Tensor) -> Side:
    if side.diagonal:
        return Side(side.moment * diagonal.square(), damping=1e-9)
    return Side(side.moment * torch.outer(diagonal, diagonal), damping=1e-9)


def _best_row_scale(one: Measured, matrix: Tensor) -> Tensor:
    """r minimising the damage of diag(r)·matrix − W: one linear system of size out."""
    products = matrix @ one.right.times(matrix.T)
    cross = (one.pull * matrix).sum(1)
    if one.left.diagonal:
        return cross / (one.left.moment * products.diagonal()).clamp(min=torch.finfo(torch.float64).tiny)
    system = one.left.moment * products
    ridge = 1e-9 * float(system.diagonal().mean()) + torch.finfo(torch.float64).tiny  # a matrix of zeros has any scale
    return torch.linalg.solve(system + ridge * torch.eye(len(system)).to(system), cross)
