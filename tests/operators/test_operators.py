"""Every operator on random groups: curves bound what fits do, costs are what plans count, optima are optimal."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import low_rank_terms, plan_of
from hpr.anatomy.describe import describe
from hpr.anatomy.model import Site
from hpr.errors import HprError
from hpr.nn.bank import FactorBank
from hpr.nn.linear import SharedLinear
from hpr.operators import base_block_private, fitting, low_rank, metric, shared_basis, tie, vocab_segments
from hpr.operators.identity_block import divide, store
from hpr.operators.metric import Measured, Side
from hpr.operators.registry import OPERATORS
from hpr.plans.terms import KEEP, Entry, Term
from hpr.profiling.profile import Profile, SiteStatistics

SHAPES = [(7, 7), (10, 5), (5, 11)]  # square, tall, wide
BY_RANKS = [name for name, operator in OPERATORS.items() if operator.rows is None and not operator.needs_layer_state]
SHARED = [name for name, operator in OPERATORS.items() if operator.shared]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, diagonal: bool, seed: int) -> Tensor:
    rows = drawn(2 * size, size, seed=seed) * torch.linspace(0.2, 2, size).double()
    rows = rows @ drawn(size, size, seed=seed + 500)
    full = rows.T @ rows / len(rows)
    return full.diagonal().clone() if diagonal else full


def group_of(
    members: int, shape: tuple[int, int], seed: int = 0, diagonal: tuple[bool, bool] = (False, False), alike: float = 1.0
) -> list[Measured]:
    """Sites of one slot whose weights have something in common (all of it at 0); moments and rows are all distinct."""
    out, columns = shape
    common = drawn(out, columns, seed=1000 + seed)
    group = []
    for layer in range(members):
        name = f"stack.{layer}.slot"
        site = Site(name, "linear", out, columns, True, stack="stack", layer=layer, slot="slot")
        own = 100 * seed + 10 * layer
        group.append(
            Measured(
                site,
                common + alike * drawn(out, columns, seed=own),
                Side(moment(out, diagonal[0], own + 1)),
                Side(moment(columns, diagonal[1], own + 2)),
                rows=1.0 + layer,
            )
        )
    return group


def fitted_damage(name: str, group: Sequence[Measured], choice: tuple[int, ...]) -> float:
    """Damage of a fit by the dense formula, from the product of its factors."""
    operator = OPERATORS[name]
    terms = operator.terms([one.site for one in group], choice)
    values = operator.fit(group, terms)
    total = 0.0
    for one in group:
        own = terms[one.site.name]
        change = fitting.product(own, values, one.site) - one.weight if own else torch.zeros_like(one.weight)
        left, right = (side.moment.diag() if side.diagonal else side.moment for side in (one.left, one.right))
        total += 0.5 * one.rows * float((left @ change @ right @ change.T).trace())
    return total


def some(count: int, most: int = 5) -> list[int]:
    return sorted({int(number) for number in np.linspace(0, count - 1, most)})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BY_RANKS)
def test_curves_are_bounds_and_costs_are_those_of_the_factors(name: str, shape: tuple[int, int]) -> None:
    for members in (2, 3, 4, 5) if OPERATORS[name].shared else (1,):
        group = group_of(members, shape, seed=members)
        found = OPERATORS[name].candidate(group)
        if found is None:
            assert name == base_block_private.NAME
            assert members < base_block_private.SHORTEST
            continue
        sites = [one.site for one in group]
        assert found.operator == name
        assert found.sites == tuple(site.name for site in sites)
        nothing = sum(one.damage(one.weight) for one in group)
        for index, choice in enumerate(found.choices):
            terms = OPERATORS[name].terms(sites, choice)
            shapes = {factor: s for site in sites for term in terms[site.name] for factor, s in term.shapes(site).items()}
            expected = sum(s.parameters for s in shapes.values()) if shapes else sites[0].parameters
            assert found.parameters[index] == expected
            assert all(min(s.stored) >= 1 for s in shapes.values())
            assert set(terms) == set(found.sites)
        for index in some(len(found.choices)):
            damage = fitted_damage(name, group, found.choices[index])
            assert damage <= found.damages[index] * (1 + 1e-6) + 1e-12 * nothing, (members, found.choices[index])


@given(
    name=st.sampled_from(SHARED),
    members=st.integers(2, 5),
    shape=st.sampled_from([(4, 4), (6, 3), (3, 6), (2, 9)]),
    seed=st.integers(0, 999),
    diagonal=st.tuples(st.booleans(), st.booleans()),
    alike=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    where=st.floats(0, 1),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_curves_are_bounds_on_random_groups(name, members, shape, seed, diagonal, alike, where) -> None:
    group = group_of(members, shape, seed, diagonal, alike)
    found = OPERATORS[name].candidate(group)
    if found is None:
        return
    index = min(int(where * len(found.choices)), len(found.choices) - 1)
    nothing = sum(one.damage(one.weight) for one in group)
    assert fitted_damage(name, group, found.choices[index]) <= found.damages[index] * (1 + 1e-6) + 1e-10 * nothing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_is_the_optimum_at_every_rank(shape: tuple[int, int]) -> None:
    (one,) = group_of(1, shape)
    roots = [np.linalg.cholesky(side.moment.numpy()) for side in (one.left, one.right)]
    values = np.linalg.svd(roots[0].T @ one.weight.numpy() @ roots[1], compute_uv=False)
    best = [0.5 * one.rows * float((values[rank:] ** 2).sum()) for rank in range(min(shape) + 1)]
    found = low_rank.damages(one)
    assert found == pytest.approx(best, rel=1e-8, abs=1e-10 * best[0])
    assert found[-1] == 0
    candidate = low_rank.candidate([one])
    assert candidate.choices == tuple((rank,) for rank in range(1, min(shape)))
    assert candidate.damages == pytest.approx(best[1:-1], rel=1e-8)
    for (rank,) in candidate.choices:
        u, v = low_rank.truncate(one, rank)
        assert one.damage(u @ v - one.weight) == pytest.approx(best[rank], rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("members", [2, 5])
def test_tie_solves_its_normal_equations(shape: tuple[int, int], members: int) -> None:
    group = group_of(members, shape)
    system = sum(one.rows * torch.kron(one.left.moment, one.right.moment) for one in group)
    goal = sum(one.rows * one.left.moment @ one.weight @ one.right.moment for one in group)
    exact = torch.linalg.solve(system, goal.flatten()).reshape(shape)
    found, converged = tie.tie(group), tie.tie(group, steps=500)

    def damage(matrix: Tensor) -> float:
        return sum(one.damage(matrix - one.weight) for one in group)

    torch.testing.assert_close(converged, exact, rtol=1e-2, atol=1e-2)
    assert damage(exact) <= damage(converged) <= damage(exact) * (1 + 1e-6)
    assert damage(found) <= damage(exact) * 1.02
    for other in (*(one.weight for one in group), sum(one.weight for one in group) / members):
        assert damage(found) < damage(other)
        assert damage(tie.estimate(group)) < damage(other)


def test_tie_is_exact_at_once_where_moments_agree() -> None:
    (one, two) = group_of(2, (6, 5))
    two = Measured(two.site, two.weight, one.left, one.right, rows=3 * one.rows)
    torch.testing.assert_close(tie.tie([one, two], steps=1), 0.25 * one.weight + 0.75 * two.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("diagonal", [(False, False), (True, False), (False, True), (True, True)])
def test_scales_find_a_scaled_copy(diagonal: tuple[bool, bool]) -> None:
    one, two = group_of(2, (6, 5), diagonal=diagonal)
    r, c = drawn(6, seed=7).abs() + 0.5, drawn(5, seed=8).abs() + 0.5
    two = Measured(two.site, r[:, None] * one.weight * c, two.left, two.right, two.rows)
    shared, rows, columns = tie.tie_and_scale([one, two], one.weight, rounds=100)
    left = sum(part.damage(r[:, None] * shared * c - part.weight) for part, r, c in zip((one, two), rows, columns, strict=True))
    assert left < 1e-3 * sum(part.damage(part.weight) for part in (one, two))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alternation_never_ends_above_its_pooled_start(shape: tuple[int, int]) -> None:
    for seed in range(4):
        group = group_of(2 + seed, shape, seed)
        for members in (group, [one.transposed for one in group]):
            for rank in (1, 2, 4):
                shared = shared_basis.pooled_basis(members, rank)
                start = sum(one.damage(shared_basis.best_private(one, shared) @ shared - one.weight) for one in members)
                private, found = shared_basis.alternate(members, rank)
                end = sum(one.damage(u @ found - one.weight) for one, u in zip(members, private, strict=True))
                assert end <= start * (1 + 1e-12)
                curve = sum(shared_basis._damages(one, shared_basis.pooled_basis(members, 4)) for one in members)
                assert curve[rank] == pytest.approx(start, rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [shared_basis.INPUT, shared_basis.OUTPUT])
def test_identical_members_share_a_basis_at_the_damage_of_one(name: str, shape: tuple[int, int]) -> None:
    first, second = group_of(2, shape)
    twin = Measured(second.site, first.weight, first.left, first.right, first.rows)
    found, alone = OPERATORS[name].candidate([first, twin]), low_rank.damages(first)
    assert found is not None
    rounding = 1e-11 * alone[0]
    for (rank,), damage in zip(found.choices, found.damages, strict=True):
        assert damage == pytest.approx(2 * alone[rank], rel=1e-6, abs=rounding)
        assert fitted_damage(name, [first, twin], (rank,)) == pytest.approx(2 * alone[rank], rel=1e-6, abs=rounding)


@pytest.mark.parametrize("name", [shared_basis.INPUT, shared_basis.OUTPUT])
def test_a_shared_basis_of_weights_without_full_rank(name: str) -> None:
    first, second = group_of(2, (4, 12), alike=0.0)
    weak = first.weight.clone()
    weak[2:] = weak[:2]
    group = [replace(one, weight=weak) for one in (first, second)]
    found = OPERATORS[name].candidate(group)
    assert found is not None
    for choice, damage in zip(found.choices, found.damages, strict=True):
        nothing = sum(one.damage(weak) for one in group)
        assert fitted_damage(name, group, choice) <= damage * (1 + 1e-6) + 1e-8 * nothing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["low rank", "tie + delta", shared_basis.INPUT, shared_basis.OUTPUT])
def test_damage_never_rises_with_rank(name: str, shape: tuple[int, int]) -> None:
    group = group_of(3 if OPERATORS[name].shared else 1, shape)
    found = OPERATORS[name].candidate(group)
    assert found is not None
    assert (np.diff(found.damages) <= 1e-9 * found.damages[0]).all()
    fits = [fitted_damage(name, group, choice) for choice in found.choices]
    assert (np.diff(fits) <= 1e-6 * fits[0]).all()


def test_hierarchy_terms() -> None:
    sites = [one.site for one in group_of(5, (9, 6))]
    terms = base_block_private.terms(sites, (3, 2, 1))
    base, block, private = zip(*(terms[site.name] for site in sites), strict=True)
    assert {term.u for term in base} == {"stack.0-4.slot.base.u"}
    assert [term.u for term in block] == ["stack.0-1.slot.block.u"] * 2 + ["stack.2-4.slot.block.u"] * 3
    assert [term.u for term in private] == [f"{site.name}.private.u" for site in sites]
    assert [term.rank for term in terms[sites[0].name]] == [3, 2, 1]
    assert {term.identity for several in terms.values() for term in several} == {"v"}  # taller than wide
    assert OPERATORS[base_block_private.NAME].candidate(group_of(3, (9, 6))) is None


# --- segments


def table(rows: int = 96, columns: int = 8) -> Measured:
    site = Site("table", "embedding", rows, columns, False, slot="table")
    frequencies = 1 / torch.arange(1, rows + 1).double()
    return Measured(site, drawn(rows, columns), Side(frequencies / frequencies.sum()), Side(moment(columns, False, 3)), 5.0)


@given(st.integers(1, 60_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_row_bounds_cover_the_table(rows: int) -> None:
    bounds = vocab_segments.row_bounds(rows)
    assert bounds[0] == 0
    assert bounds[-1] == rows
    assert all(first < second for first, second in pairwise(bounds))
    assert len(bounds) <= 16


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_merged_runs_cover_every_row_once(data: st.DataObject) -> None:
    site = table().site
    cuts = sorted(data.draw(st.sets(st.integers(1, 95), max_size=6)))
    chosen = []
    for start, stop in zip([0, *cuts], [*cuts, 96], strict=True):
        limit = min(stop - start, site.in_features) - 1
        rank = data.draw(st.integers(0, limit))
        chosen.append(((start, stop), (rank,) if rank else ()))
    terms = vocab_segments.merge(site, data.draw(st.permutations(chosen)))
    if not terms:
        assert not any(ranks for _, ranks in chosen)
        return
    rows = [term.rows or (0, 96) for term in terms]
    assert [start for start, _ in rows] == [0, *(stop for _, stop in rows[:-1])]
    assert rows[-1][1] == 96
    assert not any(first.rank is None and second.rank is None for first, second in pairwise(terms))
    assert len({term.u for term in terms}) == len(terms)


@pytest.mark.parametrize("shape", [(96, 8), (40, 30), (2, 8), (1, 4), (300, 1)], ids=str)
def test_segments_add_up(shape: tuple[int, int]) -> None:
    one = table(*shape)
    track = vocab_segments.track(one)
    for number in range(3):  # the finest cut, with different ranks in every run; the whole table in the last round
        whole = number == 2 and bool(track.candidates[0, track.length])
        intervals = [(0, track.length)] if whole else [(i, i + 1) for i in range(track.length)]
        chosen, damage, cost = [], 0.0, 0
        for index, interval in enumerate(intervals):
            candidate = track.candidates[interval][0]
            place = (number + 2 * index) % len(candidate.choices)
            chosen.append((candidate.rows, candidate.choices[place]))
            damage += candidate.damages[place]
            cost += candidate.parameters[place]
        terms = vocab_segments.merge(one.site, chosen)
        if not terms:
            assert damage == 0
            assert cost == one.site.parameters
            continue
        assert cost == sum(shape.parameters for term in terms for shape in term.shapes(one.site).values())
        change = fitting.product(terms, vocab_segments.fit([one], {"table": terms}), one.site) - one.weight
        exact = 0.5 * one.rows * float((one.left.moment[:, None] * change @ one.right.moment * change).sum())
        assert exact == pytest.approx(damage, rel=1e-8, abs=1e-12)


# --- the identity block


def test_division_keeps_entries_moderate() -> None:
    for rows, rank in ((5, 2), (40, 8), (60, 59), (9, 9)):
        tall = drawn(rows, rank) @ torch.diag(torch.logspace(0, -6, rank).double()) @ drawn(rank, rank, seed=1)
        rest, order, square = divide(tall)
        assert rest.shape == (rows - rank, rank)
        assert sorted(order.tolist()) == list(range(rows))
        torch.testing.assert_close(torch.cat([torch.eye(rank).double(), rest])[order] @ square, tall, rtol=1e-8, atol=1e-8)
        assert rest.numel() == 0 or rest.abs().max() < 20


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in BY_RANKS if name != KEEP])
def test_products_survive_storing_also_in_float32(name: str, shape: tuple[int, int]) -> None:
    group = group_of(4, shape) if OPERATORS[name].shared else group_of(1, shape)
    candidate = OPERATORS[name].candidate(group)
    assert candidate is not None
    sites = [one.site for one in group]
    for index in some(len(candidate.choices), 3):
        terms = OPERATORS[name].terms(sites, candidate.choices[index])
        values = OPERATORS[name].fit(group, terms)
        shapes = {factor: s for site in sites for term in terms[site.name] for factor, s in term.shapes(site).items()}
        stored = store(values, [term for site in sites for term in terms[site.name]])
        assert all(stored[factor].shape == s.stored for factor, s in shapes.items())
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            bank = FactorBank(shapes, dtype)
            bank.load(stored)
            for site in sites:
                exact = fitting.product(terms[site.name], values, site)
                linear = SharedLinear(bank, terms[site.name], nn.Linear(site.in_features, site.out_features, bias=False))
                for found in (linear.dense_weight(), linear(torch.eye(site.in_features, dtype=dtype)).T):
                    assert (found.double() - exact).norm() < tolerance * exact.norm()


def test_a_shared_factor_is_divided_once_for_all_its_partners() -> None:
    terms = [Term("u", f"v{number}", 2, identity="u") for number in range(3)] + [Term("u", "v0", 2, identity="u")]
    values = {"u": drawn(6, 2), **{f"v{number}": drawn(2, 5, seed=1 + number) for number in range(3)}}
    stored = store(values, terms)
    u = torch.cat([torch.eye(2).double(), stored["u"]])[stored["u.order"]]
    for number in range(3):
        torch.testing.assert_close(u @ stored[f"v{number}"], values["u"] @ values[f"v{number}"], rtol=1e-10, atol=1e-10)
    assert set(stored) == {*values, "u.order"}


# --- operators.fit on a model


class Chain(nn.Module):
    """Three Linear layers in a numbered container, float64."""

    def __init__(self, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"slot": nn.Linear(6, 6, bias=bias)}) for _ in range(3)).double()


def profile_of(model: nn.Module, mean: bool = True) -> Profile:
    anatomy = describe(model)
    sites = {}
    for index, site in enumerate(anatomy.sites):
        left, right = (moment(size, False, 40 + index) for size in (site.out_features, site.in_features))
        sites[site.name] = SiteStatistics(left, right, 2.0 + index, drawn(site.in_features, seed=index) if mean else None)
    return Profile(anatomy.fingerprint, sites)


@pytest.mark.parametrize("name", [name for name in BY_RANKS if name not in (KEEP, base_block_private.NAME)])
def test_bias_change_makes_the_mean_output_exact(name: str) -> None:
    model = Chain()
    anatomy, profile = describe(model), profile_of(model)
    sites = anatomy.sites if OPERATORS[name].shared else anatomy.sites[:1]
    measured = metric.measure(model, anatomy, profile)
    candidate = OPERATORS[name].candidate([measured[site.name] for site in sites])
    assert candidate is not None
    terms = OPERATORS[name].terms(sites, candidate.choices[0])
    plan = plan_of(anatomy, {})
    plan = replace(plan, entries={**plan.entries, **{site: Entry(name, own) for site, own in terms.items()}})
    fitted = fitting.Fits(model, profile).fit(plan)
    assert set(fitted.bias_changes) == set(terms)
    bank = FactorBank(plan.factors(anatomy), torch.float64)
    bank.load(fitted.factors)
    for site, own in terms.items():
        mean, linear = profile.sites[site].mean, model.get_submodule(anatomy[site].name)
        assert mean is not None
        found = SharedLinear(bank, own, nn.Linear(6, 6, bias=False).double())(mean) + linear.bias + fitted.bias_changes[site]
        torch.testing.assert_close(found, linear(mean), rtol=1e-9, atol=1e-9)
    assert fitting.Fits(model, profile_of(model, mean=False)).fit(plan).bias_changes == {}
    without = fitting.Fits(model, None).fit(plan)
    assert without.bias_changes == {}
    assert without.factors.keys() == fitted.factors.keys()


def test_groups_are_connected_by_factors_of_any_kind() -> None:
    model = tf.BertModel(
        tf.BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=2, vocab_size=9)
    )
    names = [site.name for site in describe(model).sites if site.stack]
    plan = plan_of(
        describe(model),
        {
            names[0]: (Term("a", "b", 2),),
            names[1]: (Term("c", "d", 2),),
            names[2]: (Term("e", "b", 2), Term("f", row_scale="r")),
            names[3]: (Term("g", row_scale="r", column_scale="s"),),
            names[4]: (Term("h", column_scale="s"),),
        },
    )
    assert fitting.groups(plan) == [("test", [names[0], names[2], names[3], names[4]]), ("test", [names[1]])]
    assert fitting.groups(plan_of(describe(model), {})) == []


@pytest.mark.parametrize(
    ("operator", "terms"),
    [
        ("tie + delta", lambda name: (Term("w"),)),
        ("tie + delta", lambda name: low_rank_terms(name, 2)),
        ("low rank", lambda name: (Term("w"),)),
        ("low rank", lambda name: (*low_rank_terms(name, 2), *low_rank_terms(f"{name}2", 2))),
        ("tie + scale", lambda name: (Term("w"),)),
        ("shared input basis", lambda name: (Term("w"),)),
        ("shared output basis", lambda name: (Term("w"),)),
        ("base + block + private", lambda name: low_rank_terms(name, 2)),
        ("tie", lambda name: low_rank_terms(name, 2)),
        ("tie", lambda name: (Term("w"), *low_rank_terms(name, 2))),
        ("segments", lambda name: (Term("w", row_scale="r"),)),
    ],
)
def test_terms_that_are_not_the_operators_are_refused(operator: str, terms) -> None:
    model = Chain()
    anatomy = describe(model)
    name = anatomy.sites[0].name
    plan = plan_of(anatomy, {})
    plan = replace(plan, entries={**plan.entries, name: Entry(operator, terms(name))})
    with pytest.raises(HprError, match=name):
        fitting.Fits(model, profile_of(model)).fit(plan)


@pytest.mark.parametrize("name", ["tie + delta", base_block_private.NAME])
def test_an_edited_private_rank_is_honoured_or_refused(name: str) -> None:
    group = group_of(4, (6, 6))
    sites = [one.site for one in group]
    terms = OPERATORS[name].terms(sites, (2,) if name == "tie + delta" else (1, 1, 2))
    last = sites[-1].name
    terms[last] = (*terms[last][:-1], replace(terms[last][-1], rank=4))
    values = OPERATORS[name].fit(group, terms)
    shapes = {factor: s for site in sites for term in terms[site.name] for factor, s in term.shapes(site).items()}
    assert {factor: tuple(value.shape) for factor, value in values.items()} == {f: s[:2] for f, s in shapes.items()}


def test_unknown_operators_and_other_models_are_refused() -> None:
    model = Chain()
    anatomy = describe(model)
    name = anatomy.sites[0].name
    with pytest.raises(HprError, match="no operator 'test'; there are keep"):
        fitting.Fits(model, None).fit(plan_of(anatomy, {name: low_rank_terms(name)}))
    with pytest.raises(HprError, match="fingerprint"):
        fitting.Fits(model, replace(profile_of(model), fingerprint="other"))


def test_factors_are_finite_at_weights_that_are_zero() -> None:
    model = Chain()
    for parameter in model.parameters():
        parameter.data.zero_()
    anatomy = describe(model)
    for name in BY_RANKS:
        operator = OPERATORS[name]
        if name in (KEEP, base_block_private.NAME):
            continue
        sites = anatomy.sites if operator.shared else anatomy.sites[:1]
        terms = operator.terms(sites, (2,))
        plan = plan_of(anatomy, {})
        plan = replace(plan, entries={**plan.entries, **{site: Entry(name, own) for site, own in terms.items()}})
        fitted = fitting.Fits(model, profile_of(model)).fit(plan)
        assert all(torch.isfinite(value).all() for value in fitted.factors.values()), name
