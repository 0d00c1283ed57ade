"""A budget in parameters with a size of the file: factors are rounded and coded."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
import tiny_families
from conftest import HEADS, inputs_of
from hpr.evaluation.cost import disk_bytes
from hpr.layer_reuse.dead_weights import dead_weights
from hpr.layer_reuse.reuse import with_layers
from hpr.nn.bank import Factor, bank_of, parameters, terms_of
from hpr.operators.fitting import Fits
from hpr.plans.layer_states import DROPPED, KEYS, WEIGHTS
from hpr.plans.plan import keep_all
from hpr.plans.product import product
from hpr.plans.terms import factors_of
from hpr.rounding.factors import factor_profile, site_of
from hpr.rounding.shared import FactorRounder, round_shared

DAMPINGS = (0.15, 0.15)


@pytest.mark.parametrize("family", HEADS)
def test_a_saved_model_loads_with_bit_equal_outputs(
    family: str, build: Callable[..., nn.Module], ids: Tensor, tmp_path: Path
) -> None:
    model, inputs = build(family, HEADS[family]), inputs_of(family, ids)
    profile = hpr.profile(model, [inputs])
    plan = hpr.plan(model, profile, "60%", hpr.PlanOptions(bytes="30%bytes"))
    student = hpr.share(model, plan, profile)
    assert bank_of(student) is not None
    assert parameters(student) <= plan.budget.parameters
    folder = hpr.save(student, tmp_path / "coded")
    size = (folder / "model.safetensors").stat().st_size
    assert size == disk_bytes(student) == plan.diagnostics["bytes"]
    assert size <= 0.3 * disk_bytes(model)
    loaded = HEADS[family].from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)
    again = hpr.save(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    plain = hpr.load(copy.deepcopy(model), folder)
    dense = hpr.unshare(loaded)
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, student(**inputs).logits)
        assert torch.allclose(dense(**inputs).logits, student(**inputs).logits, atol=1e-4)


def test_the_metric_of_a_factor_is_the_damage_of_its_sites(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "50%")
    student = hpr.share(bert, plan, profile)
    bank = bank_of(student)
    assert bank is not None
    fits = Fits(bert, profile).aligned(plan.alignment)
    found = factor_profile(student, fits.profile or profile, DAMPINGS)
    plain = factor_profile(student, fits.profile or profile, (0.0, 0.0))
    users: dict[str, list[str]] = {}
    for path, terms in terms_of(student).items():
        for factor in factors_of(terms):
            users.setdefault(factor, []).append(path)
    checked = 0
    for factor, paths in users.items():
        statistics = plain.sites[site_of(factor)]
        if not statistics.has_gradient or len(paths) > 1 or "embeddings" in paths[0]:
            continue
        change = 1e-3 * torch.randn_like(bank[factor].weight)
        predicted = 0.5 * statistics.rows * quadratic(statistics, change.double())
        assert predicted == pytest.approx(damage_of_a_site(student, fits.profile or profile, paths[0], bank[factor], change))
        assert found.sites[site_of(factor)].fisher_trace > statistics.fisher_trace
        checked += 1
    assert checked > 3
    assert any(len(paths) > 1 for paths in users.values())


def quadratic(statistics: hpr.profiling.profile.SiteStatistics, change: Tensor) -> float:
    left = statistics.left if statistics.left.dim() > 1 else statistics.left.diag()
    right = statistics.right if statistics.right.dim() > 1 else statistics.right.diag()
    return float((change.T @ left @ change @ right).trace())


def damage_of_a_site(student: nn.Module, profile: hpr.Profile, path: str, factor: Factor, change: Tensor) -> float:
    """½ N tr(G E A Eᵀ) for the change E of a site's whole weight when a factor changes."""
    site = student.get_submodule(path)
    before = site.dense_weight().double()
    with torch.no_grad():
        factor.weight += change
        after = site.dense_weight().double()
        factor.weight -= change
    statistics = profile.sites[path]
    return 0.5 * statistics.rows * quadratic(statistics, (after - before).detach())


def test_a_fine_step_changes_nothing(bert: nn.Module, profile: hpr.Profile, ids: Tensor) -> None:
    plan = hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="90%bytes"))
    floats = hpr.share(bert, replace(plan, rounding=None), profile)
    with torch.no_grad():
        expected, found = floats(ids).last_hidden_state, hpr.share(bert, plan, profile)(ids).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-3)


def test_biases_absorb_what_rounding_does_to_the_mean(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="15%bytes"))
    floats, student = hpr.share(bert, replace(plan, rounding=None), profile), hpr.share(bert, plan, profile)
    fits = Fits(bert, profile).aligned(plan.alignment)
    paths = [path for path in terms_of(student) if fits.profile.sites[path].mean is not None]
    assert paths
    kept, lost = 0.0, 0.0
    for path in paths:
        mean = fits.profile.sites[path].mean.float()
        one, other = floats.get_submodule(path), student.get_submodule(path)
        change = (other.dense_weight() - one.dense_weight()).detach() @ mean
        lost += float(change.square().sum())
        kept += float((change + other.bias - one.bias).detach().square().sum())
    assert kept < 0.2 * lost  # biases are rounded as well


def test_a_plan_survives_its_file_and_names_its_rounding(bert: nn.Module, profile: hpr.Profile, tmp_path: Path) -> None:
    plan = hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="20%bytes"))
    plan.save(tmp_path / "plan.json")
    loaded = hpr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    first, second = (hpr.share(bert, each, profile).state_dict() for each in (plan, loaded))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "parameters, every number rounded" in str(plan)
    assert "by sharing" in str(plan)
    with pytest.raises(hpr.errors.PlanError, match="profile"):
        hpr.share(bert, plan)


def test_a_plan_that_keeps_everything_is_rounded_too(bert: nn.Module, profile: hpr.Profile, tmp_path: Path) -> None:
    plan = hpr.plan(bert, profile, "100%", hpr.PlanOptions(bytes="20%bytes"))
    student = hpr.share(bert, plan, profile)
    assert bank_of(student) is None
    size = (hpr.save(student, tmp_path / "coded") / "model.safetensors").stat().st_size
    assert size == plan.diagnostics["bytes"] <= 0.2 * disk_bytes(bert)


def test_what_cannot_be_is_refused_before_anything_is_measured(bert: nn.Module, profile: hpr.Profile) -> None:
    with pytest.raises(hpr.errors.BudgetError, match="no size"):
        hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="50%"))
    with pytest.raises(hpr.errors.BudgetError, match="bytes"):
        hpr.plan(bert, profile, "30%bytes", hpr.PlanOptions(bytes="20%bytes"))
    with pytest.raises(hpr.errors.PlanError, match="routers"):
        hpr.PlanOptions(bytes="6MB", routers=2)
    with pytest.raises(hpr.errors.BudgetError, match="cannot be met"):
        hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="0.1%bytes"))
    student = hpr.share(bert, hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="20%bytes")), profile)
    with pytest.raises(hpr.HprError, match="share factors"):
        hpr.extras.keep_integers(student)


def test_codes_of_factors_keep_a_range(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="20%bytes", bits=8))
    student = hpr.share(bert, plan, profile)
    sizes = [abs(one.codes().values).max() for one in hpr.nn.coded.codes_of(student).values()]
    assert max(sizes) <= 127


def test_a_changed_byte_is_an_error(bert: nn.Module, profile: hpr.Profile, tmp_path: Path) -> None:
    plan = hpr.plan(bert, profile, "50%", hpr.PlanOptions(bytes="20%bytes"))
    folder = hpr.save(hpr.share(bert, plan, profile), tmp_path / "coded")
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(hpr.HprError, match="damaged"):
        tf.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("state", [DROPPED, WEIGHTS, KEYS])
@pytest.mark.parametrize("name", ["BERT", "Qwen3"])
def test_layers_that_are_dropped_or_reuse_attention_are_rounded_too(state: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = tiny_families.FAMILIES[name]
    model = getattr(tf, family.model)(family.config()).eval()
    batch = family.batch(torch.Generator().manual_seed(1))
    anatomy, profile = hpr.describe(model), hpr.profile(model, [batch])
    states = {f"{anatomy.stacks[0].name}.1": state}
    plan = with_layers(keep_all(anatomy), anatomy, states, dead_weights(model, states, None if state == DROPPED else batch))
    floats = hpr.share(model, plan, profile)
    made = round_shared(floats, plan, profile, int(0.4 * disk_bytes(model)))
    folder = hpr.save(made.student, tmp_path / "coded")
    assert (folder / "model.safetensors").stat().st_size == made.bytes <= 0.4 * disk_bytes(model)
    loaded = type(model).from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], made.student(**batch)[0])
    again = hpr.share(model, made.plan, profile)
    assert all(torch.equal(one, again.state_dict()[key]) for key, one in made.student.state_dict().items())


def test_biases_of_shared_sites_are_corrected_in_half_precision_too(build: Callable[..., nn.Module], ids: Tensor) -> None:
    model = build("bert").to(torch.bfloat16)
    profile = hpr.profile(model, [{"input_ids": ids}])
    plan = hpr.plan(model, profile, "60%")
    student = hpr.share(model, plan, profile)
    fits = Fits(model, profile).aligned(plan.alignment)
    rounder = FactorRounder(student, fits.profile, *DAMPINGS)
    codes = rounder.codes(1e-5)
    values, bank, checked = rounder._corrected(codes), bank_of(student), 0
    assert bank is not None
    for path, terms in terms_of(student).items():
        module, mean = student.get_submodule(path), fits.profile.sites[path].mean
        if mean is None or getattr(module, "bias", None) is None:
            continue
        floats = {name: bank[name].dense().detach().double() for name in factors_of(terms)}
        rounded = {name: bank[name].dense(codes[site_of(name)].weight().bfloat16()).double() for name in factors_of(terms)}
        shape = module.out_features, module.in_features
        change = (product(terms, floats, *shape) - product(terms, rounded, *shape)) @ mean
        expected = (module.bias.detach() + change.bfloat16()).double()
        assert torch.allclose(values[f"{path}.bias"].double(), expected, rtol=2**-8, atol=1e-6)
        checked += 1
    assert checked > 3
