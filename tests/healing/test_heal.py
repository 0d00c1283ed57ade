"""`hpr.heal`: data of every kind, amounts of steps and of time, and the defaults that suit a model."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from test_healing import batches, copy_of, pair, teacher_of  # noqa: F401
from test_splits import TEXTS

import hpr
from hpr.checkpoints.open import open_model
from hpr.data.sources import Mixture
from hpr.data.splits import prepare
from hpr.healing.heal import batches_of, changes_for
from hpr.healing.loss import Weights
from hpr.healing.recipe import Recipe


@pytest.fixture
def opened(folder):
    """A tiny BERT of its folder, and a student at half its parameters."""
    teacher = open_model(folder)
    drawn = [{"input_ids": torch.randint(5, 13, (8, 12), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    profile = hpr.profile(teacher.model, drawn)
    return teacher, hpr.share(teacher.model, hpr.plan(teacher.model, profile, "70%"), profile)


def test_the_trainer_is_imported_where_something_is_healed() -> None:
    there = "'transformers.trainer' in sys.modules"
    code = f"import sys, hpr; assert not {there}; hpr.heal; assert not {there}; hpr.Recipe; assert {there}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(hasattr(hpr, name) for name in hpr.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'cure'"):
        _ = hpr.cure


def test_texts_and_a_tokenizer(opened) -> None:
    teacher, student = opened
    found = hpr.heal(student, teacher, TEXTS, Recipe("4steps", checks=2))
    assert [row["step"] for row in found.history] == [2, 4]
    assert found.after.mean <= found.before.mean
    assert found.as_metrics()["recipe"]["steps"] == 4


def test_splits_are_used_as_they_are(opened, monkeypatch) -> None:
    teacher, student = opened
    splits = prepare(TEXTS, teacher)
    monkeypatch.setattr("hpr.data.splits.rows_of", None)  # nothing is read again
    trained, validation = batches_of({"data": splits}, teacher)
    assert trained["data"] is splits.calibration
    assert validation == list(splits.rescoring)
    assert len(hpr.heal(student, teacher, splits, Recipe(2)).history) == 2
    assert len(hpr.heal(student, teacher, {"one": splits, "other": splits}, Recipe(2)).history) == 2


def test_several_sources_with_shares(opened, tmp_path) -> None:
    teacher, student = opened
    (tmp_path / "more.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    sources = {"texts": TEXTS, "file": tmp_path / "more.txt"}
    hpr.heal(student, teacher, Mixture(files=sources, shares={"texts": 3, "file": 1}), Recipe(2))
    with pytest.raises(hpr.HprError, match="one for each of texts, file"):
        hpr.heal(student, teacher, Mixture(files=sources, shares={"texts": 3}), Recipe(2))


def test_batches_arrays_and_what_can_be_run_through_once(pair) -> None:  # noqa: F811
    teacher, student = pair
    student = copy_of(student)
    given = batches(16)
    trained, validation = batches_of({"data": given}, None)
    assert (len(trained["data"]), len(validation)) == (14, 2)
    assert not any(torch.equal(one["input_ids"], other["input_ids"]) for one in trained["data"] for other in validation)
    hpr.heal(student, teacher, (batch for batch in given), Recipe(2))
    hpr.heal(student, teacher, np.random.default_rng(0).integers(3, 60, (16, 12)), Recipe(2))
    with pytest.raises(hpr.HprError, match="3 batches in 'data': at least 8 are needed"):
        hpr.heal(student, teacher, given[:3], Recipe(2))


def test_labels_count_where_they_are_wanted() -> None:
    teacher = teacher_of(tf.BertForSequenceClassification)
    profile = hpr.profile(teacher, batches(), "classification")
    student = hpr.share(teacher, hpr.plan(teacher, profile, "70%"), profile)
    given = [{**batch, "labels": torch.zeros(8, dtype=torch.long)} for batch in batches(8)]
    weights = Weights(outputs=0, labels=1)
    recipe = Recipe(20, weights=weights, learning_rate=1e-2, checks=1, objective="classification")
    hpr.heal(student, teacher, given, recipe)
    sure = student(**batches(1, seed=9)[0]).logits.softmax(-1)[:, 0].mean()
    assert sure > teacher(**batches(1, seed=9)[0]).logits.softmax(-1)[:, 0].mean()


def test_time_is_turned_into_steps(pair) -> None:  # noqa: F811
    teacher, student = pair
    found = hpr.heal(copy_of(student), teacher, batches(16), Recipe("2s"))
    assert 1 <= found.steps < 10**6
    assert found.as_metrics()["recipe"]["seconds"] == 2


def test_another_time_is_another_run(pair, tmp_path) -> None:  # noqa: F811
    teacher, student = pair
    heal = lambda how_long: hpr.heal(copy_of(student), teacher, batches(16), Recipe(how_long, checkpoints=tmp_path))  # noqa: E731
    steps = heal("1s").steps
    assert heal("1s").steps == steps  # goes on with what was begun, whatever a new timing would say
    with pytest.raises(hpr.HprError, match=r"a run with other seconds \(1.0, now 7200.0\)"):
        heal("2h")


def test_numbers_vary_and_texts_stay(opened) -> None:
    teacher, _ = opened
    assert changes_for(teacher) is None
    change = changes_for(hpr.data.loaded_model.LoadedModel(teacher.model, None, "hidden", None, "of numbers"))
    batch = {"input_values": torch.randn(4, 9, 3), "labels": torch.randn(4, 2), "attention_mask": torch.ones(4, 9)}
    changed = change(batch, torch.Generator().manual_seed(0))
    assert not torch.allclose(changed["input_values"], batch["input_values"], atol=0.1)
    assert all(torch.equal(changed[name], batch[name]) for name in ("labels", "attention_mask"))
    mels = torch.zeros(2, 4, 40)
    mels[:, 2, 20] = 1
    shifted = change({"input": mels}, torch.Generator().manual_seed(0))["input"].abs().amax(-1).argmax(-1)
    assert shifted.tolist() == [2, 2]  # along time, the longest axis, and not from band to band
