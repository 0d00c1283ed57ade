"""A weight as a stream of bytes, with what it decodes to."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hpr.coding.codes import Codes, Product, joined, parts_of
from hpr.coding.stream import decode, encode


@dataclass(frozen=True)
class Coded:
    """A weight as a stream of bytes, and the numbers that the stream stands for."""

    stream: bytes

    @classmethod
    def of(cls, codes: Codes | Product) -> Coded:
        """The codes as a stream."""
        return cls(encode(parts_of(codes)))

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight in float32, decoded anew: a model keeps its streams, not a second copy of its weights."""
        return self.codes().weight()

    def codes(self) -> Codes | Product:
        """The codes, decoded anew."""
        return joined(decode(self.stream))
