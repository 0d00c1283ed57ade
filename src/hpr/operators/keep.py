"""Keep: the original weight, owned by its site alone. Always an option, always exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.metric import Measured
from hpr.plans.terms import KEEP, Term
from hpr.solver.candidates import Candidate


def candidate(group: Sequence[Measured]) -> Candidate:
    """One point: all parameters, no damage."""
    (one,) = group
    return Candidate(KEEP, (one.site.name,), ((),), np.array([one.site.parameters]), np.zeros(1))


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    """No terms: the site's own module stays."""
    return {site.name: () for site in sites}


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    """Nothing to fit."""
    return {}
