"""Composites against enumeration of everything that their groups could choose."""

import itertools

import numpy as np
import pytest

from hpr.solver.candidates import Candidate, Choice, Track, solution
from hpr.solver.composite import POINTS, compose, hull, operators, restrict


def curve(rng, operator, sites, count):
    parameters = rng.integers(1, 40, count)
    return Candidate(operator, sites, tuple((rank,) for rank in range(count)), parameters, rng.exponential(size=count))


def parts_of(rng, groups=((0, 2), (1, 3)), count=4):
    """For every group: two shared operators, and its members alone, each kept or of low rank."""
    parts = []
    for members in groups:
        sites = tuple(f"s.{index}" for index in members)
        alone = [(Candidate("keep", (site,), ((),), [20], [0.0]), curve(rng, "low rank", (site,), count)) for site in sites]
        shared = [curve(rng, name, sites, count) for name in ("tie", "basis")]
        parts.append((*shared, compose("alone", range(len(sites)), alone)))
    return parts


def combinations(parts):
    """(parameters, damage) of every choice of every group, the members of "alone" chosen one by one."""

    def of(candidate):
        if not candidate.parts:
            return list(zip(candidate.parameters, candidate.damages, strict=True))
        return sums([[point for one in options for point in of(one)] for options in candidate.parts])

    def sums(groups):
        return [tuple(map(sum, zip(*points, strict=True))) for points in itertools.product(*groups)]

    return np.array(sums([[point for one in options for point in of(one)] for options in parts]))


@pytest.mark.parametrize("seed", range(30))
def test_a_composite_is_the_lower_hull_of_all_combinations(seed):
    rng = np.random.default_rng(seed)
    parts = parts_of(rng)
    found = compose("cycle", (0, 1, 0, 1), parts)
    every = combinations(parts)
    expected = hull((Candidate("all", ("s",), tuple(() for _ in every), every[:, 0], every[:, 1]),))
    corners = hull((found,))
    np.testing.assert_array_equal(corners.parameters, expected.parameters)
    np.testing.assert_allclose(corners.damages, expected.damages, rtol=1e-12)
    for multiplier in rng.exponential(size=5) / 10:
        least = (every[:, 1] + multiplier * every[:, 0]).min()
        assert (found.damages + multiplier * found.parameters).min() == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_the_leaves_of_every_point_add_up_to_it(seed):
    found = compose("cycle", (0, 1, 0, 1), parts_of(np.random.default_rng(seed)))
    assert set(found.sites) == {"s.0", "s.1", "s.2", "s.3"}
    for index in range(len(found.choices)):
        leaves = Choice(found, index).leaves
        assert all(not leaf.candidate.parts for leaf in leaves)
        assert Choice(found, index).ranks == ()
        assert sorted(site for leaf in leaves for site in leaf.candidate.sites) == sorted(found.sites)
        assert sum(leaf.parameters for leaf in leaves) == found.parameters[index]
        assert sum(leaf.damage for leaf in leaves) == pytest.approx(found.damages[index])
        assert solution([Choice(found, index)]).choices == leaves


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_is_convex_below_all_points_and_made_of_them(seed):
    rng = np.random.default_rng(seed)
    several = tuple(curve(rng, "a", ("s",), int(rng.integers(1, 30))) for _ in range(int(rng.integers(1, 4))))
    found = hull(several)
    assert np.all(np.diff(found.parameters) > 0)
    assert np.all(found.rates > 0)
    assert np.all(np.diff(found.rates) < 0)
    for number, index, *point in zip(*found, strict=True):
        assert point == [several[number].parameters[index], several[number].damages[index]]
    for one in several:
        for size, damage in zip(one.parameters, one.damages, strict=True):
            if size >= found.parameters[0]:
                assert damage >= found.damage_at(size) * (1 - 1e-12)


def test_long_curves_are_thinned_between_their_ends():
    ranks = np.arange(1, 200)
    parts = [
        (Candidate("low rank", (f"s.{index}",), tuple((int(r),) for r in ranks), 3 * ranks, (index + 1) / ranks**2),)
        for index in range(4)
    ]
    found = compose("alone", range(4), parts)
    assert len(found.choices) == POINTS
    assert found.parameters[[0, -1]].tolist() == [12, 4 * 3 * 199]
    assert found.damages[-1] == pytest.approx(10 / 199**2)
    assert np.all(np.diff(found.damages) < 0)


def test_restricting_lets_the_groups_choose_among_what_is_left():
    parts = parts_of(np.random.default_rng(0))
    found = compose("cycle", (0, 1, 0, 1), parts)
    (track,) = restrict([Track("t", 4, {(0, 4): (found,)})], {"basis"})
    (left,) = track.candidates[0, 4]
    assert operators([track]) == ["basis", "keep"]
    assert operators([Track("t", 4, {(0, 4): (found,)})]) == ["basis", "keep", "low rank", "tie"]
    bases = [tuple(one for one in options if one.operator == "basis") for options in parts]
    assert left.partition == found.partition
    assert left.damages.min() == 0  # all four kept
    assert left.parameters.min() == sum(one.parameters.min() for (one,) in bases)
    only_shared = compose("cycle", (0, 1, 0, 1), [options[:2] for options in parts])
    assert not restrict([Track("t", 4, {(0, 4): (only_shared,)})], {"low rank"})[0].candidates
    unchanged = restrict([Track("t", 4, {(0, 4): (found,)})], {"basis", "tie", "low rank"})
    assert unchanged[0].candidates[0, 4] == (found,)
