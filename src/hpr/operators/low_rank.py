"""Low rank: W ≈ U V, private to one site.

The best U V of rank r in the metric is the truncated SVD of the whitened weight (SVD-LLM, Wang et al. 2024, whitens one
side only). An identity block saves r² of the r·(out + in) numbers without changing the product; see ``FactorShape``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.metric import Measured, eigenvectors, tails
from hpr.operators.operator import Operator, low_rank_factors, only_site, terms_of
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate

NAME = "low rank"


def identity_side(rows: int, columns: int) -> str:
    """Where the identity block goes: on the shorter side, whose order is shorter to store."""
    return "u" if rows <= columns else "v"


def rank_costs(shape: Sequence[int], ranks: np.ndarray) -> np.ndarray:
    """Parameters of U V with an identity block, for each rank of a (rows, columns) site."""
    rows, columns = shape
    return ranks * (rows + columns - ranks) + min(rows, columns)


def candidate(group: Sequence[Measured]) -> Candidate | None:
    """Every rank from 1 to full − 1, its damage from one factorisation; None for a single row or column."""
    (one,) = group
    if min(one.weight.shape) < 2:
        return None
    ranks = np.arange(1, min(one.weight.shape))
    return Candidate(NAME, (one.site.name,), rank_choices(ranks), rank_costs(one.weight.shape, ranks), damages(one)[ranks])


def damages(one: Measured, change: Tensor | None = None) -> np.ndarray:
    """Damage at every rank from 0 to full, of the weight or of another matrix (out, in) in its metric."""
    whitened = one.whitened(change)
    values, _ = eigenvectors(whitened if whitened.shape[0] <= whitened.shape[1] else whitened.T)
    return (0.5 * one.rows * tails(values)).cpu().numpy()


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """One private term."""
    (site,), (rank,) = sites, ranks
    return {site.name: (private_term(site, rank),)}


def private_term(site: Site, rank: int, name: str = "", rows: tuple[int, int] | None = None) -> Term:
    """A term whose factors belong to one site; ``name`` tells it from the site's other terms."""
    height = site.out_features if rows is None else rows[1] - rows[0]
    base = f"{site.name}{name}"
    return Term(f"{base}.u", f"{base}.v", rank, rows=rows, identity=identity_side(height, site.in_features))  # type: ignore[arg-type]


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """U (out, rank) and V (rank, in), the best in the metric."""
    one = only_site(group)
    (term,) = terms_of(terms, one, 1)
    u_name, v_name, rank = low_rank_factors(term)
    u, v = truncate(one, rank)
    return {u_name: u, v_name: v}


def truncate(one: Measured, rank: int, matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best U (out, rank), V (rank, in) for the weight or for another matrix in its metric."""
    matrix = one.weight if matrix is None else matrix
    if matrix.shape[0] > matrix.shape[1]:
        v, u = truncate(one.transposed, rank, matrix.T)
        return u.T, v.T
    _, vectors = eigenvectors(one.whitened(matrix))
    basis = vectors[:, :rank]
    return one.left.unwhiten(basis), basis.T @ one.left.whiten(matrix)


def rank_choices(ranks: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Ranks as a candidate's choices."""
    return tuple((int(rank),) for rank in ranks)


OPERATOR = Operator(NAME, fit, candidate, terms)
