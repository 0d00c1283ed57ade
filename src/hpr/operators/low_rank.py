"""The operator "low rank": W ≈ U V, both factors private to one site.

The U V of rank r with the least damage is the truncated SVD of the whitened weight. SVD-LLM (Wang et al. 2024) whitens the
input side only; here both sides are whitened. An identity block saves r² of the r·(out + in) numbers and does not change the
product (see ``FactorShape``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.metric import Measured, eigenvectors, tails
from hpr.operators.operator import Operator, low_rank_factors, only_site, terms_of
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate

NAME = "low rank"


def identity_side(rows: int, columns: int) -> str:
    """The factor that gets the identity block: the one on the shorter side, because its row order takes less memory."""
    return "u" if rows <= columns else "v"


def rank_costs(shape: Sequence[int], ranks: np.ndarray) -> np.ndarray:
    """The parameters of U V with an identity block and its row order, for a weight (rows, columns): (n,) for ``ranks`` (n,)."""
    rows, columns = shape
    return ranks * (rows + columns - ranks) + min(rows, columns)


def candidate(group: Sequence[Measured]) -> Candidate | None:
    """A curve with every rank from 1 to full − 1, from one factorisation. None if the weight has one row or one column."""
    (member,) = group
    if min(member.weight.shape) < 2:
        return None
    ranks = np.arange(1, min(member.weight.shape))
    return Candidate(
        NAME, (member.site.name,), rank_choices(ranks), rank_costs(member.weight.shape, ranks), damages(member)[ranks]
    )


def damages(one: Measured, change: Float[Tensor, "out in"] | None = None) -> np.ndarray:
    """The damage (nats per example) of truncating the weight to each rank from 0 to full: (full + 1,).

    ``change``: another matrix (out, in) to truncate instead of the weight, in the same metric.
    """
    whitened = one.whitened(change)
    values, _ = eigenvectors(whitened if whitened.shape[0] <= whitened.shape[1] else whitened.T)
    return (0.5 * one.rows * tails(values)).cpu().numpy()


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """One low-rank term with private factors for the only site."""
    (site,), (rank,) = sites, ranks
    return {site.name: (private_term(site, rank),)}


def private_term(site: Site, rank: int, name: str = "", rows: tuple[int, int] | None = None) -> Term:
    """A low-rank term with private factors. ``name`` is a suffix that distinguishes it from other terms of the site.

    ``rows``: the range [start, stop) of weight rows that the term covers, by default all.
    """
    height = site.out_features if rows is None else rows[1] - rows[0]
    base = f"{site.name}{name}"
    return Term(f"{base}.u", f"{base}.v", rank, rows=rows, identity=identity_side(height, site.in_features))  # type: ignore[arg-type]


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """U (out, rank) and V (rank, in) with the least damage, by factor name."""
    member = only_site(group)
    (term,) = terms_of(terms, member, 1)
    u_name, v_name, rank = low_rank_factors(term)
    u, v = truncate(member, rank)
    return {u_name: u, v_name: v}


def truncate(
    one: Measured, rank: int, matrix: Float[Tensor, "out in"] | None = None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """U (out, rank) and V (rank, in) with the least damage for the weight, or for another ``matrix`` in the same metric."""
    matrix = one.weight if matrix is None else matrix
    if matrix.shape[0] > matrix.shape[1]:
        v, u = truncate(one.transposed, rank, matrix.T)
        return u.T, v.T
    _, vectors = eigenvectors(one.whitened(matrix))
    basis = vectors[:, :rank]
    return one.left.unwhiten(basis), basis.T @ one.left.whiten(matrix)


def rank_choices(ranks: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """The ranks in the form of ``Candidate.choices``: one tuple per rank."""
    return tuple((int(rank),) for rank in ranks)


OPERATOR = Operator(NAME, fit, candidate, terms)
