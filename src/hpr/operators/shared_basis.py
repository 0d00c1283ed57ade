"""The operators "shared input basis" (shared V, private U) and "shared output basis" (shared U, private V): W ≈ U V.

Basis Sharing (Wang et al. 2025) averages the input moments of the members and truncates one SVD of the stacked weights. This
module only starts from that basis. The damage uses the moments of each member, and the fit alternates between the private and
the shared factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators import damping
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
SETTLED = 1e-3  # the fit stops after a sweep that lowers the damage by less than this share
_STEPS = 6  # conjugate-gradient steps in a sweep, which starts from the result of the previous sweep


def input_candidate(group: Sequence[Measured]) -> Candidate | None:
    """A curve with every rank below full, measured for the pooled basis. None if the weights have one column.

    Each damage is an upper bound, because the fit starts from the pooled basis and only lowers the damage.
    """
    rows, columns = group[0].weight.shape
    if columns < 2:
        return None
    basis = pooled_basis(group, min(rows, columns - 1))
    ranks = np.arange(1, len(basis) + 1)
    damages = sum(_damages(member, basis) for member in group)
    costs = ranks * (columns - ranks) + columns + len(group) * rows * ranks
    names = tuple(member.site.name for member in group)
    return Candidate(INPUT, names, rank_choices(ranks), costs, np.asarray(damages)[ranks])


def output_candidate(group: Sequence[Measured]) -> Candidate | None:
    """A curve like that of ``input_candidate``, for the transposed weights. None if the weights have one row."""
    mirrored = input_candidate([member.transposed for member in group])
    return mirrored and Candidate(OUTPUT, mirrored.sites, mirrored.choices, mirrored.parameters, mirrored.damages)


def input_terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """One term per site with a private U and the shared V, which contains the identity block."""
    shared = f"{group_name(sites)}.v"
    return {site.name: (Term(f"{site.name}.u", shared, ranks[0], identity="v"),) for site in sites}


def output_terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """One term per site with the shared U, which contains the identity block, and a private V."""
    shared = f"{group_name(sites)}.u"
    return {site.name: (Term(shared, f"{site.name}.v", ranks[0], identity="u"),) for site in sites}


def input_fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The shared V (rank, in) and a private U (out, rank) per site, by factor name (see ``alternate``)."""
    names = [low_rank_factors(terms_of(terms, member, 1)[0]) for member in group]
    _, shared_name, rank = names[0]
    private, shared = alternate(group, rank)
    return {shared_name: shared, **{name: u for (name, _, _), u in zip(names, private, strict=True)}}


def output_fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The shared U (out, rank) and a private V (rank, in) per site, by factor name: ``alternate`` on transposed weights."""
    names = [low_rank_factors(terms_of(terms, member, 1)[0]) for member in group]
    shared_name, _, rank = names[0]
    private, shared = alternate([member.transposed for member in group], rank)
    return {shared_name: shared.T, **{name: v.T for (_, name, _), v in zip(names, private, strict=True)}}


def pooled_basis(group: Sequence[Measured], count: int | None = None) -> Float[Tensor, "count in"]:
    """The first ``count`` basis vectors that a group shares, as rows (count, in), the most important first.

    They are the right singular vectors of the stacked whitened weights, unwhitened by the mean input moment. Without ``count``
    all min(n · out, in) vectors are returned for n members.
    """
    total = sum(member.rows for member in group)
    moments = [member.right.moment.diag() if member.right.diagonal else member.right.moment for member in group]
    pooled = Side(
        sum((member.rows / total * m for member, m in zip(group, moments, strict=True)), torch.zeros_like(moments[0])), 0
    )
    stacked = torch.cat([member.rows**0.5 * pooled.whiten(member.left_whitened.T).T for member in group])
    if stacked.shape[0] >= stacked.shape[1]:
        vectors = eigenvectors(stacked.T)[1][:, :count]
    else:
        values, lefts = (part[..., :count] for part in eigenvectors(stacked))
        vectors = stacked.T @ lefts / values.clamp(min=1e-14 * values[0]).sqrt()
    return pooled.unwhiten(vectors).T


def alternate(
    group: Sequence[Measured], rank: int, sweeps: int = SWEEPS
) -> tuple[list[Float[Tensor, "out rank"]], Float[Tensor, "rank in"]]:
    """Fit a private U_s (out, rank) per member s and one shared V (rank, in) by alternating least squares.

    With the output moment G_s and the input moment A_s of each member: for a given V the best U_s is W_s A_s Vᵀ (V A_s Vᵀ)⁻¹;
    for given U_s the best V solves Σ N_s U_sᵀ G_s U_s V A_s = Σ N_s U_sᵀ G_s W_s A_s. The fit runs at most ``sweeps`` sweeps.
    It stops early, with the best factors so far, if a sweep does not lower the damage or lowers it by little.
    """
    shared = pooled_basis(group, rank)
    private = [best_private(member, shared) for member in group]
    damage = _total(group, private, shared)
    for _ in range(sweeps):
        lefts = [Side(u.T @ member.left.times(u), damping.DERIVED) for member, u in zip(group, private, strict=True)]
        targets = [u.T @ member.left.times(member.weight) for member, u in zip(group, private, strict=True)]
        updated = solve_shared(group, lefts, targets, start=shared, steps=_STEPS)
        updated_private = [best_private(member, updated) for member in group]
        updated_damage = _total(group, updated_private, updated)
        if not updated_damage < damage:
            break
        private, shared, gained, damage = updated_private, updated, damage - updated_damage, updated_damage
        if gained < SETTLED * damage:
            break
    return private, shared


def best_private(one: Measured, shared: Float[Tensor, "rank in"]) -> Float[Tensor, "out rank"]:
    """The U (out, rank) with the least damage for a given V (rank, in)."""
    weighted = one.right.times(shared.T)
    return damping.solve(shared @ weighted, (one.weight @ weighted).T).T


def _total(group: Sequence[Measured], private: Sequence[Tensor], shared: Tensor) -> float:
    return sum(member.damage(u @ shared - member.weight) for member, u in zip(group, private, strict=True))


def _damages(member: Measured, basis: Tensor) -> np.ndarray:
    """The exact damage (n + 1,) if V is the first r rows of a basis (n, in) and U is the best for it, for r = 0 … n."""
    weighted = member.right.times(basis.T)
    gram = basis @ weighted
    lower = damping.cholesky(damping.damped((gram + gram.T) / 2, damping.BASIS))
    projected = torch.linalg.solve_triangular(lower, (member.left_whitened @ weighted).T, upper=False)
    gains = projected.square().sum(1)
    left = member.squared_norm - torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    return (0.5 * member.rows * left.clamp(min=0)).cpu().numpy()


INPUT_OPERATOR = Operator(
    INPUT, input_fit, input_candidate, input_terms, shared=True, quick=True, helped_by=("principal axes",)
)
OUTPUT_OPERATOR = Operator(
    OUTPUT, output_fit, output_candidate, output_terms, shared=True, quick=True, helped_by=("principal axes",)
)
