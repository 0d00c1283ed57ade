"""BabyLlama (characters, 0.94 M), healed at 50 % of its linear weights: bits per character before and after.

Plans as stories.py does, then heals on the calibration stories without labels. Prints one JSON object a line, continuations
of one prompt among them: python benchmarks/heal_stories.py [options, see --help]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

import hpr
from common.comparison import ground, ours
from common.paths import shared
from common.tables import say
from hpr.checkpoints.open import open_model
from hpr.data.files import read_texts
from hpr.data.splits import prepare
from hpr.evaluation.divergence import compare
from hpr.healing.loss import Weights
from hpr.profiling.objectives import OBJECTIVES
from stories import ONLY, bits_per_character, continuation


def main() -> None:
    """Print what was measured before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="babyllama-tok105")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--for", dest="amount", default="500steps")
    parser.add_argument("--rate", type=float, default=hpr.Recipe.learning_rate)
    parser.add_argument("--temperature", type=float, default=Weights.temperature)
    parser.add_argument("--hidden", type=float, default=Weights.hidden)
    parser.add_argument("--examples", type=int, default=4096, help="windows of calibration text to profile and to heal on")
    parser.add_argument("--stories", type=int, default=1000, help="evaluation stories to measure on, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(0)
    opened = open_model(shared() / "models" / options.model)
    goal = OBJECTIVES[opened.objective]
    documents = read_texts(shared() / "data" / "tinystories" / "evaluation.txt")[: options.stories]
    data = prepare(shared() / "data" / "tinystories" / "calibration.txt", opened, options.examples)
    data = replace(data, more=None, parts={})  # heal on the windows that were profiled
    on = ground(opened.model, data, goal, ONLY)
    made = min(ours(on, options.budget), key=lambda one: compare(one.student, on.model, data.rescoring, goal).divergence.mean)

    def measure(name: str, student: torch.nn.Module, **more: object) -> None:
        bits = bits_per_character(student, opened.tokenizer, documents, opened.model.config.max_position_embeddings)
        say(model=name, budget=options.budget, bits=bits, text=continuation(student, opened.tokenizer, sample=False), **more)

    measure("dense", opened.model)
    measure(made.method, made.student, parameters=made.parameters)
    recipe = hpr.Recipe(
        duration=options.amount,
        learning_rate=options.rate,
        seed=options.seed,
        weights=Weights(hidden=options.hidden, temperature=options.temperature),
    )
    found = hpr.heal(made.student, opened, data, recipe)
    quality = {"before": found.before.mean, "after": found.after.mean, "best_step": found.best_step}
    measure("healed", made.student, seconds=found.seconds, validation=quality, settings=vars(options))


if __name__ == "__main__":
    sys.exit(main())
