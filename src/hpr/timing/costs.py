"""The cost of every way to store a weight, in the time or the operations of one call, and of what no plan changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from hpr.plans.terms import Entry, Term
from hpr.runtime.batch import Batch


@dataclass(frozen=True, eq=False)
class Reading:
    """What one module that reads a weight costs per call. ``looks_up``: it reads rows of a table, not all of them.

    ``dense``: with the whole weight. ``thin[r]``: with a product of rank r. ``falls_back``: it reads the whole weight where
    factors would cost more.
    """

    dense: float
    thin: np.ndarray  # (full rank + 1,)
    looks_up: bool
    falls_back: bool


@dataclass(frozen=True, eq=False)
class SiteCost:
    """What a site of shape (out, in) costs per call, at all modules that read its weight."""

    out_features: int
    in_features: int
    readings: tuple[Reading, ...]

    @property
    def dense(self) -> float:
        return sum(reading.dense for reading in self.readings)

    @property
    def least(self) -> float:
        """With whichever costs least: the whole weight, or factors of rank 1."""
        return sum(min(reading.dense, reading.thin[1]) for reading in self.readings)

    def of(self, terms: Sequence[Term]) -> float:
        """The cost with these terms; without terms the weight is whole."""
        return sum(self._reading(reading, terms) for reading in self.readings) if terms else self.dense

    def _reading(self, reading: Reading, terms: Sequence[Term]) -> float:
        total = 0.0
        for term in terms:
            start, stop = term.rows or (0, self.out_features)
            rows = stop - start
            if term.rank is None:
                total += reading.dense * rows / self.out_features
            elif reading.looks_up:
                total += float(reading.thin[term.rank])
            else:
                part = (rows + self.in_features) / (self.out_features + self.in_features)
                total += float(reading.thin[term.rank]) * part
        return min(total, reading.dense) if reading.falls_back else total


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of one call of a model with ``batch``. ``unit``: ms or operations.

    ``outside``: what is no product with a site's weight (attention, norms, activations), ``sites``: the rest, by site.
    ``positions``: how many vectors most sites see. ``beside``: measures ``outside`` for a changed copy of the model;
    ``share_of``: measures the cost of a changed copy as a share of the model's.
    """

    unit: str
    outside: float
    sites: Mapping[str, SiteCost]
    positions: int
    batch: Batch
    beside: Callable[[nn.Module], float]
    share_of: Callable[[nn.Module], float]

    @cached_property
    def total(self) -> float:
        """The cost of the model as it is."""
        return self.outside + sum(site.dense for site in self.sites.values())

    def of(self, site: str, terms: Sequence[Term]) -> float:
        """The cost of a site with these terms; 0 for experts and others that no plan makes cheaper."""
        return self.sites[site].of(terms) if site in self.sites else 0.0

    def predicted(self, entries: Mapping[str, Entry], gone: Sequence[str], outside: float | None = None) -> float:
        """The share of the original's cost that a plan with these entries has; the sites ``gone`` do not run."""
        left = sum(self.of(name, entry.terms) for name, entry in entries.items() if name not in set(gone))
        return ((self.outside if outside is None else outside) + left) / self.total
