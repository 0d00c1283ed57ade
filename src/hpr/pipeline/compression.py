"""What a compression gives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpr.plans.plan import Plan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compression:
    """What ``compress`` made.

    ``student``: the compressed model. ``plan``: the plan that was chosen. ``metrics``: the values of metrics.json.
    ``output``: the folder that was written, None if none was asked for.
    """

    student: nn.Module
    plan: Plan
    metrics: dict[str, Any]
    output: Path | None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix torch's random numbers inside the block; those of the caller go on as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of the block to ``seconds[name]``, under a name that the report shows."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    _log.debug("%s: %.1f s", name, seconds[name])
