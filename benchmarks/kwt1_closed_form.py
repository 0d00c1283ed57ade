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
from common import kwt1, peers
from common.paths import shared
from common.tables import count
from hpr.evaluation.divergence import accuracy, compare, divergence
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from hpr.profiling.objectives import OBJECTIVES

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

    def report(name: str, student: torch.nn.Module, budget: float, **more: object) -> None:
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
    generator = torch.Generator().manual_seed(0)
    for batch in whole:
        GOAL.loss(model(batch), batch, generator).backward()
    model.zero_grad()
    step = time.perf_counter() - start
    start = time.perf_counter()
    final = hpr.profile(model, whole, "classification")
    final_draft = planner.draft(model, final, PlanOptions(only=ONLY))
    hpr.share(model, final_draft.best(final_draft.budget("50%")), final)
    seconds = time.perf_counter() - start
    print(json.dumps({"forward and backward": step, "statistics, plan, fits": seconds, "ratio": seconds / step}), flush=True)
    profile = hpr.profile(model, profiled, "classification")
    draft = planner.draft(model, profile, PlanOptions(only=ONLY))
    sites = [site for site in draft.anatomy.sites if site.stack == "encoder"]
    for budget in (0.5, 0.3):
        limit = draft.budget(f"{budget:.0%}")
        for name in ("svd", "svd_llm", "basis_sharing"):
            student, parameters = getattr(peers, name)(model, sites, final, budget)
            report(f"peer: {name}", student, budget, parameters=parameters)
        lone = planner.draft(model, final, PlanOptions(only=ONLY, operators=["low rank"]))
        report("private low rank only", hpr.share(model, lone.best(limit), final), budget)
        scores = {}
        for plan in draft.alternatives(limit, 4):
            label = plan.diagnostics["label"]
            student = hpr.share(model, plan, profile)
            scores[label, "plain"] = divergence(student, model, choosing, GOAL).mean
            hpr.refit(student, model, profiled, plan, profile)
            scores[label, "refit"] = divergence(student, model, choosing, GOAL).mean
        print(
            json.dumps({"budget": budget, "on the 150 clips": {" / ".join(key): value for key, value in scores.items()}}),
            flush=True,
        )
        finals = {one.diagnostics["label"]: one for one in final_draft.alternatives(limit, 4)}
        label, _ = min((key for key in scores if key[1] == "plain"), key=scores.__getitem__)
        plan = finals[label]
        used = plan.parameters(draft.anatomy) / limit.parameters
        report("hpr, no refit", hpr.share(model, plan, final), budget, used=used, predicted=plan.damage, plan=label)
        label, chosen = min(scores, key=scores.__getitem__)
        student = hpr.share(model, finals[label], final)
        start = time.perf_counter()
        if chosen == "refit":
            hpr.refit(student, model, whole, finals[label], final)
        report("hpr, chosen", student, budget, seconds=time.perf_counter() - start, refit=chosen == "refit", plan=label)
        print(json.dumps({"budget": budget, "plan": label, "operators": count(finals[label])}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
