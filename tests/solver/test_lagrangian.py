import itertools
import math

import numpy as np
import pytest
from oracle import exhaustive, exhaustive_at

from hpr.errors import HprError
from hpr.solver.boundaries import boundaries
from hpr.solver.candidates import Candidate, Choice, Track, solution, tabulate
from hpr.solver.composite import compose, restrict
from hpr.solver.lagrangian import k_best, plan_candidates, smallest, solve
from hpr.solver.lattice import least_costs, structures, trace

CLOSE = 1e-9


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


@pytest.mark.parametrize("seed", range(25))
def test_boundaries_and_entropy_equal_enumeration(seed):
    rng = np.random.default_rng(seed)
    track = random_track(rng, "a", int(rng.integers(2, 6)))
    multiplier, temperature = 0.05 * rng.random(), 0.1 + rng.random()
    every = list(every_structure(track, multiplier))
    weights = np.exp([-cost / temperature for cost, _ in every])
    weights /= weights.sum()
    found = boundaries(track, multiplier, temperature)
    assert found.entropy == pytest.approx(-(weights * np.log(weights)).sum(), rel=1e-9)
    expected = [sum(w for w, (_, starts) in zip(weights, every, strict=True) if i in starts) for i in range(1, track.length)]
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-9, atol=1e-12)


def test_boundaries_turn_sharp_as_the_temperature_falls():
    track = random_track(np.random.default_rng(3), "a", 5)
    groups = {choice.candidate.sites[0] for choice in cheapest_at([track], 0.03).choices}
    found = boundaries(track, 0.03, 1e-6)
    np.testing.assert_allclose(found.probabilities, [f"a.{i}" in groups for i in range(1, 5)], atol=1e-6)
    assert found.entropy == pytest.approx(0, abs=1e-6)
    assert boundaries(track, 0.03, 1e6).entropy == pytest.approx(
        math.log(sum(1 for _ in every_structure(track, 0.0))), abs=1e-4
    )


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
    with pytest.raises(HprError, match="multiplier"):
        boundaries(Track("a", 1, {(0, 1): (keep,)}), -1.0, 1.0)
    uncovered = Track("a", 3, {(0, 1): (keep,), (2, 3): (keep,)})
    for call in (solve, lambda tracks, limit: k_best(tracks, limit, 2), plan_candidates):
        with pytest.raises(HprError, match="position 1"):
            call([uncovered], 100)
        with pytest.raises(HprError, match="smallest possible total is 10"):
            call([Track("a", 1, {(0, 1): (keep,)})], 9)
        with pytest.raises(HprError, match="no tracks"):
            call([], 9)
    with pytest.raises(HprError, match="position 1"):
        boundaries(uncovered, 0.0, 1.0)
    with pytest.raises(HprError, match="position 0"):
        boundaries(Track("a", 2, {}), 0.0, 1.0)
    with pytest.raises(HprError, match="temperature"):
        boundaries(Track("a", 1, {(0, 1): (keep,)}), 0.0, 0.0)
    with pytest.raises(HprError, match="smallest possible total is 10"):
        exhaustive([Track("a", 1, {(0, 1): (keep,)})], 9)
    assert solution([Choice(keep, 0)]).gap == 0
