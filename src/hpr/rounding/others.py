"""Round what is no site's weight (norms, biases, positions), each parameter on one grid that its sensitivity gives.

A change E of a parameter with mean squared gradient F costs ½ · F · ‖E‖². A grid of δ·√(2 / F) therefore costs as much per
number as the step δ costs in a site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hpr.coding.codes import Codes, half_octaves
from hpr.rounding.whitening import half_octave

_COARSEST = 0.5  # of a parameter's standard deviation: about 3 bits a number, also if the objective does not read it
_CHOICES = 2.0**-8  # the same of a matrix without gradient: routers that only choose have none, and few matrices else are here


def round_others(values: Mapping[str, Tensor], sensitivities: Mapping[str, float], step: float) -> dict[str, Codes]:
    """Name → codes (1, n) of the parameters whose sensitivity is known and whose numbers are finite."""
    return {
        name: _rounded(values[name].detach().double().cpu(), sensitivity, step)
        for name, sensitivity in sensitivities.items()
        if bool(torch.isfinite(values[name]).all())
    }


def _rounded(values: Tensor, sensitivity: float, step: float) -> Codes:
    spread = float(values.std(correction=0)) or float(values.abs().max()) or 1.0
    coarsest = _CHOICES if sensitivity <= 0 and values.dim() > 1 else _COARSEST
    values = values.flatten()
    grid = min(step * math.sqrt(2 / sensitivity) if sensitivity > 0 else math.inf, coarsest * spread)
    grid = max(grid, float(values.abs().max()) * 2.0**-24)  # codes stay small, and are exact in float32
    exponents = np.array([half_octave(grid / step)])
    unit = float((step * half_octaves(exponents)).astype(np.float32)[0])  # as Codes.weight computes it
    rounded = (values / unit).round().numpy().astype(np.int32)
    return Codes(rounded[None], exponents, np.zeros(len(rounded), np.int32), step)
