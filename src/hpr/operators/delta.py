"""Tie + delta: one matrix for the group plus a private low-rank correction at each site.

Relaxed Recursive Transformers (Bae et al. 2024) and DeltaLLM use this form; here the tied matrix and the corrections are
both of least damage, each given the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hpr.anatomy import Site
from hpr.operators.lowrank import damages, private_term, rank_choices, rank_costs, truncate
from hpr.operators.metric import Measured
from hpr.operators.tie import QUICK, estimate, group_name, tie
from hpr.planning.candidates import Candidate
from hpr.planning.plan import Term

NAME = "tie + delta"
_ROUNDS = 3
_ANCHORS = (0.2,)  # ranks, as shares of the full one, that tied matrices are settled for


def candidate(group: Sequence[Measured]) -> Candidate:
    """Every rank of the corrections; the least damage over tied matrices settled for a few ranks (a bound for the fit)."""
    shared = estimate(tuple(group))
    ranks = np.arange(1, min(shared.shape))
    costs = shared.numel() + len(group) * rank_costs(shared.shape, ranks)
    total = _curve(group, shared)
    for share in _ANCHORS:
        total = np.minimum(total, _curve(group, _settled(group, shared, max(1, int(share * min(shared.shape))))))
    return Candidate(NAME, tuple(one.site.name for one in group), rank_choices(ranks), costs, total[ranks])


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """The shared matrix, then the private correction."""
    shared = f"{group_name(sites)}.base"
    return {site.name: (Term(shared), private_term(site, ranks[0], ".delta")) for site in sites}


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """Alternate: corrections given the tied matrix, tied matrix given the corrections."""
    rank = terms[group[0].site.name][1].rank
    assert rank is not None
    shared = tie(group)
    for _ in range(_ROUNDS):
        shared = _settled(group, shared, rank)
    deltas = [truncate(one, rank, one.weight - shared) for one in group]
    values = {terms[group[0].site.name][0].u: shared}
    for one, (u, v) in zip(group, deltas, strict=True):
        term = terms[one.site.name][1]
        assert term.v is not None
        values |= {term.u: u, term.v: v}
    return values


def _curve(group: Sequence[Measured], shared: Tensor) -> np.ndarray:
    return np.sum([damages(one, one.weight - shared) for one in group], axis=0)


def _settled(group: Sequence[Measured], shared: Tensor, rank: int) -> Tensor:
    """The tied matrix, given corrections of some rank to what it was."""
    deltas = [truncate(one, rank, one.weight - shared) for one in group]
    return tie(group, [one.weight - u @ v for one, (u, v) in zip(group, deltas, strict=True)], start=shared, steps=QUICK)
