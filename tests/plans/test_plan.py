"""The plan as an artifact: round trips, every validation error, budgets."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import low_rank_terms, plan_of
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import bytes_per_parameter
from hpr.anatomy.model import Anatomy, Stack
from hpr.errors import BudgetError, HprError, PlanError
from hpr.plans.budget import Budget, parse_budget
from hpr.plans.plan import Plan, keep_all
from hpr.plans.terms import KEEP, Entry, FactorShape, Term, terms_from_list, terms_to_list
from hpr.runtime.files import write_text

NAME = "encoder.layer.1.output.dense"  # (16, 32)


@pytest.fixture
def anatomy(build: Callable[..., nn.Module]) -> Anatomy:
    return describe(build("bert"))


names = st.text(min_size=1, max_size=12)
sizes = st.integers(1, 10**6)
finite = st.floats(0, 1e12, allow_nan=False)


@st.composite
def terms(draw: st.DrawFn) -> Term:
    scales = {"row_scale": draw(st.none() | names), "column_scale": draw(st.none() | names)}
    rows = draw(st.none() | st.tuples(sizes, sizes))
    if draw(st.booleans()):
        return Term(draw(names), rows=rows, **scales)
    return Term(draw(names), draw(names), draw(sizes), rows=rows, identity=draw(st.sampled_from(["", "u", "v"])), **scales)


entries = st.builds(Entry, names, st.lists(terms(), max_size=3).map(tuple), finite)
plans = st.builds(
    Plan,
    model_class=names,
    fingerprint=names,
    budget=st.builds(Budget, names, sizes),
    dense_parameters=sizes,
    other_parameters=sizes,
    entries=st.dictionaries(names, entries, max_size=4),
    diagnostics=st.dictionaries(names, finite | names | st.none() | st.lists(sizes, max_size=3), max_size=3),
)


@given(st.lists(terms(), max_size=4).map(tuple))
def test_terms_round_trip(several: tuple[Term, ...]) -> None:
    written = json.loads(json.dumps(terms_to_list(several)))
    assert terms_from_list("a", written) == several
    assert all(value not in (None, "") for term in written for value in term.values())


def test_a_term_without_its_rank_has_no_shapes(anatomy: Anatomy) -> None:
    with pytest.raises(PlanError, match=f"{NAME}: the term 'u' · 'v' has no rank"):
        Term("u", "v").shapes(anatomy[NAME])


@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan


def test_save_and_load(anatomy: Anatomy, tmp_path: Path) -> None:
    plan = plan_of(anatomy, {NAME: low_rank_terms(NAME)})
    plan.save(tmp_path / "new" / "plan.json")
    assert Plan.load(tmp_path / "new" / "plan.json") == plan
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]


def test_counts(anatomy: Anatomy) -> None:
    assert keep_all(anatomy).parameters(anatomy) == anatomy.total_parameters
    assert keep_all(anatomy).damage == 0
    plan = plan_of(anatomy, {NAME: low_rank_terms(NAME, 3), "encoder.layer.0.output.dense": low_rank_terms(NAME, 3)})
    assert plan.parameters(anatomy) == anatomy.total_parameters - 2 * 16 * 32 + 3 * (16 + 32)
    assert plan.damage == 0.5
    assert plan.groups() == {("encoder.layer.0.output.dense", NAME): [f"{NAME}:u", f"{NAME}:v"]}
    plan.validate(anatomy)


def test_an_identity_block_is_not_counted(anatomy: Anatomy) -> None:
    plan = plan_of(anatomy, {NAME: low_rank_terms(NAME, 3, identity="u")})
    assert plan.factors(anatomy)[f"{NAME}:u"] == FactorShape(16, 3, "rows")
    saved = 16 * 32 - (16 + 32) * 3 + 3 * 3 - 16  # the block of 3 x 3, for one integer a row
    assert plan.parameters(anatomy) == anatomy.total_parameters - saved
    assert FactorShape(3, 32, "columns").stored == (3, 29)
    assert FactorShape(3, 32, "columns").parameters == 3 * 29 + 32
    assert FactorShape(1, 7).parameters == 7


BAD_TERMS: dict[str, tuple[tuple[Term, ...], str]] = {
    "rank too high": (low_rank_terms(NAME, 17), "rank 17 is not a whole number from 1 to 16"),
    "rank 0": (low_rank_terms(NAME, 0), "rank 0 "),
    "fractional rank": ((Term("u", "v", 2.5),), "rank 2.5 "),  # type: ignore[arg-type]
    "v without rank": ((Term("u", "v"),), "both v and rank or neither"),
    "rank without v": ((Term("u", rank=2),), "both v and rank or neither"),
    "no name": ((Term(""),), "'' is no factor name"),
    "number as name": ((Term("u", 7, 2),), "7 is no factor name"),  # type: ignore[arg-type]
    "rows beyond": ((Term("u", rows=(0, 17)),), "rows 0 to 17 do not lie within the site's 16"),
    "rows reversed": ((Term("u", rows=(9, 3)),), "rows 9 to 3"),
    "rows of one": ((Term("u", rows=(9,)),), "two whole numbers"),  # type: ignore[arg-type]
    "gap": ((Term("a", rows=(0, 4)), Term("b", rows=(5, 16))), "rows 4 and above have no term"),
    "end not covered": ((Term("a", rows=(0, 15)),), "rows 15 and above have no term"),
    "unknown identity": (low_rank_terms(NAME, 3, identity="w"), "identity 'w'"),
    "identity of a whole matrix": ((Term("u", identity="u"),), "identity 'u'"),
    "identity leaves nothing": (low_rank_terms(NAME, 16, identity="u"), "leaves nothing beside the identity block"),
    "sizes disagree": ((Term("u"), Term("u", "v", 3)), "16x32 at one site and 16x3 at"),
    "identities disagree": ((*low_rank_terms(NAME, 3), *low_rank_terms(NAME, 3, identity="u")), "16x3 with identity rows at"),
}


@pytest.mark.parametrize("case", BAD_TERMS)
def test_bad_terms(anatomy: Anatomy, case: str) -> None:
    bad, words = BAD_TERMS[case]
    with pytest.raises(PlanError, match=words):
        plan_of(anatomy, {NAME: bad}).validate(anatomy)


def test_terms_may_overlap_and_cover_in_any_order(anatomy: Anatomy) -> None:
    plan = plan_of(anatomy, {NAME: [Term(f"u{i}", "v", 2, rows=rows) for i, rows in enumerate([(8, 16), (0, 8), (4, 12)])]})
    plan.validate(anatomy)


def changed(plan: Plan, **entries: Entry | None) -> Plan:
    """The plan with its entry for NAME replaced, or for another site added."""
    merged = dict(plan.entries) | {name.replace("__", "."): entry for name, entry in entries.items()}
    return replace(plan, entries={name: entry for name, entry in merged.items() if entry is not None})


def test_bad_entries(anatomy: Anatomy) -> None:
    plan, site = keep_all(anatomy), NAME.replace(".", "__")
    cases: list[tuple[Plan, str]] = [
        (replace(plan, fingerprint="0123"), "plan this model anew"),
        (changed(plan, **{site: None}), rf"no entry for {NAME} \(1 missing\)"),
        (changed(plan, nowhere=Entry(KEEP)), "names nowhere, which this model does not have"),
        (changed(plan, **{site: Entry("lowrank")}), "mixes the two"),
        (changed(plan, **{site: Entry(KEEP, low_rank_terms(NAME))}), "mixes the two"),
        (changed(plan, **{site: Entry(KEEP, damage=float("nan"))}), "damage nan"),
        (changed(plan, **{site: Entry(KEEP, damage=-1.0)}), r"damage -1\.0"),
        (replace(plan, budget=Budget("9K", 1000)), "its budget 9K allows 1,000"),
    ]
    for bad, words in cases:
        with pytest.raises(PlanError, match=words):
            bad.validate(anatomy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(format=3), "plan format 3 is not the 2"),
        (lambda data: data.pop("format"), "plan format None"),
        (lambda data: data.pop("stacks"), "not a plan.*stacks"),
        (lambda data: data.pop("budget"), "KeyError at 'budget'"),
        (lambda data: data["model"].pop("class"), "KeyError at 'class'"),
        (lambda data: data.update(sites=[]), "not a plan"),
        (lambda data: data["budget"].update(parameters="many"), "not a plan"),
        (lambda data: data["sites"][NAME].pop("operator"), "KeyError at 'operator'"),
        (lambda data: data["sites"][NAME]["terms"][0].update(colour="red"), f"{NAME}: a term has no field 'colour'"),
        (lambda data: data["sites"][NAME]["terms"][0].pop("u"), "not a plan"),
        (lambda data: data["sites"][NAME]["terms"][0].update(rows=3), "not a plan"),
    ],
)
def test_from_dict_names_the_bad_key(anatomy: Anatomy, change: Callable[[dict[str, Any]], object], words: str) -> None:
    data = json.loads(json.dumps(plan_of(anatomy, {NAME: low_rank_terms(NAME)}).to_dict()))
    change(data)
    with pytest.raises(PlanError, match=words):
        Plan.from_dict(data)


def test_load_names_the_bad_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan at"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_budgets(anatomy: Anatomy) -> None:
    total = anatomy.total_parameters
    assert parse_budget("50%", anatomy, 4).parameters == total // 2
    assert parse_budget(" 100 % ", anatomy, 4).parameters == total
    assert parse_budget("2.5K", anatomy, 4).parameters == 2500
    assert parse_budget("3000", anatomy, 4).parameters == 3000
    assert parse_budget(str(total), anatomy, 4).parameters == total
    assert parse_budget("75.536KB", anatomy, 4).parameters == (75536 - 65536) // 4
    assert parse_budget("75.536KB", anatomy, 2).parameters == (75536 - 65536) // 2
    assert parse_budget("80KiB", anatomy, 2.5).parameters == 16 * 1024 * 2 // 5
    assert parse_budget("1KB", anatomy, 4).parameters == 0  # the smallest plan is then named in the error
    layers = sum(site.parameters for site in anatomy.select("encoder.*"))
    assert parse_budget("50%", anatomy, 4, only="encoder.*").parameters == layers // 2 + total - layers
    assert parse_budget("50%", anatomy, 4).text == "50%"


def test_bytes_per_parameter_follow_the_dtype(build: Callable[..., nn.Module]) -> None:
    model = build("bert")
    assert bytes_per_parameter(model) == 4
    embeddings = model.get_input_embeddings()
    embeddings.to(torch.bfloat16)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert bytes_per_parameter(model) == pytest.approx(4 - 2 * embeddings.weight.numel() / total)
    assert bytes_per_parameter(model.to(torch.bfloat16)) == 2
    with pytest.raises(HprError, match="Identity has no parameters"):
        bytes_per_parameter(nn.Identity())


@pytest.mark.parametrize("text", ["", "half", "0%", "-5%", "101%", "5X", "1e6", "%"])
def test_bad_budgets(anatomy: Anatomy, text: str) -> None:
    with pytest.raises(BudgetError, match=r"budget"):
        parse_budget(text, anatomy, 4)


@pytest.mark.parametrize(
    ("text", "parameters"), [("500M", "500,000,000"), ("100B", "100,000,000,000"), ("4.065536MB", "1,000,000")]
)
def test_a_budget_above_the_model_is_refused(anatomy: Anatomy, text: str, parameters: str) -> None:
    with pytest.raises(BudgetError, match=f"{parameters} parameters, more than the {anatomy.total_parameters:,} that"):
        parse_budget(text, anatomy, 4)
    with pytest.raises(BudgetError, match="more than"):
        parse_budget(str(anatomy.total_parameters + 1), anatomy, 4)


def test_write_text_is_all_or_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_printed_plan_is_a_table() -> None:
    shared = Entry("shared input basis", (Term("f.u", "f.v", 3),), damage=0.25)
    plan = Plan(
        model_class="Tiny",
        fingerprint="0",
        budget=Budget("50%", 1000),
        dense_parameters=2000,
        other_parameters=10,
        entries={
            "layers.0.up": shared,
            "layers.1.up": shared,
            "layers.2.up": Entry(KEEP),
            "head<": Entry("low rank", (Term("h.u", "h.v", 7),), damage=0.5),
        },
        diagnostics={"solver": {"gap": 0.0125}},
        stacks=(Stack("body", "layers", 3),),
    )
    assert str(plan).splitlines() == [
        "body · up  0–1: sib 3   2: keep",
        "head<      lr 7",
        "",
        "sib = shared input basis (2), keep (1), lr = low rank (1)",
        "budget 50%: at most 1,000 of 2,000 parameters",
        "predicted damage 1 nats per example, at most 1.25 % above the least possible",
    ]
    assert repr(plan) == "Plan(Tiny, 4 sites, budget 50%, damage 1 nats)"
    assert plan._repr_html_().startswith("<pre>body · up")
    assert "head&lt;" in plan._repr_html_()
