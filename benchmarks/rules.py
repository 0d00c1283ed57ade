"""What each replication rule does to size, speed and quality: the packaged all-MiniLM-L6-v2, held-out docstrings, no training.

The table of docs/rules.md. Operations and time are those of 4 sequences of 512 tokens, time as the median ratio to the
original of passes that take turns. Run: python benchmarks/rules.py
"""

from __future__ import annotations

import sys

import torch

import hpr
from common.tables import markdown, say
from hpr.checkpoints.open import open_model
from hpr.data.splits import open_data
from hpr.evaluation.cost import forward_flops
from hpr.evaluation.divergence import compare
from hpr.evaluation.latency import latency
from hpr.nn.bank import parameters
from hpr.profiling.objectives import OBJECTIVES

OWN = [False]
RULES = {
    "all own": (OWN, OWN),
    "layer 4 shares": ([*4 * [False], True, False], OWN),
    "every second layer shares": ([False, True], OWN),
    "every layer shares": ([True], OWN),
    "layer 4 copies": ([*4 * [False], "copy", False], OWN),
    "layer 4 reuses attention": (OWN, [*4 * [False], True, False]),
    "layers 3 to 5 reuse attention": (OWN, [*3 * [False], *3 * [True]]),
    "layers 1 to 5 reuse attention": (OWN, [True]),
}


def main() -> None:
    """One row for each set of rules."""
    opened = open_model(None)
    texts, _ = open_data(None, opened, "heldout", 256)
    ids = torch.randint(1000, 30000, (4, 512), generator=torch.Generator().manual_seed(0))
    long = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for name, (hidden, attention) in RULES.items():
        rules = {"encoder": {"hidden_states": hidden, "attention_weights": attention}}
        made = hpr.HierarchicalModel(opened.model, rules).base_model
        quality = compare(made, opened.model, texts, OBJECTIVES["embedding"])
        row = say(
            rules=name,
            parameters=parameters(made) / 1e6,
            operations=forward_flops(made, long) / forward_flops(opened.model, long),
            time=latency(made, opened.model, long).ratio,
            cosine=quality.cosine,
        )
        found.append(row)
    print(markdown(found, {"rules": "", "parameters": ".1f", "operations": ".3f", "time": ".2f", "cosine": ".3f"}))


if __name__ == "__main__":
    sys.exit(main())
