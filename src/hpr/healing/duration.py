"""How long to heal, in the user's words: ``500steps``, ``10min``, ``2h``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from accelerate import PartialState
from torch import nn

from hpr.errors import HprError
from hpr.healing.distributed import agreed
from hpr.healing.loss import GlobalLoss
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import eval_mode, to_device_of

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(steps?|s|min|h)?")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_MOST = 10**9  # steps or seconds
_TIMED = 3  # passes that are timed, after one that is not


def parse_duration(text: str | int) -> tuple[int | None, float | None]:
    """Return ``(steps, None)`` or ``(None, seconds)``.

    Raises ``HprError`` for text that is neither, for less than one step, and for more than a thousand million.

    >>> parse_duration("500steps"), parse_duration("1.5h")
    ((500, None), (None, 5400.0))
    """
    match = _DURATION.fullmatch(str(text).strip().lower())
    if match is None or not float(match[1]) > 0:
        raise HprError(f"{str(text)!r} is no amount of healing: say '500steps', '90s', '10min' or '2h'")
    number, unit = float(match[1]), match[2] or "steps"
    if number * _SECONDS.get(unit, 1.0) > _MOST:
        raise HprError(f"{str(text).strip()[:40]!r} is more than {_MOST:,} steps or seconds: give less")
    if unit in _SECONDS:
        return None, number * _SECONDS[unit]
    if number != int(number):
        raise HprError(f"{str(text)!r}: steps are counted whole; give a whole number")
    return int(number), None


def steps_within(seconds: float, student: nn.Module, loss: GlobalLoss, batches: Sequence[Batch], accumulate: int = 1) -> int:
    """Return how many steps fit into a time, at least one. It times a few batches forward and backward, spread over all.

    With several processes the first one decides for all of them.
    """
    places = [number * (len(batches) - 1) // _TIMED for number in range(_TIMED + 1)]
    with eval_mode(student):
        for number, place in enumerate(places):
            if number == 1:
                start = time.perf_counter()
            loss(student, to_device_of(batches[place], student)).total.backward()
            student.zero_grad(set_to_none=True)
    steps = max(1, int(seconds * _TIMED / (time.perf_counter() - start) / accumulate))
    PartialState(cpu=next(student.parameters()).device.type == "cpu")
    return agreed(steps)
