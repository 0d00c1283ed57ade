"""Boundary probabilities: a semi-Markov CRF over the structures of a track."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpr.errors import HprError
from hpr.solver.candidates import Track, tabulate
from hpr.solver.lattice import uncovered

_EXACT = 1e-12  # a residual below this share of the measured damages is rounding


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


def fitted_temperature(predicted: Sequence[float], measured: Sequence[float], tracks: int) -> float | None:
    """The temperature (predicted nats) for ``boundaries``, from plans of a model that were run end to end.

    ``predicted`` and ``measured``: the damage of each plan in nats, (plans,) each; ``tracks``: how many tracks a plan covers.
    None for fewer than three plans, for a prediction that is exact up to one scale, and for one that is not positively related
    to what was measured. Raises ``HprError`` for unequal lengths, values that are not finite and ``tracks`` below 1.

    The model is measured = scale · (predicted + error), where the error is the sum of one independent error per track, each of
    standard deviation σ. Least squares gives the scale, and the residuals, with n - 1 degrees of freedom, have a standard
    deviation of scale · √tracks · σ. If the errors of the structures of a track follow a Gumbel distribution of scale τ, a
    structure is the best one after its error with a probability proportional to exp(-cost / τ) (McFadden 1974), which is what
    ``boundaries`` computes. Such errors have σ = τ π / √6. So τ = √6 / π · residual / (scale · √tracks).

    Plans that agree in most tracks have most of their errors in common. The scale absorbs these, and τ comes out too small.

    >>> round(fitted_temperature([1.0, 2.0, 3.0], [1.1, 1.9, 3.1], tracks=4), 4)
    0.0448
    """
    if len(predicted) != len(measured) or tracks < 1:
        raise HprError(
            f"{len(predicted)} predicted and {len(measured)} measured damages of plans with {tracks} tracks: "
            f"give one pair per plan and at least one track"
        )
    predictions, measurements = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if not (np.isfinite(predictions).all() and np.isfinite(measurements).all()):
        raise HprError("a predicted or measured damage is not a finite number: leave that plan out")
    if len(predictions) < 3 or not predictions @ measurements > 0:
        return None
    scale = (predictions @ measurements) / (predictions @ predictions)
    residual = math.sqrt(((measurements - scale * predictions) ** 2).sum() / (len(predictions) - 1))
    if residual <= _EXACT * np.abs(measurements).max():
        return None
    return math.sqrt(6) / math.pi * residual / (float(scale) * math.sqrt(tracks))


def boundary_probabilities(tracks: Iterable[Track], multiplier: float, temperature: float) -> dict[str, dict[str, Any]]:
    """Boundary probabilities and entropy of each track over several sites, as JSON values for ``metrics.json``.

    The keys are names of tracks, the values ``{"probabilities": [...], "entropy": nats}`` (see ``boundaries``, which also says
    what is raised). A track over the rows of one table has no layers to group and is left out.
    """
    by_track = {}
    for track in tracks:
        sites = {site for options in track.candidates.values() for candidate in options for site in candidate.sites}
        if len(sites) > 1:
            result = boundaries(track, multiplier, temperature)
            by_track[track.name] = {"probabilities": result.probabilities.tolist(), "entropy": result.entropy}
    return by_track
