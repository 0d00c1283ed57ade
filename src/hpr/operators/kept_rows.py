"""The operator for layers that reuse the attention of a layer below: it stores the rows that still have an effect.

The other rows of the weight have no effect and are dropped. Each run of remaining rows is one term and is stored unchanged. In
a fused query-key-value projection the remaining rows are the value rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hpr.operators.metric import Measured
from hpr.operators.operator import Operator
from hpr.plans.layer_states import REUSED
from hpr.plans.terms import Term


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """The rows [start, stop) of the weight for each term, (rows, in), by factor name."""
    values = {}
    for member in group:
        for term in terms[member.site.name]:
            start, stop = term.rows or (0, member.site.out_features)
            values[term.u] = member.weight[start:stop]
    return values


OPERATOR = Operator(REUSED, fit, needs_layer_state=True)
