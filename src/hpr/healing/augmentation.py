"""Inputs changed at random: a small calibration set overfits, and the teacher labels whatever the student is shown.

Tokens are replaced by any of the vocabulary, so that the whole table learns and not only the words of the text. Recordings
and images are mixed (mixup, Zhang et al. 2018), shifted along their longest axis (time, for spectra) and made noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpr.runtime.batch import Batch

Augmentation = Callable[[Batch, torch.Generator], Batch]
REPLACED = 0.15  # share of the tokens of an example, in the mean
SHIFTED = 0.1  # of the length, at most, to either side
NOISE = 0.2  # of the standard deviation of a batch, at most


def augmentation(vocabulary: Sequence[int] = (), replaced: float = REPLACED) -> Augmentation:
    """How to change a batch of tokens or of numbers. ``vocabulary``: ids to put in, none for no change to tokens.

    Of numbers the first input is varied; labels stay as they are, since decoders read them.
    """
    allowed = torch.tensor(sorted(vocabulary), dtype=torch.long)

    def changed(batch: Batch, draw: torch.Generator) -> Batch:
        if "input_ids" in batch:
            if not len(allowed):
                return batch
            return {**batch, "input_ids": replace_tokens(batch["input_ids"], allowed, replaced, draw)}
        numbers = [key for key, value in batch.items() if value.is_floating_point() and value.dim() > 1 and key != "labels"]
        return {key: vary(value, draw) if key == numbers[0] else value for key, value in batch.items()} if numbers else batch

    return changed


def replace_tokens(ids: Tensor, allowed: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """``ids`` (B, T) with some of the ``allowed`` tokens replaced by others of them; how many differs between examples."""
    rate = 2 * share * torch.rand(len(ids), 1, generator=draw)
    chosen = (torch.rand(ids.shape, generator=draw) < rate) & torch.isin(ids, allowed)
    return torch.where(chosen, allowed[torch.randint(len(allowed), ids.shape, generator=draw)], ids)


def vary(values: Tensor, draw: torch.Generator) -> Tensor:
    """(B, …) mixed with one another, shifted along the longest axis and made noisy, each example in its own measure."""
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
