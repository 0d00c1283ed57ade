"""What codes cost in bits, as a function of latents that a gradient can follow.

The price of a whole number is its information in the bucket of its expected size: the buckets and the frequencies are those of
the coder (``hpr.coding.stream``), from the codes as they are. Between whole numbers the price is interpolated. Both signs of a
number cost the same, and a larger number never costs less than a smaller one, so rare codes do not bend the slope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpr.coding.codes import Codes, Product, part_names, parts_of
from hpr.coding.layout import LARGEST, SMALLEST
from hpr.coding.stream import bucket_of_each, choice_of, plain_bits
from hpr.nn.coded import in_pack

_FAR = 255  # larger codes cost what this one does
_SEEN = 0.5  # is added to every count, since a code that does not occur yet may occur later


class Price:
    """The price of the codes of several weights that share one stream. ``bits``: what they take now."""

    def __init__(self, weights: Sequence[Codes]):
        choice = choice_of(weights)
        each = bucket_of_each(choice.layouts, choice.sized)
        self.bits = choice.bits
        self._table = torch.from_numpy(_table(each, choice.values))
        shapes = [codes.values.shape for codes in weights]
        parts = np.split(each, np.cumsum([height * width for height, width in shapes])[:-1])
        self._buckets = [torch.from_numpy(part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True)]
        self._centres = [layout.centre for layout in choice.layouts]
        self._weights = weights

    def __call__(self, latents: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, ""]:
        """The bits of the stream for latents of the weights, with tables and sizes; its gradient is that of the codes alone."""
        return torch.stack([self.of(place, one).sum() for place, one in enumerate(latents)]).sum() + self._beside

    @cached_property
    def _beside(self) -> float:
        """The bits of the stream that are no codes: tables, and sizes of rows and columns."""
        now = (torch.from_numpy(codes.values).float() for codes in self._weights)
        return self.bits - sum(float(self.of(place, one).sum()) for place, one in enumerate(now))

    def of(self, place: int, latents: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The bits of every code of the weight with the number ``place``."""
        sizes, low, high = self._around(place, latents)
        return low + (sizes - sizes.detach().floor().clamp(max=_FAR)) * (high - low)

    def slope(self, place: int, latents: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The derivative of ``of``, in bits per step; 0 for a latent that is exactly 0."""
        _, low, high = self._around(place, latents)
        return (high - low) * (latents - self._centres[place]).sign()

    def _around(self, place: int, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sizes of the latents, and the prices of the whole numbers below and above them."""
        table = self._table.to(latents.device)
        sizes = (latents - self._centres[place]).abs()
        cells = sizes.detach().floor().clamp_(max=_FAR).long()
        cells += (self._buckets[place].to(latents.device).long() - SMALLEST) * table.shape[1]
        return sizes, table.flatten()[cells], table.flatten()[cells + 1]


def prices(codes: Mapping[str, Codes | Product]) -> list[tuple[list[str], Price]]:
    """The names of the parts in every stream of a file (``part_names``), and the price of their codes."""
    groups: list[dict[str, Codes]] = []
    together: dict[str, Codes] = {}
    for site, one in codes.items():
        parts = dict(zip(part_names(site, one), parts_of(one), strict=True))
        if in_pack(one.numbers):
            together |= parts
        else:
            groups.append(parts)
    groups += [together] if together else []
    return [(list(parts), Price(list(parts.values()))) for parts in groups]


def _table(buckets: Int[np.ndarray, " n"], values: Int[np.ndarray, " n"]) -> Float[np.ndarray, "buckets sizes"]:
    """The bits of a code by its bucket and its size, for sizes from 0 to one above the largest that counts."""
    count, width = LARGEST - SMALLEST + 1, 2 * _FAR + 1
    plain = np.array([plain_bits(bucket) for bucket in range(SMALLEST, LARGEST + 1)])
    cells = buckets.astype(np.int64) - SMALLEST
    symbols = np.clip(values >> plain[cells], -_FAR, _FAR) + _FAR
    counts = np.bincount(cells * width + symbols, minlength=count * width).reshape(count, width) + _SEEN
    sizes = np.arange(_FAR + 1) >> plain[:, None]
    mirrored = -np.arange(_FAR + 1) >> plain[:, None]
    both = np.take_along_axis(counts, sizes + _FAR, 1) + np.take_along_axis(counts, mirrored + _FAR, 1)
    bits = np.maximum.accumulate(plain[:, None] + 1 - np.log2(both / counts.sum(1, keepdims=True)), axis=1)
    return np.concatenate([bits, bits[:, -1:]], axis=1).astype(np.float32)
