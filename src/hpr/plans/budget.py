"""The budget, as a user says it: how many unique parameters a plan may use, or how many bytes the file may have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hpr.anatomy.model import Anatomy
from hpr.errors import BudgetError

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(?:([KMG])(I?)B|%\s*BYTES)\s*", flags=re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_FILE_OVERHEAD = 64 * 1024  # header of a safetensors file and the one-element placeholders


@dataclass(frozen=True)
class Budget:
    """A limit on unique parameters. ``text`` is what the user wrote, ``parameters`` what it means for this model.

    >>> Budget("50%", 11_000_000)
    Budget(text='50%', parameters=11000000)
    """

    text: str
    parameters: int


def _checked(text: Any) -> str:
    """The text of a budget. Raises ``BudgetError`` for anything else: 0.5 may mean a half, or half a parameter."""
    if not isinstance(text, str):
        raise BudgetError(f"the budget is {text!r:.40}, a {type(text).__name__}: give a text such as '50%', '11M' or '8MB'")
    return text


def byte_limit(text: str, model_bytes: int) -> int | None:
    """The bytes that ``8MB``, ``8MiB`` or ``10%bytes`` allows, None for a budget in parameters (``50%``, ``11M``).

    ``model_bytes``: the size of the original checkpoint. Raises ``BudgetError`` for a limit of 0 bytes or above that size.

    >>> byte_limit("8MB", 90_900_000), byte_limit("10%bytes", 90_900_000), byte_limit("50%", 90_900_000)
    (8000000, 9090000, None)
    """
    match = _SIZE.fullmatch(_checked(text))
    if match is None:
        return None
    value, unit = float(match[1]), (match[2] or "").upper()
    scale = (1024 if match[3] else 1000) ** ("KMG".index(unit) + 1) if unit else model_bytes / 100
    limit = int(value * scale)
    if limit < 1 or limit > model_bytes:
        raise BudgetError(
            f"a budget of {text.strip()} is {limit:,} bytes, the original has {model_bytes:,}: give less, such as 10%bytes"
        )
    return limit


def parse_budget(text: str, anatomy: Anatomy, bytes_per_parameter: float, only: str | None = None) -> Budget:
    """Turn ``50%``, ``11M`` (parameters) or ``45MB`` (on disk) into a limit on unique parameters.

    A percentage counts all unique parameters, embeddings included. With ``only`` it counts the weights of the selected sites,
    and all other parameters are added. ``11B`` is 11 billion parameters, ``11KB`` is 11,000 bytes, ``11KiB`` is 11,264 bytes.
    ``bytes_per_parameter`` is what the model stores (see ``anatomy.lookup.bytes_per_parameter``): 45 MB of bfloat16 hold twice
    as many parameters as 45 MB of float32. Raises ``BudgetError`` for a text that is not a budget and for a budget above the
    model's size.

    >>> anatomy = describe(model)  # 22,713,216 parameters in float32
    >>> parse_budget("50%", anatomy, bytes_per_parameter(model))
    Budget(text='50%', parameters=11356608)
    >>> parse_budget("45MB", anatomy, bytes_per_parameter(model))
    Budget(text='45MB', parameters=11233616)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[KMGB]?|[KMG]i?B)\s*", _checked(text), flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise BudgetError(f"{text!r} is no budget: write a share (50%), parameters (11M) or a size on disk (45MB)")
    value, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if value > 100:
            raise BudgetError(f"a budget of {text} is more than the model has: give at most 100%")
        selected = sum(site.parameters for site in anatomy.select(only))
        whole = anatomy.total_parameters if only is None else selected
        limit = int(whole * value / 100) + (anatomy.total_parameters - whole)
    elif unit[0:1] in ("K", "M", "G") and unit.endswith("B"):
        size = value * (1024 if "I" in unit else 1000) ** ("KMG".index(unit[0]) + 1)
        limit = int((size - _FILE_OVERHEAD) // bytes_per_parameter)
    else:
        limit = int(value * _UNITS[unit])
        if not unit and value <= 100:
            mend = f"for a share of the model write {100 * value if value < 1 else value:g}%"
            raise BudgetError(f"a budget of {text} is {text.strip()} parameters, less than a model can have: {mend}")
    if limit > anatomy.total_parameters:
        raise BudgetError(
            f"a budget of {text} is {limit:,} parameters, more than the {anatomy.total_parameters:,} that the model has: "
            f"give at most 100%"
        )
    return Budget(text.strip(), max(0, limit))
