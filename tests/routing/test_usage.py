"""Which inputs take which route: what is recorded of it, and the report's section on it."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from test_reporting import METRICS, PLAN
from test_routing import built, decided, ids, roomy

import hpr
from hpr.nn.bank import bank_of
from hpr.reporting.report import render_report
from hpr.reporting.routes import routes as section
from hpr.routing.collapse import collapse, mean_routes
from hpr.routing.plan import routed
from hpr.routing.usage import routes


class Names:
    """Decodes a row of ids as its first one."""

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [f"text {int(row[0])}" for row in rows]


def kinds() -> dict[str, list[dict[str, torch.Tensor]]]:
    """Low ids and high ones, some rows padded."""
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    low, high = ids(seed=1) % 30, ids(seed=2) % 30 + 30
    return {name: [{"input_ids": rows, "attention_mask": mask}] for name, rows in (("low", low), ("high", high))}


def test_even_routes_before_training() -> None:
    _, static, dynamic = built("bert")
    assert routes(static, kinds()) is None
    found = routes(dynamic, kinds())
    assert found["entropy"] == {"single": pytest.approx(1), "mean": pytest.approx(1)}
    assert found["nearest"] == {}
    assert all(share == pytest.approx([0.25] * 4) for own in found["shares"].values() for share in own.values())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_shares_are_mean_routes(kind: str) -> None:
    """For a sequence each example counts alike; so it does here for tokens, since both halves are weighed by example."""
    student = decided(built(kind)[2], 3.0)
    data = {name: [{**batches[0], "attention_mask": torch.ones(4, 12)}] for name, batches in kinds().items()}
    found = routes(student, data, Names())
    assert found["entropy"]["single"] < found["entropy"]["mean"] < 1
    for name, batches in data.items():
        for router, alpha in mean_routes(student, batches).items():
            torch.testing.assert_close(torch.tensor(found["shares"][router][name]).double(), alpha / 4)
    assert len(found["nearest"]) == 3
    assert all(len(experts) == 4 and all(len(texts) == 3 for texts in experts) for experts in found["nearest"].values())


def test_padding_does_not_count() -> None:
    """A row whose end is padding takes the routes of the row without it."""
    student = decided(built("gpt2")[2], 3.0)
    rows = ids(1, seed=3)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 7:] = 0
    whole = routes(student, {"x": [{"input_ids": rows, "attention_mask": mask}]})["shares"]
    short = routes(student, {"x": [{"input_ids": rows[:, :7]}]})["shares"]
    full = routes(student, {"x": [{"input_ids": rows}]})["shares"]
    first = next(iter(whole))  # what reads embeddings, which no mask changes
    assert whole[first]["x"] == pytest.approx(short[first]["x"], abs=1e-6)
    assert whole[first]["x"] != pytest.approx(full[first]["x"], abs=1e-4)


def test_positions_may_be_flat() -> None:
    """OPT reads (batch · positions) rows in its feed-forward."""
    torch.manual_seed(0)
    config = tf.OPTConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4)
    config.word_embed_proj_dim = 32
    model = tf.OPTForCausalLM(config).eval()
    data = [{"input_ids": ids(4, seed=seed)} for seed in range(3)]
    profile = hpr.profile(model, data)
    plan = hpr.plan(model, profile, "70%")
    student = decided(hpr.share(model, roomy(routed(plan, model)), profile), 3.0)
    found = routes(student, {"x": data[:1]}, Names())
    assert any("fc1" in router for router in found["shares"])
    assert all(len(text) == 3 for experts in found["nearest"].values() for text in experts)
    assert routes(collapse(student, data), {"x": data}) is None


def test_the_nearest_example_uses_its_expert_most() -> None:
    student = decided(built("bert")[2], 3.0)
    data = {"low": kinds()["low"]}
    found = routes(student, data, Names())
    router, experts = next(iter(found["nearest"].items()))
    with torch.no_grad():
        bank = bank_of(student)
        bank.routing.taken = {}
        student(**data["low"][0])
        (alpha, _), *_ = next(calls for (_, name), calls in bank.routing.taken.items() if name == router)
        bank.routing.taken = None
    best = alpha[:, 0].argmax(0)
    assert [texts[0] for texts in experts] == [f"text {int(data['low'][0]['input_ids'][place, 0])}" for place in best]


def test_the_report_shows_them() -> None:
    student = decided(built("bert")[2], 3.0)
    found = routes(student, kinds(), Names())
    history = [
        {"step": 10, "loss": 0.1, "validation": 0.1, "entropy": 0.9},
        {"step": 20, "loss": 0.1, "validation": 0.1, "entropy": 0.5},
    ]
    page = render_report(PLAN, METRICS | {"routes": found, "healing": {"history": history, "recipe": {"steps": 20}}})
    assert 'id="routes"' in page
    assert "Entropy of routes during training" in page
    assert "Examples closest to each route" in page
    drawn = section({"routes": found})
    assert drawn["kinds"] == ["low", "high"]
    assert drawn["entropy"] is None
    assert all(len(cells) == 2 and all(len(parts) == 4 for parts in cells) for cells in (row["cells"] for row in drawn["rows"]))
    assert section({}) is None
    assert 'id="routes"' not in render_report(PLAN, METRICS)
