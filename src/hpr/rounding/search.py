"""Find the step size at which a model takes a given number of bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hpr.coding.codes import half_octaves
from hpr.coding.record import Coded
from hpr.errors import BudgetError
from hpr.plans.rounding import Rounding
from hpr.rounding.model import Rounder

_log = logging.getLogger(__name__)
_CLOSE = 0.997  # of the budget: a step that uses more is searched no further
_PASSES = 8
_RANGE = 2.0**40  # the coarsest step over the finest: every number is 0 long before


@dataclass(frozen=True)
class Rounded:
    """A model's weights as streams: ``coded`` by site, and how they were rounded. ``bytes``: of the whole file."""

    coded: Mapping[str, Coded]
    rounding: Rounding
    bytes: int


def round_to_bytes(rounder: Rounder, limit: int, other_bytes: int, step: float | None = None) -> Rounded:
    """The finest rounding whose file has at most ``limit`` bytes, of which ``other_bytes`` are not streams.

    ``step``: a first guess. The rate is a smooth function of the step, so the secant through the last two tries
    finds it. Raises ``BudgetError`` if the budget is below what one step for everything can reach.
    """
    available = limit - other_bytes
    if available <= 0:
        raise BudgetError(
            f"a budget of {limit / 1e6:.3f} MB cannot be met by rounding: norms, biases and names alone take "
            f"{other_bytes / 1e6:.3f} MB; give a larger budget"
        )
    finest = rounder.finest
    if step is None:
        step = _first_step(rounder, 8 * available, finest)
    tried: list[tuple[float, float]] = []  # log step, log bytes of the streams
    best: Rounded | None = None
    for _ in range(_PASSES):
        step = min(max(step, finest), finest * _RANGE)
        coded = {name: Coded.of(codes) for name, codes in rounder.codes(step).items()}
        size = sum(len(one.stream) for one in coded.values())
        _log.debug("step %.3g: %.3f MB of %.3f MB", step, (size + other_bytes) / 1e6, limit / 1e6)
        if size <= available and (best is None or size + other_bytes > best.bytes):
            best = Rounded(coded, Rounding(step, *rounder.dampings), size + other_bytes)
        if best is not None and (best.bytes >= _CLOSE * limit or step == finest):
            break
        tried.append((math.log(step), math.log(size)))
        step = math.exp(_next(tried, math.log(available * (1 + _CLOSE) / 2)))
    if best is None:
        least = (min(math.exp(size) for _, size in tried) + other_bytes) / 1e6
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
        ratios.append((spread / (whitened.unit * rows[:, None] * columns).square()).flatten())
    low, high = math.log(finest), math.log(finest * _RANGE)
    for _ in range(40):
        middle = (low + high) / 2
        entropy = sum(float((1 + 17.08 * ratio * math.exp(-2 * middle)).log2().sum()) / 2 for ratio in ratios)
        low, high = (middle, high) if entropy > bits else (low, middle)
    return math.exp(high)
