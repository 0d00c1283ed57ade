"""Tie: one matrix for a group of sites, in the metric rather than by averaging; with private diagonals, "tie + scale".

ALBERT and Takase & Kiyono tie from scratch; a pretrained group is tied to the matrix of least damage,
``argmin Σ N tr(G (M − W) A (M − W)ᵀ)``. The diagonals are those of ResidualTransformer (Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.linear_solvers import QUICK, THOROUGH, _solve, solve_shared
from hpr.operators.metric import Measured, Side
from hpr.operators.naming import group_name
from hpr.operators.operator import Operator, TermsError, terms_of, whole_matrix
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate

TIE = "tie"
SCALE = "tie + scale"


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
    shared = estimate(group)
    damage = sum(one.damage(shared - one.weight) for one in group)
    names = tuple(one.site.name for one in group)
    return Candidate(TIE, names, ((),), np.array([group[0].site.parameters]), np.array([damage]))


def scale_candidate(group: Sequence[Measured]) -> Candidate:
    """One point: one matrix, and two diagonals for each site (a bound: the fit also moves the matrix)."""
    shared, rows, columns = tie_and_scale(group, estimate(group), rounds=1)
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
    (term,) = terms_of(terms, group[0], 1)
    return {whole_matrix(term): tie(group)}


def scale_fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The tied matrix and the diagonals, stored as (1, n)."""
    several = [terms_of(terms, one, 1)[0] for one in group]
    scales = [_scales(term) for term in several]
    shared, rows, columns = tie_and_scale(group, tie(group))
    values = {whole_matrix(several[0]): shared}
    for (row_scale, column_scale), r, c in zip(scales, rows, columns, strict=True):
        values |= {row_scale: r[None], column_scale: c[None]}
    return values


def _scales(term: Term) -> tuple[str, str]:
    if term.row_scale is None or term.column_scale is None:
        raise TermsError(f"the term of {term.u} has no two diagonals")
    return term.row_scale, term.column_scale


class Group(tuple[Measured, ...]):
    """Sites that several operators measure one after another: their quick tied matrix is computed once."""

    @cached_property
    def estimate(self) -> Tensor:
        return tie(self, steps=QUICK)


def estimate(group: Sequence[Measured]) -> Tensor:
    """The tied matrix (out, in) after a few steps of the solver, precise enough for curves. A ``Group`` remembers its own."""
    return group.estimate if isinstance(group, Group) else tie(group, steps=QUICK)


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
        return _solve(group, lefts, [one.normal_rhs for one in group], start, steps)
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
        right_sides = [r[:, None] * one.normal_rhs * c for one, r, c in zip(group, rows, columns, strict=True)]
        shared = _solve(scaled, [one.left for one in scaled], right_sides, shared)
    return shared, rows, columns


def _scaled(side: Side, diagonal: Tensor) -> Side:
    if side.diagonal:
        return Side(side.moment * diagonal.square(), damping=1e-9)
    return Side(side.moment * torch.outer(diagonal, diagonal), damping=1e-9)


def _best_row_scale(one: Measured, matrix: Tensor) -> Tensor:
    """r minimising the damage of diag(r)·matrix − W: one linear system of size out."""
    products = matrix @ one.right.times(matrix.T)
    cross = (one.normal_rhs * matrix).sum(1)
    if one.left.diagonal:
        return cross / (one.left.moment * products.diagonal()).clamp(min=torch.finfo(torch.float64).tiny)
    system = one.left.moment * products
    ridge = 1e-9 * float(system.diagonal().mean()) + torch.finfo(torch.float64).tiny  # a matrix of zeros has any scale
    return torch.linalg.solve(system + ridge * torch.eye(len(system)).to(system), cross)


OPERATOR = Operator(TIE, fit, candidate, terms, shared=True, merges=True, quick=True, helped_by=("layer below",))
SCALED_OPERATOR = Operator(SCALE, scale_fit, scale_candidate, scale_terms, shared=True, merges=True)
