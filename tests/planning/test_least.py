"""The least budgets known before a profile: never above what a plan can reach, and said before anything is measured."""

import pytest
import torch
import transformers as tf
from torch import nn

import hpr
from hpr.errors import BudgetError
from hpr.planning.least import least_parameters
from hpr.planning.planner import draft
from hpr.rounding.least import least_bytes
from hpr.runtime.seeds import check_seed

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
BATCHES = [{"input_ids": torch.randint(4, 60, (8, 9), generator=torch.Generator().manual_seed(index))} for index in range(8)]


def bert() -> nn.Module:
    torch.manual_seed(0)
    return tf.BertForMaskedLM(tf.BertConfig(**SIZES)).eval()


@pytest.mark.parametrize("only", [None, "encoder.*", "*.output.dense"])
@pytest.mark.parametrize("operators", [None, ("low rank",), ("tie",)])
def test_no_plan_is_smaller(only: str | None, operators: tuple[str, ...] | None) -> None:
    model = bert()
    anatomy, options = hpr.describe(model), hpr.PlanOptions(only=only, operators=operators)
    drafted = draft(model, hpr.profile(model, BATCHES[:2]), options)
    smallest = drafted.untouched + drafted._smallest
    least = least_parameters(model, anatomy, options)
    assert least <= smallest
    if only == "encoder.*" and operators is None:
        assert least > 0.8 * smallest


def test_no_coded_file_is_smaller() -> None:
    model = bert()
    least = least_bytes(model)
    plan = hpr.plan(model, hpr.profile(model, BATCHES, structure=False), f"{4 * least / 1000:.3f}KB")
    assert least < plan.diagnostics["bytes"] <= 4 * least


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("101%", "give at most 100%"),
        ("11M", "more than the 45,376 that the model has"),
        ("50MB", r"50,000,000 bytes, the original has 187,792"),
        ("0.5", r"0\.5 parameters, less than a model can have: for a share of the model write 50%"),
        ("50", "50 parameters, less than a model can have: for a share of the model write 50%"),
        ("2000", r"2,000 parameters, but a plan of this model needs at least 2,828 \(6\.2% of all\)"),
        ("5%", "Raise the budget"),
        ("0.3KB", r"300 bytes, but this model takes \d+ even if every number is rounded to 0: give a larger budget"),
        ("0.1%bytes", "even if every number is rounded to 0"),
    ],
)
def test_a_budget_that_cannot_be_met_is_said_before_the_profile(
    budget: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("compress", "coded"):  # nothing is measured
        monkeypatch.setattr(f"hpr.pipeline.{module}.profile", lambda *_, **__: pytest.fail("a profile was measured"))
    with pytest.raises(BudgetError, match=said):
        hpr.compress(bert(), budget, BATCHES)


@pytest.mark.parametrize("seed", [2**64, -1, 10**20, 1.5, "7", None, True])
def test_seeds_that_no_generator_takes(seed: object) -> None:
    for make in (check_seed, lambda one: hpr.PlanOptions(seed=one), lambda one: hpr.Recipe(seed=one)):
        with pytest.raises(hpr.HprError, match=r"the seed is .*: give a whole number from 0 to 2\^64 - 1"):
            make(seed)
    with pytest.raises(hpr.HprError, match="the seed is"):
        hpr.profile(bert(), BATCHES, seed=seed)  # type: ignore[arg-type]


def test_the_largest_seed_works() -> None:
    model = bert()
    made = hpr.compress(model, "80%", BATCHES, options=hpr.PlanOptions(plans=1, seed=2**64 - 1), heal="2steps")
    assert made.metrics["seed"] == 2**64 - 1
