"""The operator "base + block + private": a weight is the sum of three low-rank matrices.

All layers of the group share the base, two or three neighbouring layers share a block matrix, and each layer has a private
matrix. The three levels have different ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.linear_solvers import QUICK
from hpr.operators.low_rank import damages, private_term, rank_costs, truncate
from hpr.operators.metric import Measured, Side
from hpr.operators.naming import group_name
from hpr.operators.operator import Operator, TermsError, low_rank_factors, terms_of
from hpr.operators.tie import estimate, tie
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate

NAME = "base + block + private"
BLOCK = 2
SHORTEST = 4


def candidate(group: Sequence[Measured]) -> Candidate | None:
    """A curve with a few ranks of the base and the blocks and up to 16 private ranks for each of them.

    None for groups of fewer than ``SHORTEST`` sites and for weights with one row or one column.
    """
    rows, columns = group[0].weight.shape
    full = min(rows, columns)
    if len(group) < SHORTEST or full < 2:
        return None
    private = np.unique(np.linspace(1, full - 1, 16).astype(int))
    choices, costs, damages_of_ranks = [], [], []
    for base_rank in sorted({max(1, full // 8), max(1, full // 3)}):
        base = _truncated(group, estimate(group), base_rank)
        for block_rank in (max(1, full // 8),):
            rests = [weight for _, weight in _after_blocks(group, base, block_rank)]
            curves = np.sum([damages(member, rest) for member, rest in zip(group, rests, strict=True)], axis=0)
            blocks = len(list(_blocks(group)))
            shared = rank_costs((rows, columns), np.array([base_rank]))[0]
            shared += blocks * rank_costs((rows, columns), np.array([block_rank]))[0]
            choices += [(base_rank, block_rank, int(rank)) for rank in private]
            costs.append(shared + len(group) * rank_costs((rows, columns), private))
            damages_of_ranks.append(curves[private])
    names = tuple(member.site.name for member in group)
    return Candidate(NAME, names, tuple(choices), np.concatenate(costs), np.concatenate(damages_of_ranks))


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """Three terms per site: base, block and private, in this order."""
    base_rank, block_rank, private_rank = ranks
    result: dict[str, tuple[Term, ...]] = {}
    for block in _blocks(sites):
        for site in block:
            result[site.name] = (
                _shared_term(f"{group_name(sites)}.base", site, base_rank),
                _shared_term(f"{group_name(block)}.block", site, block_rank),
                private_term(site, private_rank, ".private"),
            )
    return result


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """U (out, rank) and V (rank, in) of the base, of every block and of every site, by factor name.

    The fit goes from the base to the private factors: each level approximates the residual that the levels before it leave.
    """
    if len(group) < BLOCK:
        raise TermsError(f"{len(group)} sites are too few for blocks of {BLOCK}")
    names_of_members = [[low_rank_factors(term) for term in terms_of(terms, member, 3)] for member in group]
    (*base_names, base_rank), (_, _, block_rank), _ = names_of_members[0]
    base = _truncated(group, estimate(group), base_rank)
    values: dict[str, Tensor] = dict(zip(base_names, base, strict=True))
    residuals = _after_blocks(group, base, block_rank)
    for member, names, (pair, rest) in zip(group, names_of_members, residuals, strict=True):
        _, (*block_names, _), (*private_names, private_rank) = names
        values |= dict(zip(block_names, pair, strict=True))
        values |= dict(zip(private_names, truncate(member, private_rank, rest), strict=True))
    return values


def _shared_term(name: str, site: Site, rank: int) -> Term:
    return Term(f"{name}.u", f"{name}.v", rank, identity=private_term(site, rank).identity)


def _blocks(members: Sequence) -> Iterator[Sequence]:
    """Divide members into blocks of ``BLOCK`` neighbours. The last member of an odd number joins the last block."""
    starts = list(range(0, len(members) - 1, BLOCK))
    for index, start in enumerate(starts):
        yield members[start:] if index == len(starts) - 1 else members[start : start + BLOCK]


def _inherited(group: Sequence[Measured], weights: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """U and V of the low-rank matrix that approximates all these weights."""
    return _truncated(group, tie(group, weights, steps=QUICK), rank)


def _truncated(group: Sequence[Measured], shared: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U and V of the tied matrix of a group, truncated in the mean metric of the members."""
    total = sum(member.rows for member in group)
    sides = []
    for name in ("left", "right"):
        moments = [member.rows / total * getattr(member, name).moment for member in group]
        sides.append(Side(torch.stack(moments).sum(0), 0.0))
    return truncate(Measured(group[0].site, shared, sides[0], sides[1], total), rank)


def _after_blocks(
    group: Sequence[Measured], base: tuple[Tensor, Tensor], rank: int
) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """For every member in order: the factors (U, V) of its block, and the residual (out, in) after base and block."""
    result = []
    for block in _blocks(group):
        rests = [member.weight - base[0] @ base[1] for member in block]
        pair = _inherited(block, rests, rank)
        result += [(pair, rest - pair[0] @ pair[1]) for rest in rests]
    return result


OPERATOR = Operator(NAME, fit, candidate, terms, shared=True, merges=True)
