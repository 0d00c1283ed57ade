"""Each budget is solved once, whoever asks; a search can be narrowed to some sites."""

from collections import Counter

import pytest
import torch
import transformers as tf

import hpr
from hpr.errors import BudgetError
from hpr.pipeline.record import operator_gains
from hpr.planning.draft import Draft
from hpr.planning.planner import draft
from hpr.planning.rows import SiteRow
from hpr.planning.search import Search
from hpr.solver import lagrangian


@pytest.fixture(scope="module")
def made() -> Draft:
    torch.manual_seed(0)
    config = tf.BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=60,
        max_position_embeddings=16,
    )
    model = tf.BartModel(config).eval()
    batches = [{name: torch.randint(3, 60, (6, 7)) for name in ("input_ids", "decoder_input_ids")} for _ in range(2)]
    return draft(model, hpr.profile(model, batches, "embedding"))


def fresh(draft: Draft) -> Draft:
    """The same candidates, nothing solved."""
    searches = tuple(Search(one.rows, one.tracks, one.alignment) for one in draft.searches)
    return Draft(draft.anatomy, searches, draft.fixed, draft.bytes_per_parameter)


def test_each_question_is_solved_once(made: Draft, monkeypatch) -> None:
    found = fresh(made)
    asked: Counter = Counter()
    solve = lagrangian.plan_candidates

    def counted(tracks, limit, searching):
        asked[id(tracks), limit] += 1
        return solve(tracks, limit, searching)

    monkeypatch.setattr(lagrangian, "plan_candidates", counted)
    budget = found.budget("50%")
    best = found.best(budget)
    plans = found.alternatives(budget, 4)
    assert found.propose(budget).plan == best == plans[0]
    gains = operator_gains(found, best)
    assert gains
    assert found.plain.best(budget).damage >= best.damage
    assert set(asked.values()) == {1}
    assert len(asked) <= len(found.searches) * (1 + len({*gain_names(gains), *used(best)}))
    found.best(found.budget("60%"))
    assert len({limit for _, limit in asked}) == 2


def gain_names(gains: list[dict]) -> set[str]:
    return {gain["operator"] for gain in gains}


def used(plan) -> set[str]:
    return {entry.operator for entry in plan.entries.values()}


def test_a_proposal_has_the_multiplier_of_its_solution(made: Draft) -> None:
    budget = made.budget("50%")
    several = made.proposals(budget, 4)
    assert [one.plan for one in several] == made.alternatives(budget, 4)
    assert all(one.multiplier == one.plan.diagnostics["solver"]["multiplier"] > 0 for one in several)
    assert all(one.score is None for one in several)
    assert made.propose(made.budget("100%")).multiplier == 0


def test_impossible_limits_are_budget_errors(made: Draft) -> None:
    search = made.searches[0]
    for ask in (search.best, lambda limit: search.k_best(limit, 2), lambda limit: search.without("low rank", limit)):
        with pytest.raises(BudgetError, match="too few for these sites"):
            ask(search.smallest - 1)
    with pytest.raises(BudgetError, match="smallest plan"):
        made.best(made.budget(str(made.untouched)))
    with pytest.raises(BudgetError, match="no site is left"):
        search.narrowed(set()).best(100)


def test_rows_are_narrowed_with_their_names(made: Draft) -> None:
    (row,) = [row for row in made.searches[0].rows if row.name == "encoder · fc1 + decoder · fc1"]
    assert row.narrowed([0, 2, 3]) == SiteRow(row.names, (row.sites[0], *row.sites[2:]), ((0, 1), (1, 3)))
    assert row.narrowed([3]) == SiteRow(("decoder · fc1",), (row.sites[3],), ((0, 1),))
    chosen = {site.name for site in made.anatomy.sites if site.stack == "decoder"}
    narrowed = made.searches[0].narrowed(chosen)
    assert narrowed.sites == chosen & made.searches[0].sites
    assert [track.name for track in narrowed.tracks] == [row.name for row in narrowed.rows]
    assert not any("encoder · " in track.name for track in narrowed.tracks)
