"""What several processes have to have in common."""

from __future__ import annotations

from typing import TypeVar

from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def agreed(value: T) -> T:
    """The value of the first process, for all of them; with one process its own."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
