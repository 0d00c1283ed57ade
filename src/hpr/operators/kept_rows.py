"""Kept rows: what stays of a weight if its layer reuses the attention of a layer below and some rows lose their effect.

The remaining rows are stored unchanged, one term per run. For a fused query-key-value projection these are the value rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hpr.operators.metric import Measured
from hpr.operators.operator import Operator
from hpr.plans.layer_states import REUSED
from hpr.plans.terms import Term


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The rows of each term."""
    values = {}
    for one in group:
        for term in terms[one.site.name]:
            start, stop = term.rows or (0, one.site.out_features)
            values[term.u] = one.weight[start:stop]
    return values


OPERATOR = Operator(REUSED, fit, needs_layer_state=True)
