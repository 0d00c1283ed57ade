"""Random tracks, and the structures over a track by enumeration."""

import itertools

from hpr.solver.candidates import Candidate, Choice, Track, solution, tabulate
from hpr.solver.composite import compose
from hpr.solver.lattice import least_costs, trace


def curve(rng, operator, sites, sizes, scale, most=3):
    count = int(rng.integers(1, most + 1))
    parameters = rng.integers(1, max(2, sizes), count)
    damages = scale * rng.exponential(size=count) * (rng.random(count) < 0.9)
    return Candidate(operator, sites, tuple((int(rank),) for rank in range(1, count + 1)), parameters, damages)


def random_track(rng, name, length, scale=1.0, most=3, density=0.6):
    """Keep on every position, low rank on some, shared candidates on some intervals."""
    candidates = {}
    for start, stop in itertools.combinations(range(length + 1), 2):
        sites = tuple(f"{name}.{i}" for i in range(start, stop))
        own = [Candidate("keep", sites, ((),), [20], [0.0])] if stop - start == 1 else []
        names = ["lowrank"] if stop - start == 1 else ["tie", "basis"]
        own += [curve(rng, one, sites, 15 * len(sites), scale, most) for one in names if rng.random() < density]
        if own:
            candidates[start, stop] = tuple(own)
    if length > 2 and rng.random() < density:
        candidates[0, length] = (*candidates.get((0, length), ()), random_cycle(rng, name, length, candidates, scale, most))
    return Track(name, length, candidates)


def random_cycle(rng, name, length, candidates, scale, most):
    """Every other position in one group: shared by an operator of its own, or each position alone."""
    partition = [index % 2 for index in range(length)]
    parts = []
    for group in range(2):
        members = [index for index in range(length) if partition[index] == group]
        options = [candidates[index, index + 1] for index in members]
        if len(members) > 1:
            shared = curve(rng, "basis", tuple(f"{name}.{i}" for i in members), 15 * len(members), scale, most)
            options = [(shared, compose("alone", range(len(members)), options))]
        parts += options
    return compose("cycle", partition, parts)


def cheapest_at(tracks, multiplier):
    """The least damage + multiplier · parameters, by the lattice."""
    points = [point for track in tracks for point in trace(least_costs(tabulate(track), 1.0, multiplier))]
    owners = [int(table.owners[point]) for table, point in points]
    return solution(
        Choice(table.candidates[owner], int(point - table.first_points[owner]))
        for (table, point), owner in zip(points, owners, strict=True)
    )


def every_structure(track, multiplier):
    """Test-only enumeration, written another way: (cost, set of starts of groups) of every structure."""
    for mask in itertools.product([False, True], repeat=track.length - 1):
        cuts = [0, *(1 + i for i, cut in enumerate(mask) if cut), track.length]
        options = []
        for arc in itertools.pairwise(cuts):
            options.append(
                [
                    (float((one.damages + multiplier * one.parameters).min()), starts_inside(one, arc[0]))
                    for one in track.candidates.get(arc, ())
                ]
            )
        for chosen in itertools.product(*options):
            starts = set(cuts[:-1]).union(*(inner for _, inner in chosen))
            yield sum(cost for cost, _ in chosen), starts


def starts_inside(one, start):
    """Where a composite on [start, …) starts new groups."""
    return {start + 1 + i for i, (a, b) in enumerate(itertools.pairwise(one.partition)) if a != b}
