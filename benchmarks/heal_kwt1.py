"""KWT-1, healed on its 600 calibration clips without labels: divergence and accuracy on the 1,845 evaluation clips.

Plans at a share of the encoder's linear weights as kwt1_closed_form.py does, then heals; 75 of the 600 clips choose the
plan and are the validation set. Prints one JSON object a line:
python benchmarks/heal_kwt1.py [30% 15%] [--steps 400] [options, see --help]
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

import hpr
from common import kwt1
from common.paths import shared
from common.tables import count, say
from hpr.evaluation.divergence import accuracy, compare, divergence
from hpr.healing.augmentation import augmentation
from hpr.healing.loss import Weights
from hpr.healing.train import train
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from kwt1_closed_form import GOAL, ONLY, clips


def main() -> None:
    """Print what was measured before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", nargs="*", default=["30%", "15%"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=hpr.Recipe.learning_rate)
    parser.add_argument("--temperature", type=float, default=Weights.temperature)
    parser.add_argument("--hidden", type=float, default=Weights.hidden)
    parser.add_argument("--blocks", type=float, default=0.0)
    parser.add_argument("--ramp", type=float, default=0.0)
    parser.add_argument("--plain", action="store_true", help="clips as they are, neither mixed nor shifted nor noised")
    parser.add_argument("--operators", help="of the plan, separated by commas; all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = kwt1.load(shared() / "models" / "kwt1")
    calibration, _ = clips("calibration")
    evaluation, labels = clips("evaluation")
    trained = [calibration[i] for i in range(len(calibration)) if i % 8]
    batches = list(torch.stack(trained).split(75))
    validation = list(calibration[::8].split(75))

    def measure(name: str, student: nn.Module, budget: str, **more: object) -> None:
        found = compare(student, model, list(evaluation.split(205)), GOAL)
        say(model=name, budget=budget, divergence=found.divergence.mean, accuracy=accuracy(found.student, labels), **more)

    measure("dense", model, "100%")
    profile = hpr.profile(model, batches, "classification")
    draft = planner.draft(model, profile, PlanOptions(only=ONLY, operators=options.operators and options.operators.split(",")))
    for budget in options.budgets:
        students = []
        for plan in draft.alternatives(draft.budget(budget), 4):
            for refitted in (False, True):
                student = hpr.share(model, plan, profile)
                if refitted:
                    hpr.refit(student, model, batches, plan, profile)
                students.append((divergence(student, model, validation, GOAL).mean, refitted, plan, student))
        _, refitted, plan, student = min(students, key=lambda row: row[0])
        measure("compressed", student, budget, refit=refitted, operators=count(plan))
        recipe = hpr.Recipe(
            duration=options.steps,
            learning_rate=options.rate,
            blocks=options.blocks,
            ramp=options.ramp,
            seed=options.seed,
            weights=Weights(hidden=options.hidden, temperature=options.temperature),
            objective=GOAL.name,
            augment=None if options.plain else augmentation(),
        )
        found = train(student, model, batches, validation, recipe)
        quality = {"before": found.before.mean, "after": found.after.mean, "best_step": found.best_step, "stages": found.gains}
        measure("healed", student, budget, seconds=found.seconds, validation=quality, settings=vars(options))


if __name__ == "__main__":
    sys.exit(main())
