"""Import the public names of a package when a program first uses them, so that ``import`` of the package stays fast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package, which import a name when it is first used (PEP 562).

    ``package``: the ``__name__`` of the package. ``homes``: name → the module that defines it; ``modules``: name → the module
    that the name stands for. ``__getattr__`` raises ``AttributeError`` for any other name.

    >>> __getattr__, __dir__ = lazy_names(__name__, {"Plan": "hpr.plans.plan"}, {"presets": "hpr.planning.presets"})
    """
    modules = modules or {}

    def get(name: str) -> Any:
        if name in modules:
            value: Any = import_module(modules[name])
        elif name in homes:
            value = getattr(import_module(homes[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next use finds the name without this function
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *modules})

    return get, names
