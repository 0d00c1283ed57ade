"""all-MiniLM-L6-v2's encoder at equal parameters, by operator, before and after the same healing.

Layers dropped, private low rank, tied, tie + delta, shared bases and the planner's own choice, each at half of the encoder's
linear weights. Prints one JSON object a line, a table at the end:
python benchmarks/heal_operators.py [options, see --help]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import nn

import hpr
from common import peers
from common.paths import shared
from common.tables import markdown, say
from common.tasks import embedder, sts_correlation, sts_pairs
from heal_minilm import TEXTS
from hpr.anatomy.describe import describe
from hpr.checkpoints.open import open_model
from hpr.data.batches import first_batches
from hpr.data.splits import TRAINED, Splits, prepare
from hpr.evaluation.divergence import compare, divergence
from hpr.healing.loss import Weights
from hpr.pipeline.rescore import rescore
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from hpr.profiling.objectives import OBJECTIVES
from hpr.profiling.profile import Profile

GOAL = OBJECTIVES["embedding"]
ONLY = "encoder.*"
METHODS = {
    "private low rank": ["low rank"],
    "tied": ["tie"],
    "tie + delta": ["tie + delta"],
    "shared bases": ["shared input basis", "shared output basis"],
    "the planner's choice": None,
}


def students(model: nn.Module, profile: Profile, data: Splits, budget: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, student and what it keeps of the encoder's linear weights."""
    anatomy = describe(model)
    dense = sum(site.parameters for site in anatomy.select(ONLY))
    stack = anatomy.stacks[0]
    gone: list[int] = []
    while len(gone) < stack.layers // 2:
        rest = [layer for layer in range(stack.layers) if layer not in gone]
        losses = {
            layer: divergence(peers.drop_layers(model, [*gone, layer], stack.path), model, data.rescoring, GOAL).mean
            for layer in rest
        }
        gone.append(min(losses, key=losses.__getitem__))
    yield "layers dropped", peers.drop_layers(model, gone, stack.path), dense - dense * len(gone) // stack.layers
    for name, operators in METHODS.items():
        draft = planner.draft(model, profile, PlanOptions(only=ONLY, operators=operators))
        plans = draft.alternatives(draft.budget(budget), 3)
        scores = rescore(model, profile, plans, data.rescoring, GOAL)
        plan = plans[min(range(len(plans)), key=lambda index: scores[index].divergence.mean)]
        kept = dense - (anatomy.total_parameters - plan.parameters(anatomy))
        yield name, hpr.share(model, plan, profile), kept


def main() -> None:
    """Print rows and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--text", choices=list(TEXTS), default="docstrings")
    parser.add_argument("--for", dest="amount", default="300steps")
    parser.add_argument("--rate", type=float, default=hpr.Recipe.learning_rate)
    parser.add_argument("--examples", type=int, default=4096, help="to profile on; healing takes all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher = open_model(None)
    data = prepare(TEXTS[options.text](), teacher, TRAINED)
    profile = hpr.profile(teacher.model, first_batches(data.calibration, options.examples), "embedding")
    pairs = {name: sts_pairs(shared() / "data" / "sts-b" / f"stsb-en-{name}.csv") for name in ("dev", "test")}

    def measure(model: nn.Module) -> dict[str, float | None]:
        embed = embedder(model, teacher.tokenizer)
        scores: dict[str, float | None] = {name: sts_correlation(embed, several) for name, several in pairs.items()}
        return scores | {"cosine": compare(model, teacher.model, data.heldout, GOAL).cosine}

    say(method="dense", after=measure(teacher.model), settings=vars(options))
    table = []
    for name, student, kept in students(teacher.model, profile, data, options.budget):
        before = measure(student)
        recipe = hpr.Recipe(duration=options.amount, learning_rate=options.rate, seed=options.seed, weights=Weights())
        found = hpr.heal(student, teacher, data, recipe)
        row = say(
            method=name, kept=kept, before=before, after=measure(student), seconds=found.seconds, best_step=found.best_step
        )
        flat = {f"{key} {when}": row[when][key] for key in ("cosine", "dev", "test") for when in ("before", "after")}
        table.append({"method": name, "kept": kept, **flat, "seconds": found.seconds})
    columns = dict.fromkeys(table[0], ".4f") | {"method": "", "kept": ",", "seconds": ".0f"}
    print(f"\n{markdown(table, {key: columns[key] for key in table[0]})}")


if __name__ == "__main__":
    sys.exit(main())
