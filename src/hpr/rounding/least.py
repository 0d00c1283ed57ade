"""The smallest file that rounding can give, known without statistics, so that no profile is measured in vain."""

from __future__ import annotations

import numpy as np
from torch import nn

from hpr.anatomy.describe import describe
from hpr.coding.codes import Codes
from hpr.coding.record import Coded
from hpr.errors import BudgetError
from hpr.evaluation.cost import coded_bytes, disk_bytes
from hpr.profiling.other_parameters import other_parameters

_LIKELY = 0.05  # of the original's bytes: files above that always suffice, so nothing is coded for the check


def check_bytes(model: nn.Module, budget: str, limit: int) -> None:
    """Raise ``BudgetError`` for a number of bytes that even a model of zeros does not fit into."""
    if limit < _LIKELY * disk_bytes(model) and limit < (least := least_bytes(model)):
        raise BudgetError(
            f"a budget of {budget} is {limit:,} bytes, but this model takes {least:,} even if every number is rounded to 0: "
            f"give a larger budget"
        )


def least_bytes(model: nn.Module) -> int:
    """The bytes of the file if every code is 0."""
    anatomy = describe(model)
    sites = {site.name: Coded.of(_zeros(site.out_features, site.in_features)) for site in anatomy.sites}
    others = {name: _zeros(1, value.numel()) for name, value in other_parameters(model, anatomy).items()}
    return coded_bytes(model, sites, others)


def _zeros(rows: int, columns: int) -> Codes:
    return Codes(np.zeros((rows, columns), np.int32), np.zeros(rows, np.int32), np.zeros(columns, np.int32), 1.0)
