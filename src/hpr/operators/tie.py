"""The operators "tie" (one matrix M for a group of sites) and "tie + scale" (diag(r) M diag(c) with private r and c).

M is the matrix of least total damage, argmin Σ N tr(left (M − W) right (M − W)ᵀ) over the members of the group. It is not the
mean of the weights. ALBERT (Lan et al. 2020) and Takase & Kiyono (2021) tie layers before training; here the weights are
pretrained. The private diagonals come from ResidualTransformer (Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators import damping
from hpr.operators.linear_solvers import QUICK, THOROUGH, _solve, solve_shared
from hpr.operators.metric import Measured, Side
from hpr.operators.naming import group_name
from hpr.operators.operator import Operator, TermsError, terms_of, whole_matrix
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate

TIE = "tie"
SCALE = "tie + scale"


def alike(group: Sequence[Measured]) -> bool:
    """Whether the weights of a group are so similar that one matrix may replace them. It is a quick test before tying.

    The test reads only the diagonals of the moments. In this diagonal metric the best shared matrix is a weighted mean, entry
    by entry. Its damage is compared with the damage of replacing all weights by zeros. For n unrelated weights of equal norm
    the ratio is 1 − 1/n. The weights are alike if the ratio is below a quarter of that, which means that the shared matrix is
    at less than half the distance (damage is a squared distance). Two equal weights have the ratio 0.
    """
    weights = torch.stack([member.weight for member in group])
    counts = torch.stack(
        [member.rows * torch.outer(member.left.diagonal_values, member.right.diagonal_values) for member in group]
    )
    mean = (counts * weights).sum(0) / counts.sum(0)
    apart = (counts * (weights - mean).square()).sum() / (counts * weights.square()).sum()
    return float(apart) < 0.25 * (1 - 1 / len(group))


def candidate(group: Sequence[Measured]) -> Candidate:
    """A curve with one point: the parameters of one matrix, and the damage of the tied matrix after a few solver steps."""
    shared = estimate(group)
    damage = sum(member.damage(shared - member.weight) for member in group)
    names = tuple(member.site.name for member in group)
    return Candidate(TIE, names, ((),), np.array([group[0].site.parameters]), np.array([damage]))


def scale_candidate(group: Sequence[Measured]) -> Candidate:
    """A curve with one point: one matrix and two diagonals per site. Its damage is an upper bound: the fit lowers it."""
    shared, rows, columns = tie_and_scale(group, estimate(group), rounds=1)
    damage = sum(
        member.damage(r[:, None] * shared * c - member.weight) for member, r, c in zip(group, rows, columns, strict=True)
    )
    site = group[0].site
    cost = site.parameters + len(group) * (site.out_features + site.in_features)
    return Candidate(SCALE, tuple(member.site.name for member in group), ((),), np.array([cost]), np.array([damage]))


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """One term per site; all terms name the same factor."""
    return {site.name: (Term(group_name(sites)),) for site in sites}


def scale_terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """One term per site: the same matrix for all, with a row scale and a column scale that are private to the site."""
    shared = f"{group_name(sites)}.scaled"
    return {site.name: (Term(shared, row_scale=f"{site.name}.r", column_scale=f"{site.name}.c"),) for site in sites}


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The tied matrix (out, in), by factor name."""
    (term,) = terms_of(terms, group[0], 1)
    return {whole_matrix(term): tie(group)}


def scale_fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The tied matrix (out, in), the row scales (1, out) and the column scales (1, in), by factor name."""
    member_terms = [terms_of(terms, member, 1)[0] for member in group]
    scales = [_scales(term) for term in member_terms]
    shared, rows, columns = tie_and_scale(group, tie(group))
    values = {whole_matrix(member_terms[0]): shared}
    for (row_scale, column_scale), r, c in zip(scales, rows, columns, strict=True):
        values |= {row_scale: r[None], column_scale: c[None]}
    return values


def _scales(term: Term) -> tuple[str, str]:
    if term.row_scale is None or term.column_scale is None:
        raise TermsError(f"the term of {term.u} has no row scale and column scale")
    return term.row_scale, term.column_scale


class Group(tuple[Measured, ...]):
    """A group of sites that several operators measure in turn. It computes the quick tied matrix once for all of them."""

    @cached_property
    def estimate(self) -> Tensor:
        return tie(self, steps=QUICK)


def estimate(group: Sequence[Measured]) -> Float[Tensor, "out in"]:
    """The tied matrix (out, in) after ``QUICK`` solver steps, which is precise enough for curves. A ``Group`` caches it."""
    return group.estimate if isinstance(group, Group) else tie(group, steps=QUICK)


def tie(
    group: Sequence[Measured],
    targets: Sequence[Float[Tensor, "out in"]] | None = None,
    start: Float[Tensor, "out in"] | None = None,
    steps: int = THOROUGH,
) -> Float[Tensor, "out in"]:
    """The matrix (out, in) with the least total damage if it replaces the weight of every member.

    ``targets``: matrices (out, in) to approximate instead of the weights, one per member. ``start``: the first iterate of the
    solver, by default the mean of the weights or targets. ``steps``: conjugate-gradient steps.
    """
    lefts = [member.left for member in group]
    if targets is None:
        start = torch.stack([member.weight for member in group]).mean(0) if start is None else start
        return _solve(group, lefts, [member.normal_rhs for member in group], start, steps)
    right_sides = [member.left.times(target) for member, target in zip(group, targets, strict=True)]
    return solve_shared(group, lefts, right_sides, torch.stack(list(targets)).mean(0) if start is None else start, steps)


def tie_and_scale(
    group: Sequence[Measured], shared: Float[Tensor, "out in"], rounds: int = 3
) -> tuple[Float[Tensor, "out in"], list[Float[Tensor, " out"]], list[Float[Tensor, " in"]]]:
    """The shared matrix M (out, in), the row scales r (out,) and the column scales c (in,), one of each per member.

    Every round first updates r and c for the given M, then M for the given r and c; the start is r = c = 1. The last round
    does not update M, so that r and c fit the returned M.
    """
    rows = [shared.new_ones(len(shared)) for _ in group]
    columns = [shared.new_ones(shared.shape[1]) for _ in group]
    for number in range(rounds):
        for index, member in enumerate(group):
            rows[index] = _best_row_scale(member, shared * columns[index])
            columns[index] = _best_row_scale(member.transposed, (rows[index][:, None] * shared).T)
        if number == rounds - 1:
            break
        scaled = [
            Measured(member.site, member.weight, _scaled(member.left, r), _scaled(member.right, c), member.rows)
            for member, r, c in zip(group, rows, columns, strict=True)
        ]
        right_sides = [r[:, None] * member.normal_rhs * c for member, r, c in zip(group, rows, columns, strict=True)]
        shared = _solve(scaled, [member.left for member in scaled], right_sides, shared)
    return shared, rows, columns


def _scaled(side: Side, diagonal: Tensor) -> Side:
    if side.diagonal:
        return Side(side.moment * diagonal.square(), damping.DERIVED)
    return Side(side.moment * torch.outer(diagonal, diagonal), damping.DERIVED)


def _best_row_scale(member: Measured, matrix: Tensor) -> Tensor:
    """The row scale r (out,) that minimises the damage of diag(r) · matrix − W. It solves one linear system of size out."""
    products = matrix @ member.right.times(matrix.T)
    cross = (member.normal_rhs * matrix).sum(1)
    if member.left.diagonal:
        return cross / (member.left.moment * products.diagonal()).clamp(min=torch.finfo(torch.float64).tiny)
    system = member.left.moment * products
    return damping.solve(damping.damped(system, damping.DERIVED), cross[:, None])[:, 0]


OPERATOR = Operator(TIE, fit, candidate, terms, shared=True, merges=True, quick=True, helped_by=("layer below",))
SCALED_OPERATOR = Operator(SCALE, scale_fit, scale_candidate, scale_terms, shared=True, merges=True)
