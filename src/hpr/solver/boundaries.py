"""Boundary probabilities: a semi-Markov CRF over the structures of a track."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpr.errors import HprError
from hpr.solver.candidates import Track, tabulate
from hpr.solver.lattice import uncovered


@dataclass(frozen=True, eq=False)
class Boundaries:
    """How sure a segmentation is. ``probabilities[i - 1]`` is that of a group boundary before position i = 1 … length - 1.

    ``entropy`` (nats) is that of the distribution over structures: segmentation and operators.
    """

    probabilities: np.ndarray
    entropy: float


def boundaries(track: Track, multiplier: float, temperature: float) -> Boundaries:
    """Boundary probabilities and entropy of the semi-Markov CRF (Sarawagi & Cohen 2004) that belongs to a multiplier.

    The probability of a structure is proportional to exp(-cost / temperature). Its cost is the sum over its candidates of the
    least damage + multiplier · parameters among the ranks. ``multiplier`` is in nats per parameter, ``temperature`` in nats.
    Raises ``HprError`` for a temperature that is not positive and for a track that cannot be covered.

    A forward pass sums the weights of all paths to each cut; a backward pass visits the last arc of each path with its
    probability, then the arc before it, and so on. The entropy is the sum of the entropies of these choices (chain rule).
    """
    if not (temperature > 0 and np.isfinite(temperature) and multiplier >= 0 and np.isfinite(multiplier)):
        raise HprError(f"temperature {temperature} must be above 0, multiplier {multiplier} from 0 up, and both finite")
    table = tabulate(track)
    starts, stops = table.intervals[table.intervals_of].T
    costs = np.minimum.reduceat(table.damages + multiplier * table.parameters, table.first_points[:-1])
    logits = -costs / temperature  # (candidates,)
    arcs_to = [np.flatnonzero(stops == stop) for stop in range(track.length + 1)]
    totals = np.full(track.length + 1, -np.inf)  # log of the summed weight of all paths to a cut
    totals[0] = 0.0
    for stop in range(1, track.length + 1):
        arcs = arcs_to[stop]
        totals[stop] = np.logaddexp.reduce(totals[starts[arcs]] + logits[arcs])
    if not np.isfinite(totals[-1]):
        raise uncovered(track, np.isfinite(totals))
    reached = np.zeros(track.length + 1)  # probability that a path passes a cut
    reached[-1] = 1.0
    inside = np.zeros(track.length + 1)  # probability that a composite starts a group at a cut
    entropy = 0.0
    for stop in range(track.length, 0, -1):
        if reached[stop] == 0:
            continue
        for arc in arcs_to[stop]:
            start = starts[arc]
            surprise = totals[stop] - totals[start] - logits[arc]
            probability = reached[stop] * np.exp(-surprise)
            if probability > 0:
                entropy += probability * surprise
                reached[start] += probability
                if partition := table.candidates[arc].partition:
                    inside[start + 1 : stop] += probability * (np.diff(partition) != 0)
    return Boundaries((reached + inside)[1:-1], float(entropy))
