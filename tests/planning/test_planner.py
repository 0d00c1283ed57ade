"""Plans of a tiny BERT from its real profile: within the budget, all of it used, reproducible, as restricted as asked."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
import transformers as tf

import hpr
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import weight_at
from hpr.anatomy.model import Anatomy, Site
from hpr.operators.alignment import align
from hpr.operators.registry import OPERATORS, plannable
from hpr.planning import planner
from hpr.planning.draft import Draft
from hpr.planning.options import LONGEST_GROUP, PlanOptions
from hpr.planning.planner import known_operators
from hpr.planning.rows import counterparts
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP
from hpr.reporting.report import render_report
from hpr.solver import lagrangian
from hpr.solver.boundaries import boundary_probabilities
from hpr.solver.composite import operators, restrict

NAMES = plannable()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tf.BertConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=200,
        max_position_embeddings=24,
    )
    return tf.BertModel(config).eval()


@pytest.fixture(scope="module")
def profile(model):
    draw = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 200, (8, 10), generator=draw)} for _ in range(4)]
    return hpr.profile(model, batches, "embedding")


@pytest.fixture(scope="module")
def draft(model, profile) -> Draft:
    return planner.draft(model, profile)


def least(draft: Draft) -> int:
    return draft.untouched + sum(lagrangian.smallest(track) for track in draft.tracks)


def used(plan: Plan) -> set[str]:
    return {entry.operator for entry in plan.entries.values()}


def as_json(plan: Plan) -> str:
    return json.dumps(plan.to_dict(), allow_nan=False)


@pytest.mark.parametrize("percent", [80, 65, 50])
def test_plans_fit_the_budget_and_use_it(draft: Draft, percent: int) -> None:
    budget = draft.budget(f"{percent}%")
    plan = draft.best(budget)
    plan.validate(draft.anatomy)
    used = plan.parameters(draft.anatomy)
    assert 0.995 * budget.parameters <= used <= budget.parameters
    assert budget.parameters == int(draft.anatomy.total_parameters * percent / 100)
    assert list(plan.entries) == [site.name for site in draft.anatomy.sites]
    assert plan.damage == pytest.approx(plan.diagnostics["solver"]["damage"])
    assert plan.diagnostics["solver"]["bound"] <= plan.damage * (1 + 1e-9)
    assert plan.entries["pooler.dense"].operator == KEEP  # which an embedding never reads


def test_damage_falls_with_the_budget_to_nothing(draft: Draft) -> None:
    damages = [draft.best(draft.budget(text)).damage for text in ("30%", "50%", "65%", "80%", "100%")]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] == 0
    assert all(entry.operator == KEEP for entry in draft.best(draft.budget("100%")).entries.values())


def test_two_runs_give_the_same_plan(model, profile) -> None:
    first, second = (hpr.plan(model, profile, "65%") for _ in range(2))
    assert as_json(first) == as_json(second)


def test_json_round_trip_shares_to_the_same_model(model, profile, tmp_path) -> None:
    plan = hpr.plan(model, profile, "50%")
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert as_json(loaded) == as_json(plan)
    one, two = (hpr.share(model, each, profile).state_dict() for each in (plan, loaded))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert sum(p.numel() for p in hpr.share(model, plan, profile).parameters()) <= plan.budget.parameters


def test_predicted_damage_bounds_that_of_the_fit(model, profile, draft: Draft) -> None:
    plan = draft.best(draft.budget("50%"))
    dense = hpr.unshare(hpr.share(model, plan, profile))
    aligned = align(model, profile, plan.alignment)
    measured = hpr.operators.metric.measure(aligned.model, draft.anatomy, aligned.profile)
    total = 0.0
    for site in draft.anatomy.sites:
        one = measured[site.name]
        change = dense.get_submodule(site.name).weight.detach().double() - one.weight
        damage = one.damage(change)
        assert (damage == 0) == (plan.entries[site.name].operator == KEEP) or not one.has_gradient
        total += damage
    assert total <= plan.damage * (1 + 1e-3)


def test_impossible_budgets_name_the_smallest(draft: Draft) -> None:
    smallest = least(draft)
    for parameters in (101, draft.untouched, smallest - 1):
        for ask in (draft.best, lambda budget: draft.alternatives(budget, 3)):
            with pytest.raises(hpr.HprError, match=f"{smallest:,}"):
                ask(draft.budget(str(parameters)))
    assert draft.best(draft.budget(str(smallest))).parameters(draft.anatomy) == smallest


@pytest.mark.parametrize("extra", [0, 20, 100, 500])
def test_alternatives_at_the_smallest_budgets(draft: Draft, extra: int) -> None:
    budget = draft.budget(str(least(draft) + extra))
    plans = draft.alternatives(budget, 4)
    assert plans
    assert all(plan.parameters(draft.anatomy) <= budget.parameters for plan in plans)


def test_only_leaves_all_others_alone(model, profile, draft: Draft) -> None:
    pattern = "encoder.*.attention.*"
    plan = hpr.plan(model, profile, "50%", PlanOptions(only=pattern))
    chosen = {site.name for site in draft.anatomy.select(pattern)}
    assert all(entry.operator == KEEP for name, entry in plan.entries.items() if name not in chosen)
    assert any(entry.operator != KEEP for entry in plan.entries.values())
    weights = sum(site.parameters for site in draft.anatomy.sites if site.name in chosen)
    rest = draft.anatomy.total_parameters - weights
    used = plan.parameters(draft.anatomy) - rest
    assert 0.99 * weights / 2 <= used <= weights / 2
    narrowed = draft.narrowed(pattern)
    assert as_json(narrowed.best(narrowed.budget("50%"))) == as_json(plan)
    assert narrowed.untouched == rest
    with pytest.raises(hpr.HprError, match="matches no site"):
        planner.draft(model, profile, PlanOptions(only="decoder.*"))
    with pytest.raises(hpr.HprError, match="no site is left"):
        planner.draft(model, profile, PlanOptions(only="pooler.*"))


@pytest.mark.parametrize("name", NAMES)
def test_operators_can_be_restricted(model, profile, draft: Draft, name: str) -> None:
    alone = planner.draft(model, profile, PlanOptions(operators=[name], align=False))
    if name == KEEP:
        with pytest.raises(hpr.HprError, match="smallest plan"):
            alone.best(alone.budget("80%"))
        return
    plan = alone.best(alone.budget("90%"))
    plan.validate(draft.anatomy)
    assert name in used(plan) <= {name, KEEP}
    for percent in ("90%", "60%"):
        try:
            single = alone.best(alone.budget(percent))
        except hpr.HprError:
            continue
        assert draft.plain.best(draft.budget(percent)).damage <= single.damage * (1 + 1e-9)


def test_without_an_operator(draft: Draft) -> None:
    budget = draft.budget("50%")
    best = draft.best(budget)
    for name in sorted(used(best) - {KEEP}):
        plan = draft.without(name, budget)
        assert name not in used(plan)
        assert plan.damage >= best.damage * (1 - 1e-9)
        assert plan.parameters(draft.anatomy) <= budget.parameters
        assert plan.diagnostics["label"] == f"without {name}"


def test_alternatives_are_distinct_and_within_the_budget(draft: Draft) -> None:
    budget = draft.budget("50%")
    plans = draft.alternatives(budget, 6)
    assert 2 <= len(plans) <= 6
    assert as_json(plans[0]) == as_json(draft.best(budget))
    assert len({json.dumps(plan.to_dict()["sites"]) for plan in plans}) == len(plans)
    for plan in plans:
        plan.validate(draft.anatomy)
        assert 0.99 * budget.parameters < plan.parameters(draft.anatomy) <= budget.parameters
    assert len(draft.alternatives(budget, 1)) == 1


def test_unknown_operators() -> None:
    with pytest.raises(hpr.HprError, match="no operator 'svd'; there are keep, low rank"):
        known_operators(["low rank", "svd"])
    assert known_operators(None) == set(NAMES)


@pytest.mark.parametrize("names", [("low-rank", "tie+delta"), ["Low Rank", "tie + delta"], ("low rank", "tie  +delta")])
def test_an_operator_has_several_spellings(names) -> None:
    assert known_operators(PlanOptions(operators=names).operators) == {"low rank", "tie + delta"}


def test_tracks(draft: Draft) -> None:
    stack = [track for track in draft.tracks if "·" in track.name]
    assert [track.length for track in stack] == [4] * 6
    for track in stack:
        assert all(stop - start <= LONGEST_GROUP or (start, stop) == (0, 4) for start, stop in track.candidates)
        whole = {one.operator for one in track.candidates[0, 4] if not one.parts}
        assert whole == {"shared input basis", "shared output basis"}  # random weights have nothing in common
    assert {site.name for site in draft.fixed} == {"pooler.dense"}
    assert len(draft.tracks) == 6 + 3


def test_one_matrix_for_several_is_tried_where_weights_are_alike_or_it_is_named(model) -> None:
    shared = {name for name, operator in OPERATORS.items() if operator.shared}

    def offered(draft: Draft) -> set[str]:
        found = [track for track in draft.tracks if "output.dense" in track.name and "attention" not in track.name]
        return {one.operator for one in found[0].candidates[0, 4] if not one.parts}

    torch.manual_seed(0)
    looped = copy.deepcopy(model)
    for layer in looped.encoder.layer[1:]:
        layer.load_state_dict(looped.encoder.layer[0].state_dict())
        with torch.no_grad():
            layer.output.dense.weight.add_(0.1 * layer.output.dense.weight.std() * torch.randn_like(layer.output.dense.weight))
    found = hpr.profile(looped, [{"input_ids": torch.randint(3, looped.config.vocab_size, (8, 8))} for _ in range(2)])
    assert offered(planner.draft(looped, found, PlanOptions(align=False))) == shared
    for name, parameter in looped.named_parameters():
        if name.endswith("output.dense.weight"):
            torch.nn.init.normal_(parameter)
    found = hpr.profile(looped, [{"input_ids": torch.randint(3, looped.config.vocab_size, (8, 8))} for _ in range(2)])
    assert offered(planner.draft(looped, found, PlanOptions(align=False))) < shared
    assert offered(planner.draft(looped, found, PlanOptions(operators=NAMES, align=False))) == shared


def test_a_budget_in_bytes_counts_the_models_own_dtype(model, draft: Draft) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    profile = hpr.profile(half, [{"input_ids": torch.randint(3, 200, (8, 10))}], "embedding")
    drafted = planner.draft(half, profile, PlanOptions(operators=["low rank"]))
    assert drafted.budget("113.536KB").parameters == 24_000
    assert draft.budget("113.536KB").parameters == 12_000
    assert drafted.narrowed("encoder.*").budget("113.536KB").parameters == 24_000


def test_boundaries_are_probabilities(draft: Draft) -> None:
    plan = draft.best(draft.budget("50%"))
    found = boundary_probabilities(draft.tracks, plan.diagnostics["solver"]["multiplier"], 0.05 * plan.damage)
    assert set(found) == {track.name for track in draft.tracks if " · " in track.name}  # not the rows of an embedding
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for one in found.values():
        assert all(0 <= p <= 1 + 1e-9 for p in one["probabilities"])
        assert one["entropy"] >= 0


def test_groups_do_not_leap_over_sites_that_are_not_planned(model, profile, draft: Draft) -> None:
    some = planner.draft(model, profile, PlanOptions(only="encoder.0.*,encoder.2.*,encoder.3.*"))
    for track in some.tracks:
        assert set(track.candidates) == {(0, 1), (1, 2), (2, 3), (1, 3)}
    plan = some.best(some.budget("50%"))
    plan.validate(draft.anatomy)
    groups = plan.groups()
    assert all({2, 3} == {draft.anatomy[name].layer for name in names} for names in groups)


def batches_for(model) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    names = {"input_ids": 7, **({"decoder_input_ids": 5} if model.config.is_encoder_decoder else {})}
    return [{name: torch.randint(3, 40, (6, length), generator=draw) for name, length in names.items()} for _ in range(3)]


def plant(model, anatomy: Anatomy, same: Callable[[Site], object]) -> None:
    """Give all sites for which ``same`` says the same one weight."""
    first: dict[object, torch.Tensor] = {}
    for site in anatomy.sites:
        if (key := same(site)) is not None:
            weight = weight_at(model, site).detach()
            weight.copy_(first.setdefault(key, weight))


@pytest.fixture(params=["bart", "t5"])
def encoder_decoder(request, build):
    """Layer i of the encoder and layer i of the decoder have the same self-attention and feed-forward weights."""
    model = build(request.param, tf.AutoModelForSeq2SeqLM)
    found = counterparts(model, describe(model))
    lower = {upper: below for below, upper in found.items()}

    def same(site: Site) -> object:
        slot = (site.stack or "", site.slot)
        key = lower.get(slot, slot)
        return (key, site.layer) if key in found else None

    plant(model, describe(model), same)
    return model


@pytest.fixture
def batches(encoder_decoder) -> list[dict[str, torch.Tensor]]:
    return batches_for(encoder_decoder)


@pytest.fixture
def encoder_decoder_profile(encoder_decoder, batches):
    return hpr.profile(encoder_decoder, batches)


def test_groups_span_encoder_and_decoder(encoder_decoder, batches, encoder_decoder_profile, tmp_path) -> None:
    model, profile = encoder_decoder, encoder_decoder_profile
    draft = planner.draft(model, profile)
    kept = sum(site.parameters for site in draft.anatomy.sites if site.stack == "encoder" and site.kind == "linear")
    plan = draft.best(draft.budget(str(draft.anatomy.total_parameters - kept)))  # just what sharing all of them saves
    plan.validate(draft.anatomy)
    assert plan.damage == 0
    spanning = [group for group in plan.groups() if len({draft.anatomy[name].stack for name in group}) == 2]
    assert len(spanning) == 6 * 2
    assert all([draft.anatomy[name].layer for name in group] in ([0, 0], [1, 1]) for group in spanning)
    assert not any("encoder_attn" in name or "EncDec" in name for group in spanning for name in group)
    student = hpr.share(model, plan, profile)
    with torch.no_grad():
        expected, found = model(**batches[0]).logits, student(**batches[0]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        student.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**batches[0]).logits, found)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in student.parameters())
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    generated = [one.generate(batches[0]["input_ids"], max_new_tokens=6, do_sample=False) for one in (student, loaded)]
    assert torch.equal(*generated)
    dense = hpr.unshare(loaded)
    assert describe(dense).total_parameters == draft.anatomy.total_parameters


def test_an_encoder_decoders_identity_plan_and_refit(encoder_decoder, batches, encoder_decoder_profile) -> None:
    model, profile = encoder_decoder, encoder_decoder_profile
    draft = planner.draft(model, profile, PlanOptions(operators=["shared input basis"]))
    whole = draft.best(draft.budget("100%"))
    assert all(entry.operator == KEEP for entry in whole.entries.values())
    with torch.no_grad():
        assert torch.equal(hpr.share(model, whole, profile)(**batches[0]).logits, model(**batches[0]).logits)
        plan = draft.best(draft.budget(str(least(draft) + 500)))
        assert any(len({draft.anatomy[name].stack for name in group}) == 2 for group in plan.groups())
        student = hpr.share(model, plan, profile)
        before = (student(**batches[0]).logits - model(**batches[0]).logits).square().mean()
        hpr.refit(student, model, batches, plan, profile)
        assert (student(**batches[0]).logits - model(**batches[0]).logits).square().mean() < before


def test_narrowing_an_encoder_decoder_leaves_the_other_stack(encoder_decoder, encoder_decoder_profile) -> None:
    profile = encoder_decoder_profile
    draft = planner.draft(encoder_decoder, profile)
    for pattern in ("encoder.*", "decoder.*"):
        narrowed, anew = draft.narrowed(pattern), planner.draft(encoder_decoder, profile, PlanOptions(only=pattern))
        assert {track.name: set(track.candidates) for track in narrowed.tracks} == {
            track.name: set(track.candidates) for track in anew.tracks
        }
        budget = anew.budget("60%")
        assert narrowed.best(budget).damage == pytest.approx(anew.best(budget).damage)
        assert narrowed.untouched == anew.untouched


@pytest.mark.parametrize("groups", [((0, 2), (1, 3)), ((0, 3), (1, 2)), ((0, 3), (1,), (2,))])
def test_a_planted_grouping_is_found(model, groups) -> None:
    copy = tf.BertModel(model.config).eval()
    copy.load_state_dict(model.state_dict())
    group_of = {layer: number for number, layers in enumerate(groups) for layer in layers}
    plant(copy, describe(copy), lambda site: None if site.layer is None else (site.slot, group_of[site.layer]))
    draw = torch.Generator().manual_seed(0)
    profile = hpr.profile(copy, [{"input_ids": torch.randint(3, 200, (8, 10), generator=draw)}], "embedding")
    draft = planner.draft(copy, profile)
    firsts = {None, *(group[0] for group in groups)}
    saved = sum(site.parameters for site in draft.anatomy.sites if site.layer not in firsts)
    plan = draft.best(draft.budget(str(draft.anatomy.total_parameters - saved)))
    assert plan.damage == pytest.approx(0, abs=1e-12)
    found = {tuple(draft.anatomy[name].layer for name in group) for group in plan.groups()}
    assert found == {group for group in groups if len(group) > 1}
    json.dumps(plan.to_dict(), allow_nan=False)
    report = render_report(plan.to_dict(), {"boundaries": boundary_probabilities(draft.tracks, 0.0, 0.1)})
    assert "encoder" in report


def test_composites_know_which_operators_they_need(draft: Draft) -> None:
    budget = draft.budget("50%")
    for name in sorted(used(draft.best(budget)) - {KEEP}):
        assert name in NAMES
    alone = restrict(draft.tracks, {"shared output basis"})
    composites = [one for track in alone for one in track.candidates.get((0, 4), ()) if one.parts]
    assert composites
    assert set(operators(alone)) == {KEEP, "shared output basis"}


def test_another_models_profile_is_refused(profile) -> None:
    torch.manual_seed(1)
    other = tf.BertModel(
        tf.BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=200)
    )
    with pytest.raises(hpr.HprError, match="fingerprint"):
        planner.draft(other, profile)
