"""The operator "tie + delta": one tied matrix for the group plus a private low-rank correction for each site.

Relaxed Recursive Transformers (Bae et al. 2024) and DeltaLLM use this form. Here the fit alternates: it finds the corrections
with the least damage for the tied matrix, then the tied matrix with the least damage for the corrections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.linear_solvers import QUICK
from hpr.operators.low_rank import damages, private_term, rank_choices, rank_costs, truncate
from hpr.operators.metric import Measured
from hpr.operators.naming import group_name
from hpr.operators.operator import Operator, low_rank_factors, terms_of, whole_matrix
from hpr.operators.tie import estimate, tie
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate

NAME = "tie + delta"
_ROUNDS = 3
_ANCHORS = (0.2,)  # ranks of the corrections for which the curve adapts the tied matrix, as shares of the full rank


def candidate(group: Sequence[Measured]) -> Candidate | None:
    """A curve with every rank of the corrections from 1 to full − 1. None if the weights have one row or one column.

    Each damage is the least over a few tied matrices (see ``_starts``). It is an upper bound for the damage of the fit.
    """
    if min(group[0].weight.shape) < 2:
        return None
    starts = _starts(group)
    ranks = np.arange(1, min(starts[0].shape))
    costs = starts[0].numel() + len(group) * rank_costs(starts[0].shape, ranks)
    total = np.min([_curve(group, shared) for shared in starts], axis=0)
    return Candidate(NAME, tuple(member.site.name for member in group), rank_choices(ranks), costs, total[ranks])


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """Two terms per site: the shared matrix, then the private low-rank correction."""
    shared = f"{group_name(sites)}.base"
    return {site.name: (Term(shared), private_term(site, ranks[0], ".delta")) for site in sites}


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The tied matrix (out, in) and U (out, rank), V (rank, in) of every correction, by factor name.

    The fit starts from the best matrix of ``_starts`` and alternates for ``_ROUNDS`` rounds.
    """
    member_terms = [terms_of(terms, member, 2) for member in group]
    pairs = [low_rank_factors(delta) for _, delta in member_terms]
    ranks = [rank for _, _, rank in pairs]
    shared = min(
        _starts(group), key=lambda start: sum(_damage(member, start, rank) for member, rank in zip(group, ranks, strict=True))
    )
    for _ in range(_ROUNDS):
        shared = _settled(group, shared, ranks)
    deltas = [truncate(member, rank, member.weight - shared) for member, rank in zip(group, ranks, strict=True)]
    values = {whole_matrix(member_terms[0][0]): shared}
    for (u_name, v_name, _), (u, v) in zip(pairs, deltas, strict=True):
        values |= {u_name: u, v_name: v}
    return values


def _curve(group: Sequence[Measured], shared: Tensor) -> np.ndarray:
    return np.sum([damages(member, member.weight - shared) for member in group], axis=0)


def _starts(group: Sequence[Measured]) -> list[Tensor]:
    """Tied matrices to start from: the one without corrections, and one adapted to the corrections of each anchor rank."""
    shared = estimate(group)
    anchors = [max(1, int(share * min(shared.shape))) for share in _ANCHORS]
    return [shared, *(_settled(group, shared, [rank] * len(group)) for rank in anchors)]


def _damage(member: Measured, shared: Tensor, rank: int) -> float:
    return float(damages(member, member.weight - shared)[rank])


def _settled(group: Sequence[Measured], shared: Tensor, ranks: Sequence[int]) -> Tensor:
    """The tied matrix after one round: ``shared`` gives the corrections of these ranks, which give the new tied matrix."""
    deltas = [truncate(member, rank, member.weight - shared) for member, rank in zip(group, ranks, strict=True)]
    return tie(group, [member.weight - u @ v for member, (u, v) in zip(group, deltas, strict=True)], start=shared, steps=QUICK)


OPERATOR = Operator(NAME, fit, candidate, terms, shared=True, merges=True)
