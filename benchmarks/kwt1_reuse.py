"""KWT-1: layers that are dropped or reuse attention, alone and in plans: accuracy against floating-point operations.

Interventions and choices use 150 calibration clips without labels; accuracy and divergence are those of the 1,845 evaluation
clips. Prints one JSON object a line. Run: python benchmarks/kwt1_reuse.py
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch

import hpr
from common import kwt1
from common.paths import shared
from hpr.evaluation.cost import forward_flops
from hpr.evaluation.divergence import accuracy, compare
from hpr.layer_reuse.ablation import intervene, reuses
from hpr.layer_reuse.reuse import with_layers
from hpr.nn.bank import parameters
from hpr.pipeline.layer_plans import REUSE_MARGIN, reusing_plans
from hpr.planning import planner
from hpr.plans.plan import keep_all
from hpr.profiling.objectives import OBJECTIVES
from kwt1_closed_form import clips

GOAL = OBJECTIVES["classification"]
PRICE = 3e-6  # nats a parameter: lets the rows of reuse alone go on to six layers
BUDGETS = ("80%", "60%", "50%", "40%", "30%")


def main() -> None:
    """Print interventions, then one row for each way to reuse, then plans with and without."""
    torch.manual_seed(0)
    model = kwt1.load(shared() / "models" / "kwt1")
    anatomy = hpr.describe(model)
    calibration, _ = clips("calibration")
    profiled, choosing = list(calibration[:450].split(50)), list(calibration[450:].split(50))
    evaluation, labels = clips("evaluation")
    evaluated = list(evaluation.split(205))
    dense = forward_flops(model, evaluated[0])

    def report(method: str, student: torch.nn.Module, **more: object) -> None:
        found = compare(student, model, evaluated, GOAL)
        row = {
            "method": method,
            "flops": forward_flops(student, evaluated[0]) / dense,
            "parameters": parameters(student) / anatomy.total_parameters,
            "accuracy": accuracy(found.student, labels),
            "divergence": found.divergence.mean,
        }
        print(json.dumps({**row, **more}), flush=True)

    report("dense", model)
    profile = hpr.profile(model, profiled, "classification")
    profile = replace(profile, interventions=intervene(model, choosing, GOAL))
    print(json.dumps({"interventions": profile.interventions}), flush=True)
    for reuse in reuses(model, profile.interventions, choosing, GOAL, lambda one: PRICE * one.parameters(anatomy)):
        plan = with_layers(keep_all(anatomy), anatomy, reuse.states, reuse.dead_weights)
        report("reuse alone", hpr.share(model, plan), states=reuse.states, on_choosing=reuse.damage)
    draft = planner.draft(model, profile)
    for budget in BUDGETS:
        limit = draft.budget(budget)
        best = draft.best(limit)
        report("plan without reuse", hpr.share(model, best, profile), budget=budget, predicted=best.damage)
        found = reusing_plans(model, profile, draft, limit, choosing, GOAL)
        for plan in (proposal.plan for proposal in found):
            student = hpr.share(model, plan, profile)
            report("plan with reuse", student, budget=budget, predicted=plan.damage, layers=dict(plan.layers))
        if not found:
            print(json.dumps({"budget": budget, "with reuse": f"none within {REUSE_MARGIN} of the best"}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
