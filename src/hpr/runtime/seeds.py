"""Seeds of random numbers: which are allowed, and how each library takes them."""

from __future__ import annotations

import operator
from typing import Any

from hpr.errors import HprError

LIMIT = 2**64  # of torch
NUMPY = 2**32


def check_seed(seed: Any) -> int:
    """The seed as an integer. Raises ``HprError`` for a number that is no whole one from 0 to 2⁶⁴ − 1.

    >>> check_seed(7)
    7
    """
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise HprError(f"the seed is {seed!r}: give a whole number from 0 to 2^64 - 1") from error
    if isinstance(seed, bool) or not 0 <= number < LIMIT:
        raise HprError(f"the seed is {seed!r}: give a whole number from 0 to 2^64 - 1")
    return number
