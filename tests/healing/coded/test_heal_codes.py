"""Healing in codes: within the budget, never worse by validation, the same again with the same seed, saved and loaded alike."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import HEADS
from hpr.coding.codes import Product
from hpr.errors import HprError
from hpr.evaluation.cost import coded_bytes, disk_bytes
from hpr.evaluation.divergence import divergence
from hpr.healing.coded.budget import ByteBudget, put
from hpr.healing.coded.heal import check_recipe, heal_codes
from hpr.healing.coded.latents import named
from hpr.healing.coded.optimizer import Pressure
from hpr.healing.coded.trainer import CodedHealing
from hpr.healing.recipe import Recipe
from hpr.nn.coded import codes_of, other_codes_of
from hpr.profiling.objectives import objective_for
from hpr.rounding.plan import CodedPlan, plan_bytes

SHARE, RATE = 0.08, 3e-4


class Speech(nn.Module):
    """Frames to classes, and no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.second(self.first(frames).relu()).relu().mean(1))


def batches(family: str, count: int = 48) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    if family == "speech":
        return [{"frames": torch.randn(8, 6, 12, generator=draw)} for _ in range(count)]
    ids = [torch.randint(3, 40, (8, 7), generator=draw) for _ in range(count)]
    return [{"input_ids": one} | ({"labels": one} if family in ("bart", "t5") else {}) for one in ids]


@pytest.fixture
def case(build: Callable[..., nn.Module]) -> Callable[..., tuple[nn.Module, CodedPlan, ByteBudget]]:
    """``case("bert")``: a model, its plan at a small number of bytes, and the budget that the plan keeps."""

    def make(family: str, bits: int | None = None, share: float = SHARE) -> tuple[nn.Module, CodedPlan, ByteBudget]:
        torch.manual_seed(0)
        model = Speech().eval() if family == "speech" else build(family, HEADS[family])
        with torch.no_grad():
            for parameter in model.parameters():  # fresh weights are so small that rounding hardly changes the outputs
                parameter += 0.2 * torch.randn_like(parameter)
        profile = hpr.profile(model, batches(family, 8), "classification" if family == "speech" else None, structure=False)
        limit = int(share * disk_bytes(model))
        made = plan_bytes(model, profile, "budget", limit, bits=bits)
        assert made.plan.rounding is not None
        return model, made, ByteBudget(limit, made.plan.rounding, profile.others)

    return make


@pytest.mark.parametrize("family", [*HEADS, "speech"])
def test_a_healed_model_keeps_its_budget_and_is_better_and_is_what_its_file_says(
    family: str, case: Callable, tmp_path: Path
) -> None:
    model, made, budget = case(family)
    first = {site: one.stream for site, one in codes_of(made.student).items()}
    steps = 210 if family == "speech" else 120
    found = heal_codes(made.student, model, batches(family), Recipe(steps, checks=3, learning_rate=RATE, augment=None), budget)
    assert found.after.mean < found.before.mean
    assert found.best_step > 0
    assert [row["step"] for row in found.history] == [steps // 3, 2 * steps // 3, steps]
    assert disk_bytes(made.student) <= budget.limit
    assert any(one.stream != first[site] for site, one in codes_of(made.student).items())
    folder = hpr.save(made.student, tmp_path / "healed")
    assert (folder / "model.safetensors").stat().st_size == disk_bytes(made.student)
    again = hpr.load(copy.deepcopy(model), folder)
    assert all(torch.equal(one, made.student.state_dict()[name]) for name, one in again.state_dict().items())
    hpr.save(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_validation_is_never_worse_and_a_student_without_gain_keeps_its_codes(case: Callable) -> None:
    model, made, budget = case("bert")
    first = copy.deepcopy(made.student)
    found = heal_codes(made.student, model, batches("bert"), Recipe("6steps", checks=2, learning_rate=1.0), budget)
    assert found.best_step == 0
    assert found.after == found.before
    assert min(row["validation"] for row in found.history) > found.before.mean
    assert all(torch.equal(one, made.student.state_dict()[name]) for name, one in first.state_dict().items())
    assert {site: one.stream for site, one in codes_of(first).items()} == {
        site: one.stream for site, one in codes_of(made.student).items()
    }


def test_the_validation_of_the_best_check_is_that_of_the_student_that_is_given_back(case: Callable) -> None:
    model, made, budget = case("bert")
    data = batches("bert")
    found = heal_codes(made.student, model, data, Recipe("120steps", checks=3, learning_rate=RATE), budget)
    goal = objective_for(model, "masked-lm")
    best = min(row["validation"] for row in found.history)
    assert divergence(made.student, model, data[::8], goal).mean == pytest.approx(best, rel=1e-5)
    assert found.after.mean == pytest.approx(best, rel=1e-5)


def test_the_same_seed_gives_the_same_codes_and_another_seed_others(case: Callable) -> None:
    streams = []
    for seed in (0, 0, 1):
        model, made, budget = case("bert")
        heal_codes(made.student, model, batches("bert"), Recipe("120steps", checks=1, learning_rate=RATE, seed=seed), budget)
        streams.append([one.stream for one in codes_of(made.student).values()])
    assert streams[0] == streams[1]
    assert streams[0] != streams[2]


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_stay_in_their_range(bits: int, case: Callable) -> None:
    model, made, budget = case("bert", bits, 0.2)
    heal_codes(made.student, model, batches("bert"), Recipe("20steps", checks=1, learning_rate=2e-3), budget)
    largest = max(abs(one.codes().values).max() for one in codes_of(made.student).values())
    assert largest <= 2 ** (bits - 1) - 1


def test_a_state_that_is_too_large_is_brought_within_the_budget_by_the_fewest_smaller_codes(case: Callable) -> None:
    _, made, budget = case("bert")
    healing = CodedHealing(made.student, budget)
    draw = torch.Generator().manual_seed(0)
    for latent in healing.latents:
        latent.value.data += 0.6 * torch.randn(latent.value.shape, generator=draw)
    free = replace(budget, limit=10**9).fit(made.student, healing.latents)
    assert free is not None
    assert free.bytes > budget.limit
    tight = replace(budget, limit=int(0.97 * free.bytes)).fit(made.student, healing.latents)
    assert tight is not None
    assert 0.98 * 0.97 * free.bytes < tight.bytes <= 0.97 * free.bytes
    few, many = (dict(part for site, one in file.codes.items() for part in named(site, one)) for file in (tight, free))
    above, changed = [], []
    for part, latent in healing.latents.items():
        sizes = latent.value.detach().abs() + 0.5
        above.append((sizes - sizes.floor()).flatten())  # how far a latent is above the threshold that rounds it up
        changed.append(torch.from_numpy(few[part].values != many[part].values).flatten())
    margins, smaller = torch.cat(above), torch.cat(changed)
    positive = torch.cat([torch.from_numpy(one.values != 0).flatten() for one in many.values()])
    assert smaller.any()
    assert margins[smaller].max() <= margins[positive & ~smaller].min() + 1e-5
    assert all((abs(few[part].values) <= abs(many[part].values)).all() for part in many)
    put(made.student, tight)
    assert coded_bytes(made.student, tight.coded, tight.others) == tight.bytes
    assert replace(budget, limit=100).fit(made.student, healing.latents) is None


def test_a_check_leaves_training_as_it_was(case: Callable) -> None:
    _, made, budget = case("bert")
    healing = CodedHealing(made.student, budget)
    with torch.no_grad():
        for name, one in made.student.named_parameters():
            if name in other_codes_of(made.student):
                one += 0.01 * torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    before = {name: one.clone() for name, one in made.student.state_dict().items()}
    with healing.as_file() as fitted:
        assert fitted is not None
        inside = made.student.state_dict()
        assert any(not torch.equal(one, inside[name]) for name, one in before.items())
        assert all(torch.equal(inside[name], one.weight().view_as(inside[name])) for name, one in fitted.others.items())
    assert all(torch.equal(one, made.student.state_dict()[name]) for name, one in before.items())


def test_the_price_of_a_bit_rises_while_the_file_is_too_large_and_falls_while_it_is_small(case: Callable) -> None:
    _, made, budget = case("bert")
    latents = CodedHealing(made.student, budget).latents
    for limit, rises in ((0.8, True), (1.25, False)):
        pressure = Pressure(latents, replace(budget, limit=int(limit * made.bytes)), made.bytes)
        pressure.price = 1.0
        pressure.look()
        assert pressure.bytes == pytest.approx(made.bytes)
        assert (pressure.price > 1) is rises
        assert set(pressure.slopes) == {site for site, _ in latents.items()}


def test_the_first_price_is_what_a_bit_is_worth_and_the_first_batch_alone_sets_it(case: Callable) -> None:
    model, made, budget = case("bert")
    finer = plan_bytes(model, hpr.profile(model, batches("bert", 8), structure=False), "budget", int(1.1 * budget.limit))
    goal = objective_for(model, "masked-lm")
    coarse, fine = (divergence(one.student, model, batches("bert"), goal).mean for one in (made, finer))
    pressure = Pressure(CodedHealing(made.student, budget).latents, budget, made.bytes)
    pressure.begin(coarse)
    assert pressure.price == pytest.approx((coarse - fine) / (8 * (finer.bytes - made.bytes)), rel=0.6)
    pressure.begin(9.0)
    assert pressure.price < coarse


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"checkpoints": "folder"}, "checkpoints is 'folder'"),
        ({"sharded": True}, "sharded is True"),
        ({"blocks": 0.2}, "blocks is 0.2"),
        ({"ramp": 0.2}, "ramp is 0.2"),
        ({"shared_rate": 0.5}, "shared_rate is 0.5"),
        ({"router_rate": 5.0}, "router_rate is 5.0"),
        ({"delta_decay": 0.1}, "delta_decay is 0.1"),
    ],
)
def test_settings_that_codes_do_not_have_are_refused(changes: dict, name: str, bert: nn.Module) -> None:
    with pytest.raises(HprError, match=rf"{name}.*leave {next(iter(changes))} out"):
        check_recipe(bert, Recipe(**changes))
    check_recipe(bert, Recipe(learning_rate=1e-3, checks=2, accumulate=2, seed=3))


def test_half_precision_is_refused_with_its_mend() -> None:
    model = tf.BertModel(tf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(HprError, match=r"is bfloat16.*Give model.float\(\)"):
        check_recipe(model.bfloat16(), Recipe())


def test_a_model_with_a_product_is_healed_within_its_budget(bert: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        thin = bert.encoder.layer[1].intermediate.dense.weight
        thin.copy_(thin[:, :1] @ thin[:1])
    profile = hpr.profile(bert, batches("bert", 8), structure=False)
    limit = int(SHARE * disk_bytes(bert))
    made = plan_bytes(bert, profile, "budget", limit)
    site = "encoder.layer.1.intermediate.dense"
    first = {name: one.stream for name, one in codes_of(made.student).items()}
    recipe = Recipe(120, checks=3, learning_rate=RATE, augment=None)
    assert made.plan.rounding is not None
    found = heal_codes(made.student, bert, batches("bert"), recipe, ByteBudget(limit, made.plan.rounding, profile.others))
    assert found.after.mean < found.before.mean
    assert disk_bytes(made.student) <= limit
    assert any(one.stream != first[name] for name, one in codes_of(made.student).items())
    healed = codes_of(made.student)[site].codes()
    assert isinstance(healed, Product)
    assert torch.equal(made.student.get_parameter(f"{site}.weight"), healed.weight())
    again = hpr.load(copy.deepcopy(bert), hpr.save(made.student, tmp_path / "healed"))
    assert all(torch.equal(one, made.student.state_dict()[name]) for name, one in again.state_dict().items())
