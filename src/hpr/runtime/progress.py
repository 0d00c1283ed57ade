"""Progress of long functions: library code reports it, and a listener shows it.

Long functions call ``progress("curvature", done, total)``. The call does nothing unless the program has set a listener for this
thread or task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
_listener: ContextVar[Listener | None] = ContextVar("hpr_progress", default=None)


def progress(stage: str, done: int, total: int) -> None:
    """Tell the listener that ``done`` of ``total`` units of a stage are finished."""
    listener = _listener.get()
    if listener is not None:
        listener(stage, done, total)


@contextmanager
def reporting_to(listener: Listener) -> Iterator[None]:
    """Send progress to ``listener(stage, done, total)`` inside the ``with`` block.

    >>> with reporting_to(lambda stage, done, total: print(stage, done, total)):
    ...     progress("curvature", 1, 2)
    curvature 1 2
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
