"""Combines several sources of data, each with a name and a share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hpr.data.batches import Batches
from hpr.data.tables import Column
from hpr.errors import DataError
from hpr.runtime.batch import examples_in


@dataclass(frozen=True)
class Mixture:
    """Several sources of data, each with a name and a share. Every function that takes data takes a mixture.

    Shares count in proportion to each other: 3 and 1 mean the same as 75 and 25. HPR divides limits on examples and training
    steps by them. Raises ``DataError`` if a share is not above 0, or if there is not one share for each source.

    >>> Mixture({"news": "news.txt", "talk": "talk.txt"}, {"news": 3, "talk": 1}).fractions()
    {'news': 0.75, 'talk': 0.25}
    """

    files: Mapping[str, Any]
    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        self.fractions()

    def fractions(self) -> dict[str, float]:
        """The share of each source as a fraction of 1, by name."""
        return fractions(self.files, self.shares)


@dataclass(frozen=True)
class Columns:
    """Data with columns, and which of them hold the texts and the labels. Every function that takes data takes it.

    ``data`` is a file with a table, a ``datasets.Dataset``, an Arrow table, a data frame or a list of objects. ``column`` and
    ``label`` are names of columns, or their numbers from 0; without them the usual names count, such as ``text`` and
    ``label``. For an ``.npz`` file ``column`` names the array.

    >>> Columns("reviews.csv", column="review", label="stars")
    Columns(data='reviews.csv', column='review', label='stars')
    """

    data: Any
    column: Column = None
    label: Column = None


def sources_of(data: Any) -> tuple[dict[str, Any], Mapping[str, float] | None]:
    """The sources of data by name, and their shares; the shares are None unless the data is a ``Mixture``."""
    return (dict(data.files), data.shares) if isinstance(data, Mixture) else (named(data), None)


def with_shares(data: Any) -> dict[str, tuple[Any, float]]:
    """The sources of data by name, each with its share as a fraction of 1."""
    sources, shares = sources_of(data)
    parts = fractions(sources, shares)
    return {name: (source, parts[name]) for name, source in sources.items()}


def named(data: Any) -> dict[str, Any]:
    """A mapping of sources unchanged as a dictionary; any other data as one source with the name ``data``.

    Raises ``DataError`` for an empty mapping.
    """
    if isinstance(data, Mapping) and not data:
        raise DataError("data is a mapping without a source: give at least one")
    return dict(data) if isinstance(data, Mapping) else {"data": data}


def fractions(names: Collection[str], shares: Mapping[str, float] | None) -> dict[str, float]:
    """The shares as fractions of 1, by name; equal fractions without ``shares``.

    Raises ``DataError`` if a share is not above 0 or not finite, or if there is not one share for each name.
    """
    shares = dict(shares or dict.fromkeys(names, 1.0))
    if set(shares) != set(names) or not all(0 < share < math.inf for share in shares.values()):
        raise DataError(f"shares {shares} must be above 0, one for each of {', '.join(names)}: correct the shares")
    return {name: shares[name] / sum(shares.values()) for name in names}


def interleaved(parts: Sequence[Batches]) -> Batches:
    """The batches of several sources in one list, in which the batches of each source are evenly spread.

    ``order`` numbers the examples of the first source, then those of the second source, and so on.
    """
    if len(parts) == 1:
        return parts[0]
    before = accumulate((len(part.order) for part in parts[:-1]), initial=0)
    placed = []
    for number, (part, offset) in enumerate(zip(parts, before, strict=True)):
        start = 0
        for place, batch in enumerate(part):
            stop = start + examples_in(batch)
            placed.append(((place + 0.5) / len(part), number, batch, [offset + row for row in part.order[start:stop]]))
            start = stop
    placed.sort(key=lambda entry: entry[:2])
    return Batches([batch for _, _, batch, _ in placed], [row for *_, rows in placed for row in rows])
