"""Random changes to inputs: a small data set overfits, and the teacher can label any input that the student is shown.

Recordings and images are mixed (mixup, Zhang et al. 2018), shifted along their longest axis (time, for spectra) and made noisy.
Tokens stay as they are: answers to random tokens cost more than they teach (``docs/experiments.md``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpr.runtime.batch import Batch

Augmentation = Callable[[Batch, torch.Generator], Batch]
SHIFTED = 0.1  # largest shift to either side, relative to the length
NOISE = 0.2  # largest noise, in standard deviations of a batch


def augmentation() -> Augmentation:
    """Return a function ``change(batch, generator)`` that varies the first floating-point input of a batch.

    Tokens and labels stay as they are.

    >>> change = augmentation()
    >>> change({"pixel_values": torch.randn(4, 3, 8, 8)}, torch.Generator())["pixel_values"].shape
    torch.Size([4, 3, 8, 8])
    """

    def changed(batch: Batch, draw: torch.Generator) -> Batch:
        if "input_ids" in batch:
            return batch
        numbers = [key for key, value in batch.items() if value.is_floating_point() and value.dim() > 1 and key != "labels"]
        return {key: vary(value, draw) if key == numbers[0] else value for key, value in batch.items()} if numbers else batch

    return changed


def vary(values: Tensor, draw: torch.Generator) -> Tensor:
    """Return (B, …) mixed with one another, shifted along the longest axis and made noisy, each example by its own amount."""
    count, sides = len(values), (1,) * (values.dim() - 1)
    share = 0.5 * torch.rand(count, *sides, generator=draw)
    made = (1 - share) * values + share * values[torch.randperm(count, generator=draw)]
    if values.dim() > 2:
        axis = max(range(values.dim() - 1), key=values.shape[1:].__getitem__)
        most = int(SHIFTED * values.shape[1 + axis])
        places = torch.randint(-most, most + 1, (count,), generator=draw).tolist()
        made = torch.stack([row.roll(place, axis) for row, place in zip(made, places, strict=True)])
    noise = NOISE * values.std() * torch.rand(count, *sides, generator=draw)
    return made + noise * torch.randn(values.shape, generator=draw)
