"""Solutions by enumeration of everything, to compare the solver with."""

from collections.abc import Iterator, Sequence

import numpy as np

from hpr.solver.candidates import Choice, Solution, Track, impossible, solution


def exhaustive_at(tracks: Sequence[Track], multiplier: float) -> Solution:
    """The least damage + multiplier · parameters by enumeration. Exponential in everything."""
    best = [
        min(_covers(track, track.length), key=lambda cover: sum(one.damage + multiplier * one.parameters for one in cover))
        for track in tracks
    ]
    return solution(choice for cover in best for choice in cover)


def exhaustive(tracks: Sequence[Track], limit: int) -> Solution:
    """The least damage within ``limit`` parameters by enumeration. Exponential in everything."""
    covers = [list(_covers(track, track.length)) for track in tracks]
    damages, parameters = np.zeros(()), np.zeros((), np.int64)
    for several in covers:
        damages = np.add.outer(damages, [sum(one.damage for one in cover) for cover in several])
        parameters = np.add.outer(parameters, [sum(one.parameters for one in cover) for cover in several])
    if parameters.min() > limit:
        raise impossible(limit, int(parameters.min()))
    best = np.unravel_index(np.where(parameters <= limit, damages, np.inf).argmin(), damages.shape)
    return solution(choice for several, number in zip(covers, best, strict=True) for choice in several[number])


def _covers(track: Track, stop: int) -> Iterator[tuple[Choice, ...]]:
    """Every cover of the first ``stop`` positions, each once."""
    if stop == 0:
        yield ()
    for cut in range(stop):
        ends = [Choice(one, k) for one in track.candidates.get((cut, stop), ()) for k in range(len(one.choices))]
        if ends:
            yield from ((*head, end) for head in _covers(track, cut) for end in ends)
