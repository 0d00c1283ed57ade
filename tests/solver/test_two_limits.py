"""Limits on parameters and on a second cost, beside enumeration of everything."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracks import random_track

from hpr.errors import BudgetError
from hpr.solver import lagrangian, two_limits
from hpr.solver.candidates import Candidate, Track
from hpr.solver.composite import mapped

CLOSE = 1e-9


def priced_tracks(seed, composites=False):
    """Random tracks whose costs have little to do with their parameters."""
    rng = np.random.default_rng(seed)
    tracks = [random_track(rng, name, int(rng.integers(1, 4)), most=2) for name in "ab"[: rng.integers(1, 3)]]

    def change(candidate):
        return replace(candidate, costs=rng.uniform(0.1, 3.0, len(candidate.choices)) * len(candidate.sites))

    if not composites:
        tracks = [
            Track(
                one.name, one.length, {key: tuple(c for c in several if not c.parts) for key, several in one.candidates.items()}
            )
            for one in tracks
        ]
    return mapped(tracks, change)


def covers(track, stop):
    if stop == 0:
        yield 0.0, 0, 0.0
    for cut in range(stop):
        for one in track.candidates.get((cut, stop), ()):
            for damage, parameters, cost in zip(one.damages, one.parameters, one.costs, strict=True):
                for before in covers(track, cut):
                    yield before[0] + damage, before[1] + int(parameters), before[2] + cost


def everything(tracks):
    """(damage, parameters, cost) of every solution."""
    for several in itertools.product(*(list(covers(track, track.length)) for track in tracks)):
        yield tuple(map(sum, zip(*several, strict=True)))


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0, 1), speed=st.floats(0, 1))
def test_both_limits_are_kept_and_the_bound_holds(seed, size, speed):
    tracks = priced_tracks(seed)
    solutions = list(everything(tracks))
    least, most = min(one[1] for one in solutions), max(one[1] for one in solutions)
    limit = int(least + size * (most - least))
    costs = [one[2] for one in solutions if one[1] <= limit]
    ceiling = min(costs) + speed * (max(costs) - min(costs)) + 1e-9
    best = min(one[0] for one in solutions if one[1] <= limit and one[2] <= ceiling)
    try:
        found = two_limits.search(tracks, limit, lagrangian.BREADTH, ceiling)
    except BudgetError:  # the least cost within a limit on parameters is itself a search, with a gap on tiny instances
        assert two_limits.least_cost(tracks, limit) > ceiling
        return
    assert [one.damage for one in found] == sorted(one.damage for one in found)
    for one in found:
        assert one.parameters == sum(choice.parameters for choice in one.choices) <= limit
        assert one.cost == pytest.approx(sum(choice.candidate.costs[choice.index] for choice in one.choices))
        assert one.cost <= ceiling
    assert found[0].bound <= best * (1 + CLOSE) + CLOSE
    assert best <= found[0].damage * (1 + CLOSE) + CLOSE
    assert found[0].gap >= 0


def test_it_is_mostly_the_best_of_all():
    """On random instances with few choices, where a gap is largest: most answers are the best possible."""
    exact = total = refused = 0
    for seed in range(80):
        tracks = priced_tracks(seed)
        solutions = list(everything(tracks))
        limit = int(np.median([one[1] for one in solutions]))
        costs = [one[2] for one in solutions if one[1] <= limit]
        ceiling = float(np.quantile(costs, 0.4))
        best = min(one[0] for one in solutions if one[1] <= limit and one[2] <= ceiling)
        total += 1
        try:
            found = two_limits.search(tracks, limit, lagrangian.BREADTH, ceiling)[0]
        except BudgetError:
            refused += 1
            continue
        exact += found.damage <= best * (1 + CLOSE) + CLOSE
    assert refused <= 0.05 * total
    assert exact >= 0.9 * total


@pytest.mark.parametrize("seed", range(10))
def test_long_curves_leave_a_small_gap(seed):
    """Low rank at every rank beside keep, as models have it: the answer is within a few per cent of the bound."""
    rng = np.random.default_rng(seed)
    tracks = []
    for number in range(12):
        ranks = np.arange(1, 64)
        damages = rng.uniform(0.1, 2.0) * np.exp(-ranks / rng.uniform(5, 40))
        low = Candidate("low rank", (f"s{number}",), tuple((int(r),) for r in ranks), 128 * ranks, damages)
        keep = Candidate("keep", (f"s{number}",), ((),), [4096], [0.0], costs=np.array([rng.uniform(2, 6)]))
        priced = replace(low, costs=np.minimum(keep.costs[0], 0.2 + 0.1 * ranks))
        tracks.append(Track(f"s{number}", 1, {(0, 1): (keep, priced)}))
    dense = sum(track.candidates[0, 1][0].costs[0] for track in tracks)
    found = two_limits.search(tracks, 12 * 4000, lagrangian.BREADTH, 0.6 * dense)
    assert found[0].cost <= 0.6 * dense
    assert found[0].relative_gap < 0.05
    assert found[0].price > 0


@pytest.mark.parametrize("seed", range(20))
def test_composites_keep_both_limits(seed):
    tracks = priced_tracks(seed, composites=True)
    limit = sum(lagrangian.smallest(track) for track in tracks) + 10
    ceiling = 1.2 * two_limits.least_cost(tracks, limit)
    for one in two_limits.search(tracks, limit, lagrangian.BREADTH, ceiling):
        assert one.parameters <= limit
        assert sum(choice.candidate.costs[choice.index] for choice in one.choices) <= ceiling
        sites = [site for choice in one.choices for site in choice.candidate.sites]
        assert len(sites) == len(set(sites))


def test_a_generous_ceiling_changes_nothing():
    tracks = priced_tracks(3)
    limit = sum(lagrangian.smallest(track) for track in tracks) + 8
    free = lagrangian.solve(tracks, limit)
    found = two_limits.search(tracks, limit, lagrangian.BREADTH, 1e9)[0]
    assert found.damage == pytest.approx(free.damage)
    assert found.price == 0


def test_an_impossible_ceiling_is_refused():
    tracks = priced_tracks(3)
    limit = sum(lagrangian.smallest(track) for track in tracks) + 8
    with pytest.raises(BudgetError, match="least possible cost"):
        two_limits.search(tracks, limit, lagrangian.BREADTH, 1e-6)
