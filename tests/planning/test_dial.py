"""A dial of speed beside the budget: what is asked for is met, predicted and measured."""

import json

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import hpr
from hpr.cli.program import app
from hpr.errors import BudgetError, PlanError
from hpr.evaluation.cost import forward_flops
from hpr.planning import planner
from hpr.reporting.card import render_card
from hpr.reporting.formatting import speed_lines
from hpr.reporting.report import render_report
from hpr.timing.call import call_batch


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64, "vocab_size": 200}
    return tf.BertModel(tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24)).eval()


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 200, (8, 10), generator=draw)} for _ in range(12)]


@pytest.fixture(scope="module")
def profile(model, batches):
    return hpr.profile(model, batches, "embedding")


def options(**settings):
    return hpr.PlanOptions(align=False, plans=1, shape="1x16", **settings)


def measured_share(model, student):
    batch = call_batch(model, options(flops="1x").target)
    return forward_flops(student, batch) / forward_flops(model, batch)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_operations_are_as_predicted(model, profile, share):
    plan = hpr.plan(model, profile, "80%", options(flops=f"{share}x"))
    speed = plan.diagnostics["flops"]
    measured = measured_share(model, hpr.share(model, plan, profile))
    assert speed["target"] == share
    assert measured == pytest.approx(speed["predicted"])
    assert 0.95 * share < measured <= share
    assert plan.parameters(hpr.describe(model)) <= plan.budget.parameters
    assert hpr.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).diagnostics["flops"] == speed


def test_without_a_tighter_budget_only_speed_counts(model, profile):
    plan = hpr.plan(model, profile, "100%", options(flops="0.6x"))
    assert measured_share(model, hpr.share(model, plan, profile)) <= 0.6
    assert plan.entries["embeddings.word_embeddings"].operator == "keep", (
        "a table costs no operations, so nothing is lost there"
    )


def test_faster_is_never_predicted_to_be_better(model, profile):
    damages = [hpr.plan(model, profile, "80%", options(flops=text)).damage for text in ("0.9x", "0.6x", "0.3x")]
    assert damages == sorted(damages)
    free = hpr.plan(model, profile, "80%", options())
    assert free.damage <= damages[0] * (1 + 1e-9)
    assert "flops" not in free.diagnostics


def test_time_is_measured(model, profile):
    plan = hpr.plan(model, profile, "80%", options(latency="1x"))
    assert 0 < plan.diagnostics["latency"]["predicted"] <= 1


def test_impossible_targets_name_what_is_possible(model, profile):
    with pytest.raises(BudgetError, match=r"flops is 0.01x at 1x16, but .* without 3 layers it is 0.0\dx: give --flops 0.0\dx"):
        hpr.plan(model, profile, "80%", options(flops="0.01x"))
    with pytest.raises(
        BudgetError, match=r"fastest plan within 80% is predicted to have 0.\d\dx: give --flops 0.\d\dx or more"
    ):
        hpr.plan(model, profile, "80%", options(flops="0.06x"))


def test_settings_that_contradict_each_other(model, profile):
    with pytest.raises(PlanError, match="set one of them"):
        options(latency="0.7x", flops="0.7x")
    with pytest.raises(PlanError, match="routers"):
        options(latency="0.7x", routers=2)
    with pytest.raises(BudgetError, match="give a share"):
        options(latency="fast")
    with pytest.raises(BudgetError, match="leave latency out"):
        hpr.plan(model, profile, "20KB", hpr.PlanOptions(latency="0.7x"))


def test_narrowed_drafts_keep_the_ceiling_of_the_whole_call(model, profile):
    draft = planner.draft(model, profile, options(flops="0.7x"))
    narrow = draft.narrowed("encoder.*")
    plan = narrow.best(narrow.budget("100%"))
    assert plan.diagnostics["flops"]["predicted"] <= 0.7
    assert measured_share(model, hpr.share(model, plan, profile)) == pytest.approx(plan.diagnostics["flops"]["predicted"])


@pytest.fixture(scope="module")
def made(model, batches):
    return hpr.compress(model, "90%", batches, options=hpr.PlanOptions(align=False, plans=1, shape="1x16", flops="0.6x"))


def test_compress_measures_what_it_made(model, made):
    speed = made.metrics["speed"]["flops"]
    assert speed["measured"] == pytest.approx(speed["predicted"])
    assert measured_share(model, made.student) == pytest.approx(speed["measured"])
    assert speed["measured"] <= 0.6
    assert len(made.metrics["plans"]) > 1, "plans that drop layers or reuse attention are tried, too"


def test_the_report_and_the_card_say_so(made):
    (line,) = speed_lines(made.metrics["speed"])
    assert "at 1x16" in line
    assert "0.6x was asked for" in line
    plan = made.plan.to_dict()
    assert "x the original measured" in render_report(plan, made.metrics)
    assert "x the original measured" in render_card(plan, made.metrics)
    assert speed_lines({}) == []


def test_layers_are_dropped_where_nothing_else_is_fast_enough(model, batches):
    """With only one small weight free, no rank saves a half, but two of four layers do."""
    settings = options(flops="0.55x", only="encoder.*", operators=("tie",))
    made = hpr.compress(model, "100%", batches, options=settings)
    assert "dropped" in made.plan.layers.values()
    assert made.metrics["speed"]["flops"]["measured"] <= 0.55
    assert made.metrics["speed"]["flops"]["measured"] == pytest.approx(made.metrics["speed"]["flops"]["predicted"])


def test_the_commands_have_the_dial(tmp_path, model, profile):
    model.save_pretrained(tmp_path / "model")
    profile.save(tmp_path / "profile.safetensors")
    command = ["plan", str(tmp_path / "model"), "--profile", str(tmp_path / "profile.safetensors"), "--budget", "80%"]
    command += ["--no-align", "-o", str(tmp_path / "plan.json"), "--shape", "1x16"]
    done = CliRunner().invoke(app, [*command, "--flops", "0.6x"])
    assert done.exit_code == 0, done.output
    assert "0.6x was asked for" in " ".join(done.output.split())
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["diagnostics"]["flops"]["predicted"] <= 0.6
    assert CliRunner().invoke(app, [*command, "--flops", "0.001x"]).exit_code == 2
