"""Versions of libraries and peak memory of the process."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("hpr", "torch", "transformers")}}


def peak_memory() -> int:
    """The peak resident memory of this process since its start, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
