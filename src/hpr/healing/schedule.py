"""Which batch stands at which step: fixed by a seed, so that a run which is resumed goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import send_to_device
from torch.utils.data import Dataset

from hpr.data.sources import fractions, named
from hpr.errors import HprError
from hpr.healing.augmentation import Augmentation
from hpr.runtime.batch import Batch, examples_in


class Schedule(Dataset):
    """The batches of a whole run, ``length`` of them, each epoch in an order of its own.

    ``batches``: prepared ones, or several sources of them by name with ``shares`` of the steps (in proportion; all alike
    without). Where all examples of a source have one shape they are dealt into batches anew in every epoch; texts stay
    with those of like length. Item ``i`` depends on the seed and on ``i`` alone, augmentation included.
    """

    def __init__(
        self,
        batches: Sequence[Batch] | Mapping[str, Sequence[Batch]],
        length: int,
        seed: int = 0,
        augment: Augmentation | None = None,
        shares: Mapping[str, float] | None = None,
    ):
        sources = named(batches)
        for name, source in sources.items():
            if not len(source):
                raise HprError(f"there are no batches in {name!r}: at least one is needed")
        weights = torch.tensor(list(fractions(sources, shares).values()), dtype=torch.float64)
        self.length, self.seed, self.augment = length, seed, augment
        self.sources = list(sources.values())
        self.pools = [pooled(source) for source in self.sources]
        draw = torch.Generator().manual_seed(seed % 2**63)
        self.chosen = torch.multinomial(weights, max(length, 1), replacement=True, generator=draw)
        self.turns = torch.zeros(len(self.chosen), dtype=torch.long)  # how often a source was drawn before
        for number in range(len(self.sources)):
            places = torch.eq(self.chosen, number)
            self.turns[places] = torch.arange(int(places.sum()))

    @property
    def repeats(self) -> bool:
        """Whether batches come back as they were."""
        same = self.augment is None and all(pool is None for pool in self.pools)
        return same and self.length > sum(len(source) for source in self.sources)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> Batch:
        source = int(self.chosen[step])
        batches, pool = self.sources[source], self.pools[source]
        epoch, place = divmod(int(self.turns[step]), len(batches))
        draw = _draw(self.seed, source, epoch)
        if pool is None:
            batch = batches[int(torch.randperm(len(batches), generator=draw)[place])]
        else:
            rows = torch.randperm(examples_in(pool), generator=draw).tensor_split(len(batches))[place]
            batch = {name: value[rows] for name, value in pool.items()}
        batch = send_to_device(batch, "cpu")  # random numbers are drawn there
        return batch if self.augment is None else self.augment(batch, _draw(self.seed, -1, step))


def pooled(batches: Sequence[Batch]) -> Batch | None:
    """All examples in one batch, where they have the same inputs of the same shapes; else None."""
    shapes = [{name: value.shape[1:] for name, value in batch.items()} for batch in batches]
    if any(shape != shapes[0] for shape in shapes):
        return None
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _draw(seed: int, kind: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + kind + 1) * 1_000_003 + number) % 2**63)
