"""Read values of a JSON document that may lack them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def dig(data: Any, *keys: str) -> Any:
    """A value deep in nested mappings; None if a step is missing or null.

    >>> dig({"budget": {"text": "50%"}}, "budget", "text")
    '50%'
    """
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def number(value: Any) -> float | None:
    """The value as a finite float; None for null, text, booleans, NaN and infinities.

    >>> number(3), number(True), number(float("nan"))
    (3.0, None, None)
    """
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if finite else None
