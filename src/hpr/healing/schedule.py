"""Which batch comes at which step. The seed decides it, so a resumed run sees the same batches as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch.utils.data import Dataset

from hpr.data.sources import fractions
from hpr.errors import DataError
from hpr.healing.augmentation import Augmentation
from hpr.runtime.batch import Batch, examples_in


class Shown(NamedTuple):
    """A batch of the schedule. ``number``: its place among the batches of all sources; None if it was changed or dealt anew."""

    batch: Batch
    number: int | None


class Schedule(Dataset):
    """The batches of a whole run, ``length`` of them. Each epoch of a source has its own order.

    ``sources``: prepared batches by name. ``shares``: the fraction of steps for each source; equal by default. If all examples
    of a source have one shape, every epoch deals them into new batches; texts stay with texts of similar length. Item ``i``
    depends on the seed and on ``i`` alone, augmentation included.

    Raises ``DataError`` for a source without batches, and ``HprError`` for shares that do not fit the sources.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Batch]],
        length: int,
        seed: int = 0,
        augment: Augmentation | None = None,
        shares: Mapping[str, float] | None = None,
    ):
        for name, source in sources.items():
            if not len(source):
                raise DataError(f"there are no batches in {name!r}: at least one is needed")
        weights = torch.tensor(list(fractions(sources, shares).values()), dtype=torch.float64)
        self.length, self.seed, self.augment = length, seed, augment
        self.sources = list(sources.values())
        self.pools = [pooled(source) for source in self.sources]
        self.first = list(accumulate((len(source) for source in self.sources[:-1]), initial=0))
        draw = torch.Generator().manual_seed(seed % 2**63)
        self.chosen = torch.multinomial(weights, max(length, 1), replacement=True, generator=draw)
        self.drawn_before = torch.zeros(len(self.chosen), dtype=torch.long)  # how often the source of a step was drawn before
        for number in range(len(self.sources)):
            places = torch.eq(self.chosen, number)
            self.drawn_before[places] = torch.arange(int(places.sum()))

    @property
    def repeats(self) -> bool:
        """Whether the same batches come back unchanged."""
        same = self.augment is None and all(pool is None for pool in self.pools)
        return same and self.length > sum(len(source) for source in self.sources)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> Shown:
        source = int(self.chosen[step])
        batches, pool, number = self.sources[source], self.pools[source], None
        epoch, place = divmod(int(self.drawn_before[step]), len(batches))
        draw = _draw(self.seed, source, epoch)
        if pool is None:
            place = int(torch.randperm(len(batches), generator=draw)[place])
            batch, number = batches[place], self.first[source] + place
        else:
            rows = torch.randperm(examples_in(pool), generator=draw).tensor_split(len(batches))[place]
            batch = {name: value[rows] for name, value in pool.items()}
        batch = send_to_device(batch, "cpu")  # random numbers are drawn there
        return Shown(batch, number) if self.augment is None else Shown(self.augment(batch, _draw(self.seed, -1, step)), None)


def pooled(batches: Sequence[Batch]) -> Batch | None:
    """Return all examples in one batch if they have the same inputs of the same shapes; else None."""
    shapes = [{name: value.shape[1:] for name, value in batch.items()} for batch in batches]
    if any(shape != shapes[0] for shape in shapes):
        return None
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _draw(seed: int, kind: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + kind + 1) * 1_000_003 + number) % 2**63)
