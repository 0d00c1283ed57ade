"""Which groupings are offered beyond runs of neighbours, and that the matching is the best one there is."""

import itertools

import numpy as np
import pytest
import torch

from hpr.anatomy.model import Site
from hpr.operators import shared_basis, tie
from hpr.operators.metric import Measured, Side
from hpr.operators.registry import OPERATORS
from hpr.operators.tie import alike
from hpr.planning.groupings import MATCHING, Groups, composites, matching, rules
from hpr.plans.terms import KEEP
from hpr.solver.composite import hull

ALL = set(OPERATORS)


def moment(draw, size):
    root = torch.randn(size, 2 * size, generator=draw, dtype=torch.float64)
    return Side(root @ root.T / (2 * size))


def row(count, equal=(), seed=0, shape=(6, 5)):
    """Layers with moments of their own; those named together in ``equal`` have one weight."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    for members in equal:
        weights[list(members)] = weights[members[0]].clone()
    sites = [Site(f"s.{n}.w", "linear", *shape, True, "s", n, "w") for n in range(count)]
    return [Measured(s, w, moment(draw, shape[0]), moment(draw, shape[1]), 3.0) for s, w in zip(sites, weights, strict=True)]


def runs(layers, longest, allowed=ALL):
    found = {}
    for start, stop in itertools.combinations(range(len(layers) + 1), 2):
        if stop - start <= longest:
            group = layers[start:stop]
            names = [name for name, one in OPERATORS.items() if one.shared == (len(group) > 1) and name in {*allowed, KEEP}]
            options = [OPERATORS[name].candidate(group) for name in names]
            found[start, stop] = tuple(one for one in options if one is not None)
    return found


def unknown(one, other):
    return None


def test_rules_offer_only_what_short_runs_cannot_give() -> None:
    assert rules(6, 3) == {
        "cycle(groups=3)": (0, 1, 2, 0, 1, 2),
        "cycle(groups=2)": (0, 1, 0, 1, 0, 1),
        "cycle_rev(groups=3)": (0, 1, 2, 2, 1, 0),
        "sandwich(groups=3)": (0, 1, 1, 1, 1, 2),
    }
    assert "sequence(groups=2)" in rules(12, 3)
    assert "sequence(groups=2)" not in rules(12, 6)
    assert "sandwich(groups=3)" not in rules(6, 4)
    assert rules(1, 3) == rules(2, 3) == {}
    for length in range(3, 26):
        found = rules(length, 3)
        assert len(set(found.values())) == len(found) <= 5
        for partition in found.values():
            groups = [[i for i, own in enumerate(partition) if own == group] for group in range(max(partition) + 1)]
            assert any(len(one) > 3 or one[-1] - one[0] >= len(one) for one in groups)


@pytest.mark.parametrize(("below", "above"), [(2, 2), (6, 6), (6, 3), (3, 6), (12, 12)])
def test_layers_of_two_stacks_are_put_together_by_number(below: int, above: int) -> None:
    partition = rules(below + above, 3, below)[f"cycle(groups={below})"]
    for layer in range(min(below, above)):
        assert partition[layer] == partition[below + layer]
    assert len(set(partition)) == below if above <= below else True


def test_each_group_is_measured_once_and_cheaply() -> None:
    layers = row(6)
    groups = Groups(layers, runs(layers, 3), ALL)
    assert groups.shared((0, 2)) is groups.shared((0, 2))
    assert {one.operator for one in groups.shared((0, 2))} == {shared_basis.INPUT, shared_basis.OUTPUT}
    assert {one.operator for one in groups.shared((0, 1))} == {n for n, one in OPERATORS.items() if one.shared} - {
        "base + block + private"
    }
    assert {one.operator for one in Groups(layers, runs(layers, 3), {tie.TIE}).shared((0, 2))} == {tie.TIE}
    assert Groups(layers, runs(layers, 3), {"low rank"}).shared((0, 2)) == ()


def test_weights_are_alike_where_they_have_much_in_common() -> None:
    layers = row(4, equal=[(0, 2)], shape=(40, 40))
    assert alike([layers[0], layers[2]])
    assert not alike([layers[0], layers[1]])
    groups = Groups(layers, runs(layers, 1), ALL)
    (found,) = [one for one in groups.shared((0, 2)) if one.operator == tie.TIE]
    assert found.damages[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_matching_is_the_best_of_all(seed: int) -> None:
    count = 5 + seed % 2
    layers = row(count, seed=seed)
    groups = Groups(layers, runs(layers, 2), ALL)
    for pair in itertools.combinations(range(count), 2):
        groups.shared(pair)

    def gain(pair):
        size = sum(layers[index].weight.numel() for index in pair) / 2
        return hull((groups.alone(pair),)).damage_at(size) - hull(groups.shared(pair)).damage_at(size)

    def best(left):
        if len(left) < 2:
            return 0.0
        first, rest = left[0], left[1:]
        options = [gain((first, other)) + best(tuple(i for i in rest if i != other)) for other in rest]
        return max([*options, best(rest)] if len(left) % 2 else options)

    partition = matching(groups, 0, count)
    pairs = [tuple(i for i, own in enumerate(partition) if own == group) for group in set(partition)]
    pairs = [pair for pair in pairs if len(pair) == 2]
    assert len(pairs) == count // 2
    assert sum(gain(pair) for pair in pairs) == pytest.approx(best(tuple(range(count))))
    assert list(dict.fromkeys(partition)) == list(range(max(partition) + 1))


def test_similarity_says_which_pairs_are_measured() -> None:
    layers = row(7, equal=[(0, 6)])  # no rule puts these together
    found = list(composites(Groups(layers, runs(layers, 3), ALL), 0, 7, 3, 0, unknown))
    assert all(one.partition[0] != one.partition[6] for one in found if one.operator != "cycle(groups=3)")
    similar = np.eye(7)
    similar[0, 6] = similar[6, 0] = 0.9
    groups = Groups(layers, runs(layers, 3), ALL)
    (paired,) = [one for one in composites(groups, 0, 7, 3, 0, lambda i, j: similar[i, j]) if one.operator == MATCHING]
    assert paired.partition[0] == paired.partition[6]
    assert len(groups.measured(0, 7)) <= 6 + 7 + 8


def test_a_composite_is_never_worse_than_its_members_alone() -> None:
    layers = row(6)
    groups = Groups(layers, runs(layers, 3), ALL)
    alone = hull((groups.alone(tuple(range(6))),))
    for found in composites(groups, 0, 6, 3, 0, unknown):
        for size, damage in zip(alone.parameters[::20], alone.damages[::20], strict=True):
            assert hull((found,)).damage_at(size) <= damage * (1 + 1e-6) + 1e-9


def test_without_shared_operators_there_is_no_composite() -> None:
    layers = row(6)
    allowed = {"low rank"}
    assert list(composites(Groups(layers, runs(layers, 3, allowed), allowed), 0, 6, 3, 0, unknown)) == []
