"""The budget: how many unique parameters a plan may use, as a user says it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpr.anatomy.model import Anatomy
from hpr.errors import HprError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_FILE_OVERHEAD = 64 * 1024  # header of a safetensors file and the one-element guards


@dataclass(frozen=True)
class Budget:
    """A limit on unique parameters. ``text`` is what the user wrote, ``parameters`` what it means for this model."""

    text: str
    parameters: int


def parse_budget(text: str, anatomy: Anatomy, only: str | None = None, bytes_per_parameter: int = 4) -> Budget:
    """Turn ``50%``, ``11M`` (parameters) or ``45MB`` (on disk) into a limit on unique parameters.

    A percentage counts all unique parameters, embeddings included; with ``only`` it counts the weights of the selected
    sites, and everything else stays on top. Raises ``HprError`` for what is no budget.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[KMGB]?|[KMG]i?B)\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise HprError(f"{text!r} is no budget: write a share (50%), parameters (11M) or a size on disk (45MB)")
    value, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if value > 100:
            raise HprError(f"a budget of {text} is more than the model has: at most 100%")
        selected = sum(site.parameters for site in anatomy.select(only))
        whole = anatomy.total_parameters if only is None else selected
        limit = int(whole * value / 100) + (anatomy.total_parameters - whole)
    elif unit[0:1] in ("K", "M", "G") and unit.endswith("B"):
        size = value * (1024 if "I" in unit else 1000) ** ("KMG".index(unit[0]) + 1)
        limit = int((size - _FILE_OVERHEAD) // bytes_per_parameter)
    else:
        limit = int(value * _UNITS[unit])
    return Budget(text.strip(), max(0, min(limit, anatomy.total_parameters)))
