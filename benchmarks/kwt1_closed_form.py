"""KWT-1, a 12-layer speech model: its encoder's linear weights at 50 % and 30 %, no training, against published methods.

Calibrates on the 600 calibration clips without labels (450 profiled, 150 choose between plans and refit) and reports
divergence from the original and accuracy on the 1,845 evaluation clips. Run: python benchmarks/kwt1_closed_form.py
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

import hpr
import kwt1
import peers
from hpr.evaluation.metrics import accuracy, compare, divergence
from hpr.planner import draft
from hpr.profiling.objectives import OBJECTIVES
from paths import shared

GOAL = OBJECTIVES["classification"]
ONLY = "encoder.*"


def clips(name: str) -> tuple[torch.Tensor, np.ndarray]:
    """MFCC (n, 98, 40) and labels (n,)."""
    with np.load(shared() / "data" / "speech-commands" / f"{name}.npz") as file:
        return torch.from_numpy(file["mfcc"].astype(np.float32)), file["label"].astype(int)


def main() -> None:
    """Print a table and one JSON line per row."""
    torch.manual_seed(0)
    model = kwt1.load(shared() / "models" / "kwt1")
    calibration, _ = clips("calibration")
    profiled, choosing = list(calibration[:450].split(50)), list(calibration[450:].split(50))
    whole = list(calibration.split(50))
    evaluation, labels = clips("evaluation")
    evaluated = list(evaluation.split(205))

    def report(name: str, student: torch.nn.Module, budget: float, **more: float) -> None:
        found = compare(student, model, evaluated, GOAL)
        row = {
            "method": name,
            "budget": budget,
            "divergence": found.divergence.mean,
            "error": found.divergence.error,
            "accuracy": accuracy(found.student, labels),
            **more,
        }
        print(json.dumps(row), flush=True)

    report("dense", model, 1.0)
    start = time.perf_counter()
    profile = hpr.profile(model, profiled, "classification")
    final = hpr.profile(model, whole, "classification")
    sketch = draft(model, profile, ONLY)
    final_sketch = draft(model, final, ONLY)
    print(json.dumps({"seconds": {"profile and curves, twice": time.perf_counter() - start}}), flush=True)
    sites = [site for site in sketch.anatomy.sites if site.stack == "encoder"]
    for budget in (0.5, 0.3):
        limit = sketch.budget(f"{budget:.0%}")
        for name in ("svd", "svd_llm", "basis_sharing"):
            report(f"peer: {name}", getattr(peers, name)(model, sites, final, budget), budget)
        lone = draft(model, final, ONLY, ["low rank"])
        report("private low rank only", hpr.share(model, lone.best(limit), final), budget)
        scores = {}
        for index, plan in enumerate(sketch.alternatives(limit, 4)[:4]):
            student = hpr.share(model, plan, profile)
            scores[index, False] = divergence(student, model, choosing, GOAL).mean
            hpr.refit(student, model, plan, profile, profiled)
            scores[index, True] = divergence(student, model, choosing, GOAL).mean
        best, refitted = min(scores, key=scores.__getitem__)
        print(
            json.dumps({"budget": budget, "on the 150 clips": {str(key): value for key, value in scores.items()}}), flush=True
        )
        plan = final_sketch.alternatives(limit, 4)[best]
        used = plan.parameters(sketch.anatomy) / limit.parameters
        student = hpr.share(model, plan, final)
        report("hpr, plain", student, budget, used=used, predicted=plan.damage)
        hpr.refit(student, model, plan, final, whole)
        report("hpr, refit", student, budget, used=used)
        print(json.dumps({"budget": budget, "chosen": "refit" if refitted else "plain", "operators": count(plan)}), flush=True)


def count(plan: hpr.Plan) -> dict[str, int]:
    """How many sites each operator got."""
    names = [entry.operator for entry in plan.entries.values()]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    sys.exit(main())
