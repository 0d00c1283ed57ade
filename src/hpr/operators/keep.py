"""The operator "keep": a site keeps its original weight. It applies to every site and has no damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hpr.operators.metric import Measured
from hpr.operators.operator import Operator
from hpr.plans.terms import KEEP, Term
from hpr.solver.candidates import Candidate


def candidate(group: Sequence[Measured]) -> Candidate:
    """A curve with one point: all parameters of the site, damage 0."""
    (member,) = group
    return Candidate(KEEP, (member.site.name,), ((),), np.array([member.site.parameters]), np.zeros(1))


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """No factors, because the module of the site stays in the model."""
    return {}


OPERATOR = Operator(KEEP, fit, candidate)
