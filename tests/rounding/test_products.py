import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from hpr.anatomy.model import Site
from hpr.coding.codes import Codes, Product
from hpr.coding.stream import estimate
from hpr.nn.coded import codes_of
from hpr.profiling.profile import SiteStatistics
from hpr.rounding.matrices import Rule
from hpr.rounding.products import Factoring, price, worthwhile
from hpr.rounding.sites import round_sites
from hpr.rounding.whitening import Roots

SITE = Site("layer", "linear", 48, 64, False)
DAMPINGS = (0.15, 0.15)


def moment(size: int, seed: int) -> Tensor:
    factor = torch.randn(size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T / (2 * size)


def low_rank(height: int, width: int, rank: int, noise: float = 0.0) -> Tensor:
    make = torch.Generator().manual_seed(5)
    u, v, rest = (
        torch.randn(*shape, dtype=torch.float64, generator=make) for shape in ((height, rank), (rank, width), (height, width))
    )
    return u @ v / rank**0.5 + noise * rest


def prepared(weight: Tensor, diagonal: bool = False) -> tuple[Factoring, Codes, float]:
    """A factoring, the codes of the whole weight, and the step."""
    left, right = moment(weight.shape[0], 0), moment(weight.shape[1], 1)
    statistics = (
        SiteStatistics(left.diagonal().clone(), right.diagonal().clone(), 7.0) if diagonal else SiteStatistics(left, right, 7.0)
    )
    whitened = Roots(*DAMPINGS).whiten(SITE, weight, statistics)
    [codes] = round_sites([whitened], 0.3, Rule())
    return Factoring.of(whitened, statistics, DAMPINGS), codes, 0.3


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_singular_values_are_those_of_the_metric(shape: tuple[int, int], diagonal: bool) -> None:
    one, _, _ = prepared(low_rank(*shape, 6), diagonal)
    zero = Codes(np.zeros(shape, np.int32), np.zeros(shape[0], np.int32), np.zeros(shape[1], np.int32), 1.0)
    assert float(one.values.square().sum()) == pytest.approx(one.damage(zero), rel=1e-9)
    assert float(one.values[6:].square().sum()) == pytest.approx(0.0, abs=1e-12 * float(one.values[0]) ** 2)
    fine = one.codes(6, 1e-2)
    assert fine.is_exact
    assert one.damage(fine) < 1e-6 * one.damage(zero)


def test_the_damage_of_a_product_is_about_that_of_its_numbers() -> None:
    one, _, step = prepared(low_rank(48, 64, 6))
    numbers = 6 * (48 + 64)
    assert one.damage(one.codes(6, step / 10)) == pytest.approx(numbers * (step / 10) ** 2 / 12, rel=0.25)


def test_a_weight_of_low_rank_becomes_a_product_and_a_random_one_stays_whole() -> None:
    one, codes, step = prepared(low_rank(48, 64, 5, noise=1e-3))
    savings = worthwhile([one], {"layer": codes}, step)
    assert 3 <= savings["layer"].rank <= 8
    made = one.codes(savings["layer"].rank, step)
    assert made.is_exact
    assert one.damage(made) < one.damage(codes)
    smaller = estimate(codes) - estimate(made.u) - estimate(made.v)
    assert savings["layer"].bytes == pytest.approx(smaller, rel=1e-6)
    assert smaller > 0
    one, codes, step = prepared(low_rank(48, 64, 48))
    assert worthwhile([one], {"layer": codes}, step) == {}


def test_a_bit_is_worth_what_the_step_gives_for_it() -> None:
    """Halving the step costs a bit a number and divides its damage by four: the slope lies between the two steps."""
    step = 0.1
    saved = step**2 / 12 - (step / 2) ** 2 / 12
    assert price(step / 2) < saved < price(step)


@pytest.fixture
def thin(bert: nn.Module, ids: Tensor) -> tuple[nn.Module, hpr.Profile]:
    """A BERT with a feed-forward matrix of rank 1."""
    model = copy.deepcopy(bert)
    weight = model.encoder.layer[1].intermediate.dense.weight
    with torch.no_grad():
        weight.copy_(weight[:, :1] @ weight[:1])
    return model, hpr.profile(model, [{"input_ids": ids}])


def test_a_plan_with_products_survives_its_file_and_gives_the_same_model(
    thin: tuple[nn.Module, hpr.Profile], ids: Tensor, tmp_path: Path
) -> None:
    model, profile = thin
    plan = hpr.plan(model, profile, "40%bytes")
    name = "encoder.layer.1.intermediate.dense"
    assert plan.entries[name].operator == "low rank"
    assert "low rank" in str(plan)
    plan.save(tmp_path / "plan.json")
    first, second = (hpr.share(model, each, profile) for each in (plan, hpr.Plan.load(tmp_path / "plan.json")))
    assert isinstance(codes_of(first)[name].codes(), Product)
    assert all(torch.equal(first.state_dict()[key], value) for key, value in second.state_dict().items())
    loaded = tf.AutoModel.from_pretrained(hpr.save(first, tmp_path / "coded"))
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, first(ids).last_hidden_state)
    again = hpr.save(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "coded" / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").stat().st_size == pytest.approx(plan.diagnostics["bytes"], rel=0.005)
    plain = hpr.load(copy.deepcopy(model), tmp_path / "coded")
    with torch.no_grad():
        assert torch.equal(plain(ids).last_hidden_state, first(ids).last_hidden_state)
        kept = hpr.extras.keep_integers(loaded)
        assert torch.equal(kept(ids).last_hidden_state, first(ids).last_hidden_state)


def test_products_and_ranges_of_codes_exclude_one_another(thin: tuple[nn.Module, hpr.Profile]) -> None:
    model, profile = thin
    plan = hpr.plan(model, profile, "40%bytes", hpr.PlanOptions(bits=8))
    assert {entry.operator for entry in plan.entries.values()} == {"keep"}
