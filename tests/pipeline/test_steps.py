"""The steps one by one: evaluate and heal read outputs as the student's profile did."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import hpr
from hpr.evaluation.divergence import divergence
from hpr.evaluation.evaluate import evaluate
from hpr.healing.heal import heal
from hpr.profiling.objectives import OBJECTIVES

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, nn.Module, Batches]:
    """A BERT whose class has the default ``hidden``, a student of it profiled as ``embedding``, and batches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    model = tf.BertModel(tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24)).eval()
    batches = [{"input_ids": torch.randint(0, 40, (4, 6)), "attention_mask": torch.ones(4, 6).long()} for _ in range(8)]
    profile = hpr.profile(model, batches, objective="embedding")
    return model, hpr.share(model, hpr.plan(model, profile, "50%"), profile), batches


def nats(figures: dict) -> float:
    return next(row["after"] for row in figures["quality"] if row["name"] == "Divergence from the original")


def test_evaluate_reads_outputs_as_the_students_profile_did(case: tuple, tmp_path: Path) -> None:
    model, student, batches = case
    expected, other = (divergence(student, model, batches, OBJECTIVES[name]).mean for name in ("embedding", "hidden"))
    assert other > 2 * expected > 0
    assert nats(hpr.evaluate(student, model, batches, repeats=0)) == pytest.approx(expected)
    assert nats(evaluate(student, model, batches, repeats=0)) == pytest.approx(expected)
    student.save_pretrained(tmp_path / "out")
    loaded = tf.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert nats(hpr.evaluate(loaded, model, batches, repeats=0)) == pytest.approx(expected)
    assert nats(hpr.evaluate(student, model, batches, objective="hidden", repeats=0)) == pytest.approx(other)


def test_a_profile_for_bytes_alone_has_the_same_curvature_and_no_structure(case: tuple) -> None:
    model, _, batches = case
    whole, bare = (hpr.profile(model, batches, objective="embedding", structure=structure) for structure in (True, False))
    assert whole.layers
    assert whole.symmetries
    assert not bare.layers
    assert not bare.symmetries
    for name, site in whole.sites.items():
        assert torch.equal(site.left, bare.sites[name].left)
    assert hpr.plan(model, bare, "60%bytes").rounding == hpr.plan(model, whole, "60%bytes").rounding


def test_a_student_without_a_profile_takes_the_objective_of_its_teacher(case: tuple) -> None:
    model, _, batches = case
    profile = hpr.profile(model, batches, objective="embedding")
    student = hpr.share(model, hpr.plan(model, profile, "50%", hpr.PlanOptions(align=False)))
    expected = divergence(student, model, batches, OBJECTIVES["hidden"]).mean
    assert nats(hpr.evaluate(student, model, batches, repeats=0)) == pytest.approx(expected)


@pytest.mark.parametrize(("named", "used"), [(None, "embedding"), ("hidden", "hidden")])
def test_heal_trains_for_the_objective_of_the_students_profile(case: tuple, named: str | None, used: str) -> None:
    model, student, batches = case
    expected = divergence(student, model, batches[::8], OBJECTIVES[used]).mean
    for run in (heal, hpr.heal):
        healed = run(copy.deepcopy(student), model, batches, hpr.Recipe(duration="1steps", objective=named))
        assert healed.before.mean == pytest.approx(expected)
