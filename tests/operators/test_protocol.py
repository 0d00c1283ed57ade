"""A new operator is one file and one entry: a toy operator goes through candidate, draft, plan, share and reading back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

import hpr
from hpr.anatomy.model import Site
from hpr.operators import vocab_segments
from hpr.operators.metric import Measured
from hpr.operators.operator import Operator, TermsError, only_site, terms_of, whole_matrix
from hpr.operators.registry import OPERATORS, plannable
from hpr.planning.options import PlanOptions
from hpr.planning.planner import draft, known_operators
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP, Term
from hpr.solver.candidates import Candidate

NAME = "row mean"


def candidate(group: Sequence[Measured]) -> Candidate:
    """Every row is its mean times ones: out + in numbers, which is U (out, 1) times V = 1ᵀ (1, in), both stored."""
    (one,) = group
    damage = one.damage(one.weight.mean(1, keepdim=True).expand_as(one.weight) - one.weight)
    size = one.site.out_features + one.site.in_features
    return Candidate(NAME, (one.site.name,), ((),), np.array([size]), np.array([damage]))


def terms(sites: Sequence[Site], ranks: tuple[int, ...]) -> dict[str, tuple[Term, ...]]:
    return {site.name: (Term(f"{site.name}.mean", f"{site.name}.ones", 1),) for site in sites}


def fit(group: Sequence[Measured], terms: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
    one = only_site(group)
    (term,) = terms_of(terms, one, 1)
    assert term.v is not None
    return {term.u: one.weight.mean(1, keepdim=True), term.v: torch.ones_like(one.weight[:1])}


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = tf.BertModel(tf.BertConfig(**sizes, vocab_size=60, max_position_embeddings=16)).eval()
    with torch.no_grad():  # for which the toy operator is the right one
        weight = model.encoder.layer[1].output.dense.weight
        weight.copy_(weight.mean(1, keepdim=True).expand_as(weight))
    return model, hpr.profile(model, [{"input_ids": torch.randint(3, 60, (8, 9))} for _ in range(2)])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(OPERATORS, NAME, Operator(NAME, fit, candidate, terms))


def test_a_new_operator_is_one_entry(case, toy, tmp_path) -> None:
    model, profile = case
    assert NAME in plannable()
    assert NAME in known_operators(None)
    found = draft(model, profile)
    plan = found.best(found.budget("60%"))
    assert plan.entries["encoder.layer.1.output.dense"].operator == NAME
    assert plan.damage < found.without(NAME, found.budget("60%")).damage
    plan.save(tmp_path / "plan.json")
    student = hpr.share(model, Plan.load(tmp_path / "plan.json"), profile)
    assert sum(parameter.numel() for parameter in student.parameters()) <= plan.budget.parameters
    dense = hpr.unshare(student)
    expected = model.encoder.layer[1].output.dense.weight
    torch.testing.assert_close(dense.encoder.layer[1].output.dense.weight, expected)


def test_a_new_operator_is_known_only_while_it_is_listed(case) -> None:
    with pytest.raises(hpr.HprError, match="no operator 'row mean'"):
        known_operators([NAME])


def test_an_operator_for_runs_of_rows_is_one_entry(case, monkeypatch) -> None:
    name = "my segments"
    original = vocab_segments.OPERATOR

    def renamed(one: Measured):
        track = vocab_segments.track(one)
        candidates = {
            interval: tuple(each if each.operator == KEEP else replace(each, operator=name) for each in several)
            for interval, several in track.candidates.items()
        }
        return replace(track, candidates=candidates)

    mine = replace(original, name=name, rows=replace(original.rows, track=renamed))
    monkeypatch.delitem(OPERATORS, original.name)
    monkeypatch.setitem(OPERATORS, name, mine)
    model, profile = case
    plan = hpr.plan(model, profile, "60%", PlanOptions(only="embeddings.*"))
    assert name in {entry.operator for entry in plan.entries.values()} <= {name, KEEP}
    hpr.share(model, plan, profile)


def test_layer_states_alone_lead_to_kept_rows() -> None:
    assert {name for name, operator in OPERATORS.items() if operator.needs_layer_state} == {"reused"}
    assert set(plannable()) == set(OPERATORS) - {"reused"}


def test_terms_of_another_operator_are_named() -> None:
    site = Site("s", "s", "linear", 2, 2, True)
    one = Measured(site, torch.eye(2), None, None, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TermsError, match="s has 2 terms, not 1"):
        terms_of({"s": (Term("a"), Term("b"))}, one, 1)
    with pytest.raises(TermsError, match="product of two factors"):
        whole_matrix(Term("a", "b", 1))
    with pytest.raises(TermsError, match="2 sites share factors"):
        only_site([one, one])
