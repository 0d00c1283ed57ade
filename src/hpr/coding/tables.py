"""Probability tables that encoder and decoder compute alike on every machine: integers, a byte per symbol."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hpr.errors import CheckpointError

try:
    import constriction
except ImportError:  # no wheel for this platform
    constriction = None

_STEPS = 8  # a stored byte k is the probability 2^(−k / 8)
_ONE = 1 << 40
_ROOTS = [_ONE]  # 2^40 · 2^(−k / 8) in integers, so that no rounding of a library counts
for _ in range(_STEPS - 1):
    _ROOTS.append(_ROOTS[-1] * 1008256608221 // _ONE)  # 2^40 · 2^(−1 / 8)
_WEIGHTS = np.array([_ROOTS[k % _STEPS] >> (k // _STEPS) for k in range(256)], dtype=np.float64)


def ans() -> type:
    """The entropy coder. Raises ``CheckpointError`` if ``constriction`` is not installed."""
    if constriction is None:
        raise CheckpointError(
            "coded weights need the package constriction, which is not installed here: run `pip install constriction`, or "
            "convert the checkpoint to plain weights on a machine that has it"
        )
    coder: type = constriction.stream.stack.AnsCoder
    return coder


@dataclass(frozen=True, eq=False)
class Table:
    """Probabilities of the integers from ``first`` on, as one byte each: k stands for 2^(−k / 8)."""

    first: int
    bytes: Int[np.ndarray, " symbols"]

    @classmethod
    def of(cls, symbols: Int[np.ndarray, " n"]) -> Table:
        """The table of the frequencies of ``symbols``, which are not empty."""
        first = int(symbols.min())
        counts = np.bincount(symbols - first)
        with np.errstate(divide="ignore"):
            logs = np.rint(-_STEPS * np.log2(counts / len(symbols)))
        return cls(first, np.minimum(logs, 255).astype(np.uint8))

    @property
    def model(self) -> object:
        """The distribution, as the coder reads it, over symbols from 0 on."""
        ans()
        weights = _WEIGHTS[self.bytes] if len(self.bytes) > 1 else np.array([1.0, 2.0**-20])  # it wants two symbols
        return constriction.stream.model.Categorical(weights / weights.sum(), perfect=False)

    def encode(self, coder: object, symbols: Int[np.ndarray, " n"]) -> None:
        """Put ``symbols`` before everything that the coder has."""
        coder.encode_reverse((symbols - self.first).astype(np.int32), self.model)  # type: ignore[attr-defined]

    def decode(self, coder: object, count: int) -> Int[np.ndarray, " count"]:
        """Take ``count`` symbols off the coder."""
        symbols: np.ndarray = coder.decode(self.model, count) + self.first  # type: ignore[attr-defined]
        return symbols.astype(np.int32)


def uniform(bits: int) -> object:
    """The distribution of ``bits`` bits that are equally likely."""
    ans()
    return constriction.stream.model.Uniform(1 << bits)
