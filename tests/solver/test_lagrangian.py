import itertools

import numpy as np
import pytest
from oracle import exhaustive, exhaustive_at
from tracks import cheapest_at, every_structure, random_track

from hpr.errors import BudgetError, HprError
from hpr.solver.candidates import Candidate, Choice, Track, solution, tabulate
from hpr.solver.composite import restrict
from hpr.solver.lagrangian import k_best, plan_candidates, smallest, solve
from hpr.solver.lattice import least_costs, structures

CLOSE = 1e-9


def plain(track):
    """Without composites."""
    candidates = {interval: tuple(one for one in several if not one.parts) for interval, several in track.candidates.items()}
    return Track(track.name, track.length, candidates)


def random_tracks(seed):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-9, 10)
    return tuple(random_track(rng, name, int(rng.integers(1, 4)), scale, most=2) for name in "ab"[: rng.integers(1, 3)])


def limits(tracks):
    smallest = exhaustive_at(tracks, 1e30).parameters
    dense = exhaustive_at(tracks, 0.0).parameters
    return [smallest, *(int(smallest + share * (dense - smallest)) for share in (0.3, 0.6, 0.9)), dense + 7]


def sites_of(track):
    return {site for several in track.candidates.values() for one in several for site in one.sites}


def assert_covers(found, tracks):
    sites = [site for choice in found.choices for site in choice.candidate.sites]
    assert len(sites) == len(set(sites))
    assert set(sites) == set().union(*(sites_of(track) for track in tracks))
    assert found.damage == pytest.approx(sum(choice.damage for choice in found.choices))
    assert found.parameters == sum(choice.parameters for choice in found.choices)


@pytest.mark.parametrize("seed", range(240))
def test_a_fixed_multiplier_equals_enumeration(seed):
    tracks = random_tracks(seed)
    for multiplier in np.random.default_rng(seed).exponential(size=3) * exhaustive_at(tracks, 1e30).damage / 50:
        expected, found = exhaustive_at(tracks, multiplier), cheapest_at(tracks, multiplier)
        assert_covers(found, tracks)
        cost = expected.damage + multiplier * expected.parameters
        assert found.damage + multiplier * found.parameters == pytest.approx(cost, rel=CLOSE)


@pytest.mark.parametrize("seed", range(30))
def test_a_fixed_multiplier_equals_enumeration_on_longer_tracks(seed):
    rng = np.random.default_rng(seed)
    track = random_track(rng, "a", 5 + seed % 2)
    multiplier = 0.2 * rng.random()
    expected, found = exhaustive_at([track], multiplier), cheapest_at([track], multiplier)
    assert_covers(found, [track])
    assert found.damage + multiplier * found.parameters == pytest.approx(expected.damage + multiplier * expected.parameters)
    least = min(cost for cost, _ in every_structure(track, multiplier))
    assert found.damage + multiplier * found.parameters == pytest.approx(least)


@pytest.mark.parametrize("seed", range(100))
def test_a_budget_is_kept_and_the_bound_holds(seed):
    tracks = random_tracks(seed)
    assert sum(smallest(track) for track in tracks) == limits(tracks)[0]
    for limit in limits(tracks):
        best, found = exhaustive(tracks, limit), solve(tracks, limit)
        assert_covers(found, tracks)
        assert found.parameters <= limit
        assert found.bound <= best.damage * (1 + CLOSE)
        assert best.damage <= found.damage * (1 + CLOSE)
        assert found.gap == found.damage - found.bound >= 0
        assert found.relative_gap == (found.gap / found.damage if found.damage else 0)


def test_the_gap_is_mostly_closed():
    found = [
        (solve(tracks, limit), exhaustive(tracks, limit))
        for s in range(60)
        for tracks in [random_tracks(s)]
        for limit in limits(tracks)
    ]
    assert np.mean([one.damage <= best.damage * (1 + CLOSE) for one, best in found]) > 0.95


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_never_worse_than_one_operator_alone(seed):
    tracks = random_tracks(seed)
    for limit in limits(tracks)[1:]:
        plans = plan_candidates(tracks, limit)
        whole = next(plan for plan in plans if plan.label == "all")
        assert plans[0] is whole or plans[0].damage < whole.damage
        assert [plan.damage for plan in plans] == sorted(plan.damage for plan in plans)
        best = exhaustive(tracks, limit)
        for plan in plans:
            assert plan.parameters <= limit
            assert plan.bound <= best.damage * (1 + CLOSE)
            if plan.label != "all":
                assert {choice.candidate.operator for choice in plan.choices} <= {plan.label, "keep"}
                assert plans[0].damage <= solve(restrict(tracks, {plan.label}), limit).damage


@pytest.mark.parametrize("seed", range(40))
def test_k_best(seed):
    tracks = random_tracks(seed)
    for limit in limits(tracks):
        several = k_best(tracks, limit, 6)
        first = solve(tracks, limit)
        assert (several[0].damage, several[0].structure) == (first.damage, first.structure)
        assert [one.damage for one in several] == sorted(one.damage for one in several)
        assert len({one.structure for one in several}) == len(several) <= 6
        for one in several:
            assert_covers(one, tracks)
            assert one.parameters <= limit


@pytest.mark.parametrize("seed", range(12))
def test_the_k_best_stream_is_the_sorted_enumeration_without_repeats(seed):
    tracks = random_tracks(seed)
    multiplier = exhaustive_at(tracks, 1e30).damage / 100
    each = [[cost for cost, _ in every_structure(track, multiplier)] for track in tracks]
    expected = sorted(sum(costs) for costs in itertools.product(*each))
    found = list(structures([least_costs(tabulate(track), 1.0, multiplier) for track in tracks]))
    np.testing.assert_allclose([cost for cost, _ in found], expected)
    assert len({frozenset((id(table), number) for table, number in one) for _, one in found}) == len(found)


def test_k_best_finds_every_structure_of_a_small_track():
    track = plain(random_track(np.random.default_rng(5), "a", 4))  # two points of one composite may be one structure
    count = sum(1 for _ in every_structure(track, 0.0))
    found = k_best([track], 10**6, 10 * count)
    assert len(found) == count


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_scale_invariance(factor):
    def scaled(track):
        candidates = {
            interval: tuple(Candidate(c.operator, c.sites, c.choices, c.parameters * 1000, c.damages * factor) for c in several)
            for interval, several in track.candidates.items()
        }
        return Track(track.name, track.length, candidates)

    for seed in range(20):
        tracks = random_tracks(seed)
        others = [scaled(track) for track in tracks]
        for limit in limits(tracks):
            one, other = solve(tracks, limit), solve(others, 1000 * limit)
            assert other.parameters <= 1000 * limit
            assert other.damage == pytest.approx(one.damage * factor)
            assert other.bound == pytest.approx(one.bound * factor, abs=1e-9 * one.damage * factor)


def test_a_generous_limit_gives_zero_damage_at_the_fewest_parameters():
    keeps = {(i, i + 1): (Candidate("keep", (f"s{i}",), ((),), [10], [0.0]),) for i in range(2)}
    twins = Track("twins", 2, {**keeps, (0, 2): (Candidate("tie", ("s0", "s1"), ((),), [10], [0.0]),)})
    found = solve([twins], 10**9)
    assert (found.damage, found.parameters, found.multiplier, found.relative_gap) == (0, 10, 0, 0)


def test_a_non_convex_point_off_the_hull_is_used():
    one = Candidate("lowrank", ("s",), ((1,), (2,), (3,)), [1, 5, 6], [10.0, 9.0, 0.0])
    found = solve([Track("a", 1, {(0, 1): (one,)})], 5)
    assert (found.choices[0].ranks, found.damage) == ((2,), 9.0)
    assert found.bound == pytest.approx(2.0)
    assert found.gap == pytest.approx(7.0)


def test_errors_name_the_value_and_the_mend():
    keep = Candidate("keep", ("s",), ((),), [10], [0.0])
    for parameters, damages in (([1], [-1.0]), ([1], [np.nan]), ([0], [0.0]), ([1.5], [0.0]), ([1, 2], [0.0]), ([], [])):
        with pytest.raises(HprError):
            Candidate("lowrank", ("s",), ((1,),), parameters, damages)
    with pytest.raises(HprError, match="at least one choice"):
        Candidate("lowrank", ("s",), (), [], [])
    with pytest.raises(HprError, match="0 picks from 1 groups"):
        Candidate("cycle", ("s",), ((),), [10], [0.0], ((keep,),), (0,))
    with pytest.raises(HprError, match=r"\[0, 2\)"):
        Track("a", 1, {(0, 2): (keep,)})
    with pytest.raises(HprError, match="k is 0"):
        k_best([Track("a", 1, {(0, 1): (keep,)})], 10, 0)
    uncovered = Track("a", 3, {(0, 1): (keep,), (2, 3): (keep,)})
    for call in (solve, lambda tracks, limit: k_best(tracks, limit, 2), plan_candidates):
        with pytest.raises(HprError, match="position 1"):
            call([uncovered], 100)
        with pytest.raises(BudgetError, match="smallest possible total is 10"):
            call([Track("a", 1, {(0, 1): (keep,)})], 9)
        with pytest.raises(HprError, match="no tracks"):
            call([], 9)
    with pytest.raises(BudgetError, match="smallest possible total is 10"):
        exhaustive([Track("a", 1, {(0, 1): (keep,)})], 9)
    assert solution([Choice(keep, 0)]).gap == 0
