"""Keep: the original weight, owned by its site alone. Always an option, always exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hpr.operators.metric import Measured
from hpr.operators.operator import Operator
from hpr.plans.terms import KEEP, Term
from hpr.solver.candidates import Candidate


def candidate(group: Sequence[Measured]) -> Candidate:
    """One point: all parameters, no damage."""
    (one,) = group
    return Candidate(KEEP, (one.site.name,), ((),), np.array([one.site.parameters]), np.zeros(1))


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """No factors: the site's own module stays."""
    return {}


OPERATOR = Operator(KEEP, fit, candidate)
