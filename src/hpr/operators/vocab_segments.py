"""The operator "segments": it cuts an embedding table into runs of rows. Each run is low rank with its own rank, or kept.

Vocabularies are built in order of frequency, so a run of rows holds tokens of similar frequency. GroupReduce (Chen et al. 2018)
clusters rows by frequency for the same reason. The solver chooses the cuts with the same search as for a stack of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.low_rank import private_term, rank_choices, rank_costs, truncate
from hpr.operators.metric import Measured, tails
from hpr.operators.operator import Operator, RowRange, RowRuns, low_rank_factors, only_site
from hpr.plans.terms import KEEP, Term
from hpr.solver.candidates import Candidate, Track

NAME = "segments"
_SHORTEST = 16


def track(one: Measured) -> Track:
    """A track whose positions are blocks of rows. Candidates: low rank for every run of blocks, and keep for every block."""
    bounds = row_bounds(one.site.out_features)
    columns = one.site.in_features
    whitened = one.right.whiten(one.weight.T).T
    grams = []
    for start, stop in pairwise(bounds):
        part = one.left.part(start, stop).moment.sqrt()[:, None] * whitened[start:stop]
        grams.append(part.T @ part)
    candidates: dict[tuple[int, int], tuple[Candidate, ...]] = {}
    for first in range(len(grams)):
        total = torch.zeros_like(grams[0])
        for last in range(first, len(grams)):
            total = total + grams[last]
            start, stop = bounds[first], bounds[last + 1]
            options = [_curve(one, start, stop, total)] if min(stop - start, columns) > 1 else []
            if first == last:
                cost = np.array([(stop - start) * columns])
                options.append(Candidate(KEEP, (one.site.name,), ((),), cost, np.zeros(1), rows=(start, stop)))
            candidates[first, last + 1] = tuple(options)
    return Track(one.site.name, len(grams), candidates)


def row_bounds(rows: int) -> list[int]:
    """The row numbers at which a table may be cut: 0, about rows / √2ᵏ down to rows / 128, and ``rows``, ascending."""
    cuts = [rows]
    while cuts[-1] / 2**0.5 > max(_SHORTEST, rows / 128):
        cuts.append(int(cuts[-1] / 2**0.5))
    return [0, *reversed(cuts)]


def merge(site: Site, chosen: Sequence[tuple[RowRange, tuple[int, ...]]]) -> tuple[Term, ...]:
    """The terms for the chosen runs, given as (rows, ranks) pairs.

    A run with ranks () is kept, and neighbouring kept runs become one term. Returns no terms if the whole table is kept.
    """
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    for (start, stop), ranks in sorted(chosen):
        if runs and not ranks and not runs[-1][2] and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop, ())
        else:
            runs.append((start, stop, ranks))
    if len(runs) == 1:
        return () if not runs[0][2] else (private_term(site, runs[0][2][0]),)
    terms = []
    for start, stop, ranks in runs:
        name = f".{start}-{stop}"
        terms.append(private_term(site, ranks[0], name, (start, stop)) if ranks else Term(site.name + name, rows=(start, stop)))
    return tuple(terms)


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The factors of each run, fitted separately: (rows, in) for a kept run, U (rows, rank) and V (rank, in) for others."""
    member = only_site(group)
    values: dict[str, Tensor] = {}
    for term in terms[member.site.name]:
        start, stop = term.rows or (0, member.site.out_features)
        if term.v is None:
            values[term.u] = member.weight[start:stop]
        else:
            u_name, v_name, rank = low_rank_factors(term)
            values[u_name], values[v_name] = truncate(member.segment(start, stop), rank)
    return values


def _curve(member: Measured, start: int, stop: int, gram: Tensor) -> Candidate:
    rows, columns = stop - start, member.site.in_features
    ranks = np.arange(1, min(rows, columns))
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    damages = (0.5 * member.rows * tails(values)).cpu().numpy()[ranks]
    costs = rank_costs((rows, columns), ranks)
    return Candidate(NAME, (member.site.name,), rank_choices(ranks), costs, damages, rows=(start, stop))


OPERATOR = Operator(NAME, fit, rows=RowRuns(track, merge))
