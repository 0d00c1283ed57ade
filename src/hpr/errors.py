"""Errors that a user can mend. Each message names the value, the limit and what to do."""

from __future__ import annotations

import numbers
import types
import typing
from typing import Any

import numpy as np


class HprError(ValueError):
    """The base class: bad input of any kind. The command line prints the message and exits with code 2."""


class BudgetError(HprError):
    """A budget that cannot be read, or that no plan can meet."""


class PlanError(HprError):
    """A plan that contradicts itself or does not fit its model."""


class DataError(HprError):
    """Data that cannot be read, or that the model cannot take."""


class CheckpointError(HprError):
    """A folder or file that is not what it should be, or that must not be written."""


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], mend: str) -> None:
    """Raise ``HprError`` if an argument is of another type than a function takes; ``mend`` says what to give."""
    if not isinstance(value, kind):
        raise HprError(f"{name} is of type {type(value).__name__}: give {mend}")


def check_settings(settings: Any) -> None:
    """Raise ``HprError`` if a field of a dataclass is of another type than it declares, so that its own checks can compare it.

    Fields of types that are no classes (a ``Literal``, a function) are left to those checks.
    """
    try:
        hints = typing.get_type_hints(type(settings))
    except NameError:  # a class of one's own whose types are not to be found here
        return
    for name, hint in hints.items():
        kinds, value = _kinds(hint), getattr(settings, name)
        if kinds and (not isinstance(value, _allowed(kinds)) or (isinstance(value, bool) and bool not in kinds)):
            known = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            kind = type(settings).__name__
            raise HprError(f"{name} of {kind} is {value!r:.60}, of type {type(value).__name__}: give {known}")


def _allowed(kinds: tuple[type, ...]) -> tuple[type, ...]:
    """The same and their kin: numbers of numpy are integers and reals."""
    more = {int: numbers.Integral, float: numbers.Real, bool: np.bool_}
    return (*kinds, *(more[kind] for kind in kinds if kind in more))


def _kinds(hint: Any) -> tuple[type, ...]:
    """The classes whose instances a type hint allows; empty if one of its alternatives is no class."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(one) or one for one in (typing.get_args(hint) if union else (hint,))]
    if not all(isinstance(kind, type) for kind in kinds):
        return ()
    return (*kinds, *((int,) if float in kinds else ()), *((list,) if tuple in kinds else ()))
