"""all-MiniLM-L6-v2's encoder at equal parameters, static against weights that follow the input, after the same healing.

Text of six kinds serves for profile, plan and healing. The routers are within the budget, so the static plan has higher ranks.
Held-out cosine and STS-B for every seed, operations and latency of both. Prints one JSON object a line, a table at the end:
python benchmarks/mixing_minilm.py [options, see --help]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from torch import nn

import hpr
from common.paths import shared
from common.tables import markdown, say
from common.tasks import embedder, sts_correlation, sts_pairs
from common.texts import mixture
from hpr.checkpoints.open import open_model
from hpr.data.batches import first_batches
from hpr.data.splits import TRAINED, prepare
from hpr.evaluation.cost import forward_flops
from hpr.evaluation.divergence import compare
from hpr.evaluation.latency import latency
from hpr.nn.bank import parameters
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from hpr.profiling.objectives import OBJECTIVES
from hpr.routing.collapse import collapse
from hpr.routing.plan import best_routed

GOAL = OBJECTIVES["embedding"]


def main() -> None:
    """Print rows and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--for", dest="amount", default="300steps")
    parser.add_argument("--router-rate", type=float, default=hpr.Recipe.router_rate, help="times that of all else")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=4096, help="to profile on; healing takes all")
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher = open_model(None)
    data = prepare(mixture(), teacher, TRAINED)
    profile = hpr.profile(teacher.model, first_batches(data.calibration, options.examples), "embedding")
    draft = planner.draft(teacher.model, profile, PlanOptions(only="encoder.*"))
    limit = draft.budget(options.budget)
    plans = {"static": draft.best(limit), "dynamic": best_routed(draft, limit, teacher.model, options.experts)}
    pairs = {name: sts_pairs(shared() / "data" / "sts-b" / f"stsb-en-{name}.csv") for name in ("dev", "test")}

    def measure(model: nn.Module) -> dict[str, Any]:
        embed = embedder(model, teacher.tokenizer)
        scores = {name: sts_correlation(embed, several) for name, several in pairs.items()}
        found = compare(model, teacher.model, data.heldout, GOAL)
        return scores | {"cosine": found.cosine, "divergence": found.divergence.mean}

    table = []
    for name, plan in plans.items():
        rows = []
        for seed in range(options.seeds):
            student = hpr.share(teacher.model, plan, profile)
            before = measure(student)
            recipe = hpr.Recipe(duration=options.amount, seed=seed, router_rate=options.router_rate)
            found = hpr.heal(student, teacher, data, recipe)
            rows.append(measure(student))
            more: dict[str, Any] = {}
            if name == "dynamic":
                more["entropy"] = [row.get("entropy") for row in found.history]
                more["collapsed"] = measure(collapse(student, first_batches(data.calibration, 1024)))
            say(kind=name, seed=seed, before=before, after=rows[-1], seconds=found.seconds, best_step=found.best_step, **more)
        batch = max(data.heldout, key=lambda one: one["input_ids"].numel())
        costs = {"flops": forward_flops(student, batch), "latency": latency(student, teacher.model, batch).ratio}
        about = {"kind": name, "parameters": parameters(student), **costs}
        for key in rows[0]:
            values = [row[key] for row in rows]
            about |= {key: statistics.mean(values), f"{key} ±": statistics.stdev(values) if len(values) > 1 else 0.0}
        say(**about)
        table.append(about)
    formats = dict.fromkeys(table[0], ".4f") | {"kind": "", "parameters": ",", "flops": ","}
    print(f"\n{markdown(table, formats)}")


if __name__ == "__main__":
    sys.exit(main())
