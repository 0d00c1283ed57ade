"""A model is measured once for several plans, and each group of sites is fitted once."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers as tf

import hpr
from hpr.anatomy.symmetry import AlignTarget
from hpr.operators import fitting
from hpr.operators.fitting import Fits
from hpr.operators.registry import OPERATORS
from hpr.planning.planner import draft
from hpr.sharing.share import share


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = tf.BertModel(tf.BertConfig(**sizes, vocab_size=90, max_position_embeddings=16)).eval()
    return model, hpr.profile(model, [{"input_ids": torch.randint(3, 90, (8, 9))} for _ in range(2)])


def equal(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_students_are_the_same_bit_for_bit(case) -> None:
    model, profile = case
    fits = Fits(model, profile)
    found = draft(model, profile, fits=fits)
    plans = found.alternatives(found.budget("50%"), 4)
    plans += [
        replace(plans[0], alignment=tuple(AlignTarget(one, "layer below") for one in profile.symmetries if one.kind == "order"))
    ]
    assert plans[-1].alignment
    for plan in plans:
        assert equal(share(model, plan, fits=fits), hpr.share(model, plan, profile))


def test_each_group_and_each_metric_is_made_once(case, monkeypatch) -> None:
    model, profile = case
    fits = Fits(model, profile)
    plan = hpr.plan(model, profile, "50%")
    metrics, groups = Counter(), Counter()
    metric_of, fit_group = fitting.metric_of, Fits._fit_group
    monkeypatch.setattr(fitting, "metric_of", lambda site, *more: metrics.update([site.name]) or metric_of(site, *more))
    monkeypatch.setattr(Fits, "_fit_group", lambda self, *more: groups.update([tuple(more[1])]) or fit_group(self, *more))
    changed = {name for name, entry in plan.entries.items() if entry.terms}
    for _ in range(3):
        fits.fit(plan)
    assert {name for group in groups for name in group} == set(metrics) == changed
    assert set(groups.values()) == set(metrics.values()) == {1}
    aims = [AlignTarget(one, "layer below") for one in profile.symmetries if one.kind == "order"]
    assert fits.aligned(aims) is fits.aligned(tuple(aims)) is not fits
    assert fits.aligned(()) is fits


def test_other_ranks_are_another_fit(case) -> None:
    model, profile = case
    fits = Fits(model, profile)
    name = "encoder.layer.1.output.dense"
    kept = hpr.plan(model, profile, "100%")
    sizes = []
    for rank in (3, 5, 3):
        terms = OPERATORS["low rank"].terms([fits.anatomy[name]], (rank,))
        entry = replace(kept.entries[name], operator="low rank", terms=terms[name])
        sizes.append(fits.fit(replace(kept, entries={**kept.entries, name: entry})).factors[f"{name}.u"])
    assert sizes[0] is sizes[2]
    assert sizes[0].shape[1] == 3
    assert sizes[1].shape[1] == 5


def test_weights_are_not_kept_in_float64(case) -> None:
    fits = Fits(*case)
    one, other = (fits.measured(["encoder.layer.0.output.dense"])["encoder.layer.0.output.dense"] for _ in range(2))
    assert one.weight is not other.weight
    assert one.left is other.left


def test_fits_of_another_model_are_refused(case) -> None:
    model, profile = case
    plan = hpr.plan(model, profile, "50%")
    twin = tf.BertModel(model.config)
    with pytest.raises(hpr.HprError, match="another model or profile"):
        share(model, plan, fits=Fits(twin, None))
    with pytest.raises(hpr.HprError, match="another model or profile"):
        draft(model, profile, fits=Fits(model, None))
    assert equal(share(model, plan, replace(profile, about={}), fits=Fits(model, profile)), hpr.share(model, plan, profile))
