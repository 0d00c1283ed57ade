"""Boundary probabilities against enumeration and simulation; the temperature that end-to-end runs fit."""

import math

import numpy as np
import pytest
from tracks import cheapest_at, every_structure, random_track

from hpr.errors import HprError
from hpr.solver.boundaries import boundaries, boundary_probabilities, fitted_temperature
from hpr.solver.candidates import Candidate, Track

KEEP = Candidate("keep", ("s",), ((),), [10], [0.0])


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


@pytest.mark.parametrize("seed", range(3))
def test_a_structure_is_best_after_gumbel_errors_as_often_as_its_probability(seed):
    rng = np.random.default_rng(seed)
    track = random_track(rng, "a", 5)
    multiplier, temperature, draws = 0.05, 0.3, 40_000
    every = list(every_structure(track, multiplier))
    costs = np.array([cost for cost, _ in every])
    winners = (costs - rng.gumbel(scale=temperature, size=(draws, len(every)))).argmin(axis=1)
    shares = np.bincount(winners, minlength=len(every)) / draws
    expected = [sum(p for p, (_, starts) in zip(shares, every, strict=True) if i in starts) for i in range(1, 5)]
    np.testing.assert_allclose(boundaries(track, multiplier, temperature).probabilities, expected, atol=0.015)


@pytest.mark.parametrize(("scale", "tracks"), [(1.0, 1), (0.6, 12), (3.0, 5)])
def test_the_temperature_of_gumbel_errors_is_recovered(scale, tracks):
    rng, temperature = np.random.default_rng(0), 0.02
    predicted = rng.uniform(1, 4, 4000)
    errors = temperature * (rng.gumbel(size=(4000, tracks)) - np.euler_gamma)
    measured = scale * (predicted + errors.sum(axis=1))
    assert fitted_temperature(predicted, measured, tracks) == pytest.approx(temperature, rel=0.05)
    assert fitted_temperature(predicted, 7 * measured, tracks) == pytest.approx(fitted_temperature(predicted, measured, tracks))
    assert fitted_temperature(7 * predicted, measured, tracks) == pytest.approx(7 * temperature, rel=0.05)


def test_a_few_plans_recover_the_temperature_on_average():
    rng = np.random.default_rng(1)
    predicted = np.array([1.0, 1.2, 1.5, 2.0])
    found = [fitted_temperature(predicted, predicted + 0.1 * rng.normal(size=(6, 4)).sum(axis=0), 6) for _ in range(2000)]
    root_mean_square = math.sqrt(np.mean(np.square(found)))
    assert root_mean_square == pytest.approx(0.1 * math.sqrt(6) / math.pi, rel=0.05)


def test_there_is_no_temperature_without_three_plans_or_without_a_spread():
    assert fitted_temperature([1.0, 2.0], [1.1, 1.9], 4) is None
    assert fitted_temperature([], [], 4) is None
    assert fitted_temperature([0.1, 0.2, 0.3], [0.3, 0.6, 0.9], 4) is None
    assert fitted_temperature([0.0, 0.0, 0.0], [0.3, 0.6, 0.9], 4) is None
    assert fitted_temperature([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], 4) is None
    assert fitted_temperature([1.0, 2.0, 3.0], [1.1, 1.9, 3.1], 4) == pytest.approx(0.0448, abs=5e-5)


def test_boundary_probabilities_are_of_tracks_with_several_sites():
    layers = random_track(np.random.default_rng(3), "a", 4)
    rows = {
        (first, first + 1): (Candidate("keep", ("table",), ((),), [10], [0.0], rows=(8 * first, 8 * first + 8)),)
        for first in range(3)
    }
    found = boundary_probabilities([layers, Track("table", 3, rows), Track("b", 1, {(0, 1): (KEEP,)})], 0.03, 0.2)
    one = boundaries(layers, 0.03, 0.2)
    assert found == {"a": {"probabilities": one.probabilities.tolist(), "entropy": one.entropy}}
    assert len(found["a"]["probabilities"]) == 3


def test_errors_name_the_value():
    keep = {(0, 1): (KEEP,)}
    for track, position in ((Track("a", 3, {**keep, (2, 3): (KEEP,)}), 1), (Track("a", 2, {}), 0)):
        with pytest.raises(HprError, match=f"position {position}"):
            boundaries(track, 0.0, 1.0)
    for multiplier, temperature in ((0.0, 0.0), (-1.0, 1.0), (0.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(HprError, match="temperature"):
            boundaries(Track("a", 1, keep), multiplier, temperature)
    with pytest.raises(HprError, match="2 predicted and 1 measured"):
        fitted_temperature([1.0, 2.0], [1.0], 3)
    with pytest.raises(HprError, match="0 tracks"):
        fitted_temperature([1.0], [1.0], 0)
    with pytest.raises(HprError, match="not a finite number"):
        fitted_temperature([1.0, 2.0, math.nan], [1.0, 2.0, 3.0], 3)
