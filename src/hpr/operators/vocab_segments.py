"""Segments: the rows of an embedding table in contiguous runs, each low rank with a rank of its own, or kept.

Vocabularies are built in order of frequency, so a run of rows is a run of about equally frequent tokens; GroupReduce (Chen et
al. 2018) clusters rows by frequency for the same reason. Where to cut is decided like where to cut a stack of layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.low_rank import private_term, rank_choices, rank_costs, truncate
from hpr.operators.metric import Measured, tails
from hpr.plans.terms import KEEP, Term
from hpr.solver.candidates import Candidate, Track

NAME = "segments"
_SHORTEST = 16
_LABEL = re.compile(r"(.+)\[(\d+):(\d+)\]")


def track(one: Measured) -> Track:
    """A track whose positions are blocks of rows: low rank over any run of blocks, each block may also be kept."""
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
                options.append(Candidate(KEEP, (_label(one, start, stop),), ((),), cost, np.zeros(1)))
            candidates[first, last + 1] = tuple(options)
    return Track(one.site.name, len(grams), candidates)


def row_bounds(rows: int) -> list[int]:
    """Cuts at about rows / √2ᵏ, down to a 128th: 0 < … < rows."""
    cuts = [rows]
    while cuts[-1] / 2**0.5 > max(_SHORTEST, rows / 128):
        cuts.append(int(cuts[-1] / 2**0.5))
    return [0, *reversed(cuts)]


def merge(site: Site, chosen: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[Term, ...]:
    """Terms for the chosen runs, (label, ranks) each; ranks () is a kept run. Neighbouring kept runs become one."""
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    for label, ranks in sorted(chosen, key=lambda pair: rows_of(pair[0])):
        start, stop = rows_of(label)
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


def rows_of(label: str) -> tuple[int, int]:
    """``table[64:128]`` → (64, 128)."""
    match = _LABEL.fullmatch(label)
    assert match is not None
    return int(match[2]), int(match[3])


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """Each run on its own."""
    (one,) = group
    values: dict[str, Tensor] = {}
    for term in terms[one.site.name]:
        start, stop = term.rows or (0, one.site.out_features)
        if term.v is None:
            values[term.u] = one.weight[start:stop]
        else:
            assert term.rank is not None
            values[term.u], values[term.v] = truncate(one.segment(start, stop), term.rank)
    return values


def _label(one: Measured, start: int, stop: int) -> str:
    return f"{one.site.name}[{start}:{stop}]"


def _curve(one: Measured, start: int, stop: int, gram: Tensor) -> Candidate:
    rows, columns = stop - start, one.site.in_features
    ranks = np.arange(1, min(rows, columns))
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    damages = (0.5 * one.rows * tails(values)).cpu().numpy()[ranks]
    return Candidate(NAME, (_label(one, start, stop),), rank_choices(ranks), rank_costs((rows, columns), ranks), damages)
