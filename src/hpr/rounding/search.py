"""Find the step size at which a model takes a given number of bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hpr.coding.codes import Codes, half_octaves
from hpr.coding.record import Coded
from hpr.errors import BudgetError
from hpr.evaluation.cost import coded_bytes
from hpr.plans.rounding import Rounding
from hpr.rounding.model import Rounder

_log = logging.getLogger(__name__)
_CLOSE = 0.997  # of the budget: a step that uses more is searched no further
_PASSES = 8
_RANGE = 2.0**40  # the coarsest step over the finest: every number is 0 long before


@dataclass(frozen=True)
class Rounded:
    """A model's rounded numbers: ``coded`` by site, ``others`` by name, and how they were rounded. ``bytes``: of the file."""

    coded: Mapping[str, Coded]
    others: Mapping[str, Codes]
    rounding: Rounding
    bytes: int


def round_to(rounder: Rounder, step: float) -> Rounded:
    """The rounding with a given step."""
    codes = rounder.codes(step)
    others = rounder.others(codes, step)
    coded = {name: Coded.of(one) for name, one in codes.items()}
    return Rounded(coded, others, Rounding(step, *rounder.dampings), coded_bytes(rounder.model, coded, others))


def round_to_bytes(rounder: Rounder, limit: int, step: float | None = None) -> Rounded:
    """The finest rounding whose file has at most ``limit`` bytes.

    ``step``: a first guess. The rate is a smooth function of the step, so the secant through the last two tries
    finds it. Raises ``BudgetError`` if the budget is below what one step for everything can reach.
    """
    finest = rounder.finest
    if step is None:
        step = _first_step(rounder, 8 * limit, finest)
    tried: list[tuple[float, float]] = []  # log step, log bytes
    best: Rounded | None = None
    for _ in range(_PASSES):
        step = min(max(step, finest), finest * _RANGE)
        made = round_to(rounder, step)
        _log.debug("step %.3g: %.3f MB of %.3f MB", step, made.bytes / 1e6, limit / 1e6)
        if made.bytes <= limit and (best is None or made.bytes > best.bytes):
            best = made
        if best is not None and (best.bytes >= _CLOSE * limit or step == finest):
            break
        tried.append((math.log(step), math.log(made.bytes)))
        step = math.exp(_next(tried, math.log(limit * (1 + _CLOSE) / 2)))
    if best is None:
        least = min(math.exp(size) for _, size in tried) / 1e6
        raise BudgetError(
            f"a budget of {limit / 1e6:.3f} MB cannot be met by rounding, the coarsest model that was tried takes "
            f"{least:.3f} MB: give a larger budget"
        )
    return best


def _next(tried: list[tuple[float, float]], wanted: float) -> float:
    """The log of the step at which the secant through the last two tries meets the wanted log of bytes."""
    (step, size), slope = tried[-1], -0.8
    if len(tried) > 1:
        (before, other) = tried[-2]
        if abs(step - before) > 1e-9 and abs(size - other) > 1e-9:
            slope = min(-0.05, (size - other) / (step - before))
    return step + max(-2.0, min(2.0, (wanted - size) / slope))


def _first_step(rounder: Rounder, bits: float, finest: float) -> float:
    """The step at which the entropy of the codes is about ``bits``, if weights are Gaussian with sizes by row and column."""
    ratios = []
    for whitened in (site for site in rounder.sites if site.read):
        squares = whitened.weight.square()
        mean = squares.mean().clamp(min=1e-30)
        rows, columns = (torch.from_numpy(half_octaves(part)).to(squares) for part in (whitened.rows, whitened.columns))
        spread = squares.mean(1)[:, None] * squares.mean(0) / mean
        ratios.append((spread / (rows[:, None] * columns).square()).flatten())
    low, high = math.log(finest), math.log(finest * _RANGE)
    for _ in range(40):
        middle = (low + high) / 2
        entropy = sum(float((1 + 17.08 * ratio * math.exp(-2 * middle)).log2().sum()) / 2 for ratio in ratios)
        low, high = (middle, high) if entropy > bits else (low, middle)
    return math.exp(high)
