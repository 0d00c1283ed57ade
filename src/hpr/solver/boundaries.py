"""Boundary probabilities of a semi-Markov CRF over groups of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hpr.errors import HprError
from hpr.solver.candidates import Table, Track, tabulate
from hpr.solver.lattice import _uncovered


@dataclass(frozen=True, eq=False)
class Boundaries:
    """How sure a segmentation is. ``probabilities[i - 1]`` is that of a group boundary before position i = 1 … length - 1.

    ``entropy`` (nats) is that of the distribution over structures: segmentation and operators, the subtracks' included.
    ``subtracks`` holds the probabilities of every subtrack by name; a cut of the parent cuts its subtracks too.
    """

    probabilities: np.ndarray
    entropy: float
    subtracks: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Logs:
    """Log partition functions of every interval; matrices as in ``Costs``, ``before_own`` its mirror image in time."""

    table: Table
    own: np.ndarray
    inner: dict[tuple[int, int], np.ndarray]  # interval → probability of each cut inside it, where a composite may fill it
    alone: np.ndarray
    after_own: np.ndarray
    after_alone: np.ndarray
    before_own: np.ndarray
    any: np.ndarray
    entropy: np.ndarray  # of any path, nats
    sublogs: tuple[_Logs, ...]


def boundaries(track: Track, multiplier: float, temperature: float) -> Boundaries:
    """Boundary probabilities and entropy of the semi-Markov CRF (Sarawagi & Cohen 2004) that belongs to a multiplier.

    A structure weighs exp(-cost / temperature), its cost the sum over groups of the least damage + multiplier · parameters
    among the ranks. ``multiplier`` is in nats per parameter, ``temperature`` in nats: the spread of measured around predicted
    damage. Raises ``HprError`` for a temperature that is not positive and for a track that cannot be covered.
    """
    if not (temperature > 0 and np.isfinite(temperature) and multiplier >= 0 and np.isfinite(multiplier)):
        raise HprError(f"temperature {temperature} must be above 0, multiplier {multiplier} from 0 up, and both finite")
    logs = _inside(tabulate(track), multiplier, temperature)
    if not np.isfinite(logs.any[0, -1]):
        raise _uncovered(track, np.isfinite(logs.any[0]))
    weight = np.zeros_like(logs.any)
    weight[0, -1] = 1.0
    found: dict[str, np.ndarray] = {}
    _outside(logs, weight, np.zeros(track.length + 1), found)
    probabilities = found.pop(track.name)
    return Boundaries(probabilities, float(logs.entropy[0, -1]), found)


def _inside(table: Table, multiplier: float, temperature: float) -> _Logs:
    sublogs = tuple(_inside(subtable, multiplier, temperature) for subtable in table.subtables)
    length = table.track.length
    shape = (length + 1, length + 1)
    own, alone, after_own, after_alone, before_own, any_ = np.full((6, *shape), -np.inf)
    own_h, alone_h, after_own_h, entropy = np.zeros((4, *shape))
    inner = {}
    if table.candidates:
        prices = np.minimum.reduceat(table.damages + multiplier * table.parameters, table.first_points[:-1])
        for number, (start, stop) in enumerate(table.intervals):
            logits = -prices[table.intervals_of == number] / temperature
            own[start, stop], own_h[start, stop] = _mix(logits, np.zeros_like(logits))
            several = table.track.candidates[start, stop]
            if any(one.partition for one in several):
                cuts = [np.diff(one.partition or [0] * (stop - start)) != 0 for one in several]
                inner[start, stop] = np.exp(logits - own[start, stop]) @ np.array(cuts)
    if sublogs:
        alone = np.sum([logs.any for logs in sublogs], axis=0)
        alone_h = np.sum([logs.entropy for logs in sublogs], axis=0)
    for matrix in (after_own, before_own, any_):
        np.fill_diagonal(matrix, 0.0)
    for stop in range(1, length + 1):
        rows = (slice(stop), slice(stop))  # (start, last cut), mixed over the last cut
        after_own[:stop, stop], after_own_h[:stop, stop] = _mix(
            any_[rows] + own[:stop, stop], entropy[rows] + own_h[:stop, stop]
        )
        after_alone[:stop, stop], last_h = _mix(after_own[rows] + alone[:stop, stop], after_own_h[rows] + alone_h[:stop, stop])
        any_[:stop, stop], entropy[:stop, stop] = _mix(
            np.stack([after_own[:stop, stop], after_alone[:stop, stop]], -1), np.stack([after_own_h[:stop, stop], last_h], -1)
        )
    for start in range(length):
        before_own[start, start + 1 :] = np.logaddexp.reduce(own[start, :, None] + any_[:, start + 1 :], axis=0)
    return _Logs(table, own, inner, alone, after_own, after_alone, before_own, any_, entropy, sublogs)


def _mix(logs: np.ndarray, entropies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the sum of exp(logs) over the last axis, and the entropy of the mixture of parts with these entropies."""
    total = np.logaddexp.reduce(logs, axis=-1)
    possible = np.isfinite(logs)
    surprise = np.where(possible, np.where(np.isfinite(total), total, 0.0)[..., None] - np.where(possible, logs, 0.0), 0.0)
    return total, (np.where(possible, np.exp(-surprise), 0.0) * (entropies + surprise)).sum(axis=-1)


def _outside(logs: _Logs, weight: np.ndarray, cuts: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Boundary probabilities where this track is solved on exactly [i, j) with probability ``weight[i, j]``.

    ``cuts`` (length + 1,) are the probabilities of boundaries that the parent alone accounts for.
    """
    cuts, below = cuts.copy(), np.zeros_like(weight)
    for start, stop in np.argwhere(weight > 0):
        inner = slice(start, stop + 1)
        share, total = weight[start, stop], logs.any[start, stop]
        left_own, left_alone = logs.after_own[start, inner], logs.after_alone[start, inner]
        right_any, right_own = logs.any[inner, stop], logs.before_own[inner, stop]
        here = np.logaddexp(left_own + right_any, left_alone + right_own)
        cuts[start + 1 : stop] += share * np.exp(here - total)[1:-1]
        for (first, last), chances in logs.inner.items():
            if start <= first and last <= stop:
                filled = logs.any[start, first] + logs.own[first, last] + logs.any[last, stop]
                cuts[first + 1 : last] += share * np.exp(filled - total) * chances
        below[inner, inner] += share * np.exp(left_own[:, None] + logs.alone[inner, inner] + right_own - total)
    found[logs.table.track.name] = cuts[1:-1]
    for sublogs in logs.sublogs:
        _outside(sublogs, below, cuts, found)
