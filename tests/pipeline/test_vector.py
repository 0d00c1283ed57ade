"""One compression of a tiny model, kept: the same plan and the same outputs as on the day it was written.

A change that moves code must not change these numbers. A change that is meant to change them writes the file anew:
``python tests/pipeline/test_vector.py``. Numbers are compared to 6 digits, since processors round differently; on one machine
``tensors`` (a hash of all weights) has stayed the same bit for bit through the move of 2026-11-26.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import hpr

VECTOR = Path(__file__).with_name("vector.json")
BUDGETS = ("60%", "35%")
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 97}


def compressed(budget: str) -> dict[str, Any]:
    """What one compression of a tiny BERT gives: the plan's sites, its damage, and the student's outputs."""
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**SIZES, max_position_embeddings=32)).eval()
    draw = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 97, (8, 12), generator=draw) for _ in range(4)]
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]
    profile = hpr.profile(model, batches)
    plan = hpr.plan(model, profile, budget)
    student = hpr.share(model, plan, profile).eval()
    with torch.no_grad():
        states = student(**batches[0]).last_hidden_state
    digest = hashlib.sha256()
    for tensor in student.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "budget": budget,
        "sites": {name: [entry.operator, *(term.rank for term in entry.terms)] for name, entry in plan.entries.items()},
        "damage": plan.damage,
        "outputs": states[0, :2, :4].flatten().tolist(),
        "norm": float(states.double().norm()),
        "tensors": digest.hexdigest(),
    }


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_compression_gives_what_it_gave(budget: str) -> None:
    kept = next(row for row in json.loads(VECTOR.read_text(encoding="utf-8")) if row["budget"] == budget)
    now = compressed(budget)
    assert now["sites"] == kept["sites"]
    for key in ("damage", "outputs", "norm"):
        assert now[key] == pytest.approx(kept[key], rel=1e-6, abs=1e-6 if key == "outputs" else 0)


if __name__ == "__main__":
    VECTOR.write_text(json.dumps([compressed(budget) for budget in BUDGETS], indent=1) + "\n", encoding="utf-8")
