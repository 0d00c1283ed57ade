"""Shared basis: sites of a group share V on the input side (private U), or U on the output side (private V).

Basis Sharing (Wang et al. 2025) pools the members' moments and truncates one stacked SVD. Here that is only the start:
each member keeps its own moments, damage is exact at every rank, and the fit alternates between private and shared factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.linear_solvers import solve_shared
from hpr.operators.low_rank import rank_choices
from hpr.operators.metric import Measured, Side, eigenvectors
from hpr.operators.naming import group_name
from hpr.operators.operator import Operator, low_rank_factors, terms_of
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate

INPUT = "shared input basis"
OUTPUT = "shared output basis"
SWEEPS = 12
SETTLED = 1e-3  # a sweep that gains a smaller share of the damage is the last
_STEPS = 6  # of conjugate gradients in one sweep, from where the last one ended


def input_candidate(group: Sequence[Measured]) -> Candidate | None:
    """Every rank below full, from the pooled start (so a bound: the fit only lowers the damage); None for one column."""
    rows, columns = group[0].weight.shape
    if columns < 2:
        return None
    basis = pooled_basis(group, min(rows, columns - 1))
    ranks = np.arange(1, len(basis) + 1)
    damages = sum(_damages(one, basis) for one in group)
    costs = ranks * (columns - ranks) + columns + len(group) * rows * ranks
    names = tuple(one.site.name for one in group)
    return Candidate(INPUT, names, rank_choices(ranks), costs, np.asarray(damages)[ranks])


def output_candidate(group: Sequence[Measured]) -> Candidate | None:
    """The same with the sites read the other way round."""
    mirrored = input_candidate([one.transposed for one in group])
    return mirrored and Candidate(OUTPUT, mirrored.sites, mirrored.choices, mirrored.parameters, mirrored.damages)


def input_terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """U private, V shared; V holds the identity block."""
    shared = f"{group_name(sites)}.v"
    return {site.name: (Term(f"{site.name}.u", shared, ranks[0], identity="v"),) for site in sites}


def output_terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """U shared, V private; U holds the identity block."""
    shared = f"{group_name(sites)}.u"
    return {site.name: (Term(shared, f"{site.name}.v", ranks[0], identity="u"),) for site in sites}


def input_fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """Alternating least squares from the pooled start."""
    names = [low_rank_factors(terms_of(terms, one, 1)[0]) for one in group]
    _, shared_name, rank = names[0]
    private, shared = alternate(group, rank)
    return {shared_name: shared, **{name: u for (name, _, _), u in zip(names, private, strict=True)}}


def output_fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The same with the sites read the other way round."""
    names = [low_rank_factors(terms_of(terms, one, 1)[0]) for one in group]
    shared_name, _, rank = names[0]
    private, shared = alternate([one.transposed for one in group], rank)
    return {shared_name: shared.T, **{name: v.T for (_, name, _), v in zip(names, private, strict=True)}}


def pooled_basis(group: Sequence[Measured], count: int | None = None) -> Tensor:
    """Rows (count, columns), the most important first: right singular vectors of the stacked whitened weights.

    All min(n · rows, columns) of them without a ``count``.
    """
    total = sum(one.rows for one in group)
    moments = [one.right.moment.diag() if one.right.diagonal else one.right.moment for one in group]
    pooled = Side(sum((one.rows / total * m for one, m in zip(group, moments, strict=True)), torch.zeros_like(moments[0])), 0)
    stacked = torch.cat([one.rows**0.5 * pooled.whiten(one.left_whitened.T).T for one in group])
    if stacked.shape[0] >= stacked.shape[1]:
        vectors = eigenvectors(stacked.T)[1][:, :count]
    else:
        values, lefts = (part[..., :count] for part in eigenvectors(stacked))
        vectors = stacked.T @ lefts / values.clamp(min=1e-14 * values[0]).sqrt()
    return pooled.unwhiten(vectors).T


def alternate(group: Sequence[Measured], rank: int, sweeps: int = SWEEPS) -> tuple[list[Tensor], Tensor]:
    """Private U_s (out, rank) and one shared V (rank, in) for members with moments of their own.

    Given V the best U_s = W A Vᵀ (V A Vᵀ)⁻¹; given all U_s the best V solves Σ N Uᵀ G U V A = Σ N Uᵀ G W A. Each half-step
    can only lower the damage.
    """
    shared = pooled_basis(group, rank)
    private = [best_private(one, shared) for one in group]
    damage = _total(group, private, shared)
    for _ in range(sweeps):
        lefts = [Side(u.T @ one.left.times(u), damping=1e-9) for one, u in zip(group, private, strict=True)]
        targets = [u.T @ one.left.times(one.weight) for one, u in zip(group, private, strict=True)]
        updated = solve_shared(group, lefts, targets, start=shared, steps=_STEPS)
        candidates = [best_private(one, updated) for one in group]
        found = _total(group, candidates, updated)
        if not found < damage:
            break
        private, shared, gained, damage = candidates, updated, damage - found, found
        if gained < SETTLED * damage:
            break
    return private, shared


def best_private(one: Measured, shared: Tensor) -> Tensor:
    """U (out, rank) of least damage for a given V (rank, in)."""
    weighted = one.right.times(shared.T)
    return torch.linalg.solve(shared @ weighted, (one.weight @ weighted).T).T


def _total(group: Sequence[Measured], private: Sequence[Tensor], shared: Tensor) -> float:
    return sum(one.damage(u @ shared - one.weight) for one, u in zip(group, private, strict=True))


def _damages(one: Measured, basis: Tensor) -> np.ndarray:
    """Damage at every rank 0 … n of the best private U on the first rows of a basis: exact, from one factorisation."""
    weighted = one.right.times(basis.T)
    gram = basis @ weighted
    lower = torch.linalg.cholesky((gram + gram.T) / 2 + 1e-12 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram))
    projected = torch.linalg.solve_triangular(lower, (one.left_whitened @ weighted).T, upper=False)
    gains = projected.square().sum(1)
    left = one.squared_norm - torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    return (0.5 * one.rows * left.clamp(min=0)).cpu().numpy()


INPUT_OPERATOR = Operator(
    INPUT, input_fit, input_candidate, input_terms, shared=True, quick=True, helped_by=("principal axes",)
)
OUTPUT_OPERATOR = Operator(
    OUTPUT, output_fit, output_candidate, output_terms, shared=True, quick=True, helped_by=("principal axes",)
)
