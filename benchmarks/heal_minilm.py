"""all-MiniLM-L6-v2, healed: STS-B, cosine, and a linear probe on SST-2, before and after, with the wall time.

Compresses first (into --folder, which a second call takes up again), then heals. Calibration text has no labels: docstrings
alone, or a mixture with captions, reviews, news, stories and encyclopaedia, without any sentence of STS-B. Prints one JSON
object a line:
python benchmarks/heal_minilm.py --budget 50% --text mixture --for 300steps [options, see --help]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpr
from common.paths import shared
from common.tables import say
from common.tasks import Embed, embedder, labelled_texts, sts_correlation, sts_pairs
from common.texts import mixture
from hpr.checkpoints.open import open_model
from hpr.data.splits import TRAINED, prepare
from hpr.evaluation.divergence import compare
from hpr.healing.loss import Weights
from hpr.profiling.objectives import OBJECTIVES

GOAL = OBJECTIVES["embedding"]
TEXTS = {"docstrings": lambda: None, "mixture": mixture}
PROBED = 20000  # reviews that the probe is fitted on


def probe(embed: Embed) -> float:
    """Accuracy of logistic regression on embeddings, fitted on SST-2's training set, on its test set."""
    data = shared() / "data" / "sst2"
    rows, labels = {}, {}
    for name, most in (("train", PROBED), ("test", None)):
        texts, known = labelled_texts(data / f"{name}.tsv")
        rows[name], labels[name] = embed(texts[:most]).double().cpu(), torch.tensor(known[:most])
    weight = fit_probe(rows["train"], labels["train"])
    return float((_logits(weight, rows["test"]).argmax(-1) == labels["test"]).double().mean())


def fit_probe(rows: Tensor, labels: Tensor) -> Tensor:
    """(classes, d + 1), by L-BFGS on cross-entropy with a ridge of 1e-5."""
    weight = torch.zeros(int(labels.max()) + 1, rows.shape[1] + 1, dtype=rows.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(_logits(weight, rows), labels) + 1e-5 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return weight.detach()


def _logits(weight: Tensor, rows: Tensor) -> Tensor:
    return F.linear(10 * rows, weight[:, :-1], weight[:, -1])


def main() -> None:
    """Print what was measured before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--text", choices=list(TEXTS), default="mixture")
    parser.add_argument("--folder", type=Path, required=True, help="where the compressed model is, or goes")
    parser.add_argument("--for", dest="amount", default="300steps")
    parser.add_argument("--rate", type=float, default=hpr.Recipe.learning_rate)
    parser.add_argument("--hidden", type=float, default=Weights.hidden)
    parser.add_argument("--relations", type=float, default=Weights.relations)
    parser.add_argument("--blocks", type=float, default=0.0)
    parser.add_argument("--ramp", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="also measure on the test split of STS-B")
    parser.add_argument("--probe", action="store_true", help="also fit probes on SST-2")
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher, data = open_model(None), TEXTS[options.text]()
    splits = prepare(data, teacher, TRAINED)
    names = ("dev", "test") if options.test else ("dev",)
    pairs = {name: sts_pairs(shared() / "data" / "sts-b" / f"stsb-en-{name}.csv") for name in names}

    def measure(label: str, model: nn.Module, **more: object) -> None:
        embed = embedder(model, teacher.tokenizer)
        scores = {name: sts_correlation(embed, several) for name, several in pairs.items()}
        if options.probe:
            scores["sst2"] = probe(embed)
        cosine = compare(model, teacher.model, splits.heldout, GOAL).cosine
        say(model=label, budget=options.budget, text=options.text, **scores, cosine=cosine, **more)

    if not (options.folder / "plan.json").is_file():
        start = time.perf_counter()
        hpr.compress(budget=options.budget, data=data, output=options.folder)
        say(compressed=str(options.folder), seconds=time.perf_counter() - start)
    student = open_model(options.folder).model
    measure("dense", teacher.model)
    measure("compressed", student)
    recipe = hpr.Recipe(
        duration=options.amount,
        learning_rate=options.rate,
        blocks=options.blocks,
        ramp=options.ramp,
        seed=options.seed,
        weights=Weights(hidden=options.hidden, relations=options.relations),
    )
    found = hpr.heal(student, teacher, splits, recipe)
    quality = {"before": found.before.mean, "after": found.after.mean, "best_step": found.best_step, "stages": found.gains}
    settings = {name: value for name, value in vars(options).items() if name not in ("folder", "test", "probe")}
    measure("healed", student, seconds=found.seconds, steps=found.steps, validation=quality, settings=settings)


if __name__ == "__main__":
    sys.exit(main())
