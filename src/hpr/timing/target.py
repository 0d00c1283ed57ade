"""What a user asks of speed: ``0.7x`` of the original's time or operations, for calls of ``1x128`` positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hpr.errors import BudgetError

LATENCY = "latency"
FLOPS = "flops"


@dataclass(frozen=True)
class Target:
    """A share of the original's time (``kind`` latency) or operations (flops), for calls of ``examples`` x ``tokens``.

    >>> Target("latency", "0.7x", "1x128").share
    0.7
    """

    kind: str
    text: str
    shape: str

    def __post_init__(self) -> None:
        _share(self.kind, self.text)
        _sizes(self.shape)

    @property
    def share(self) -> float:
        return _share(self.kind, self.text)

    @property
    def examples(self) -> int:
        return _sizes(self.shape)[0]

    @property
    def tokens(self) -> int:
        return _sizes(self.shape)[1]


def _share(kind: str, text: Any) -> float:
    """The number in ``0.7x`` or ``70%``. Raises ``BudgetError`` for other texts, and for shares above 1 or of 0."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(x|×|%)\s*", text, flags=re.IGNORECASE) if isinstance(text, str) else None
    if match is None:
        raise BudgetError(f"{kind} is {text!r:.40}: give a share of the original's, such as 0.7x")
    share = float(match[1]) / (100 if match[2] == "%" else 1)
    if not 0 < share <= 1:
        raise BudgetError(f"{kind} is {text}, but a smaller model is no slower than its original: give a share up to 1x")
    return share


def _sizes(text: Any) -> tuple[int, int]:
    """The numbers in ``1x128``. Raises ``BudgetError`` for other texts and for 0."""
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*[x×]\s*([0-9]{1,7})\s*", text) if isinstance(text, str) else None
    if match is None or not int(match[1]) or not int(match[2]):
        raise BudgetError(f"shape is {text!r:.40}: give examples and tokens of a typical call, such as 1x128 or 32x128")
    return int(match[1]), int(match[2])
