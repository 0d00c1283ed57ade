"""Reused: a weight of which some rows, or all, have no effect any more, since its layer reuses what one below computes.

The rows that still have one stay as they are, one term a run: of a fused projection of queries, keys and values those of the
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hpr.operators.metric import Measured
from hpr.plans.layer_states import REUSED
from hpr.plans.terms import Term

NAME = REUSED


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The rows of each term."""
    values = {}
    for one in group:
        for term in terms[one.site.name]:
            start, stop = term.rows or (0, one.site.out_features)
            values[term.u] = one.weight[start:stop]
    return values
