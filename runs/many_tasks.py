"""SST-2, MRPC and STS-B on one shared body, against three dense models of their own: scores, and the parameters of each.

The body is a folder that ``hpr compress`` wrote; each of the three models starts from its original. Every task gets as many
steps of 32 examples in either case; labels alone count, and an eighth of the training data chooses the weights. STS-B is
scored by Spearman's correlation, the others by accuracy, all on test sets:
python runs/many_tasks.py --data FOLDER out/half [--steps 500 350 550]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import PreTrainedTokenizerBase

import hpr
from glue import TASKS as CLASSES
from glue import rows_of
from hpr.checkpoints.open import open_model
from hpr.data.batches import input_batches
from hpr.data.files import read_texts
from hpr.data.sources import Mixture
from hpr.healing.loss import Weights
from hpr.nn.bank import parameters
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import eval_mode, to_device_of

OUTPUTS = {"sst2": 2, "mrpc": 2, "sts-b": 1}
Parts = dict[str, list[Batch]]


def read(data: Path, task: str, tokenizer: PreTrainedTokenizerBase, most: int) -> Parts:
    """Batches to train on, of at most so many examples, and to test on, each of about as long examples; scores from 0 to 1."""
    if task in CLASSES:
        rows = {part: found for part, found in CLASSES[task](data / task).items() if part != "dev"}
    else:
        rows = {}
        for part in ("train", "test"):
            first, second, scores = (read_texts(data / task / f"stsb-en-{part}.csv", column) for column in range(3))
            rows[part] = list(zip(first, second, strict=True)), [float(score) / 5 for score in scores]
    found = {}
    for part, (texts, labels) in rows.items():
        many = most if part == "train" else None
        read_rows = sorted(rows_of(tokenizer, (texts[:many], labels[:many])), key=lambda row: len(row["input_ids"]))
        batches = list(input_batches(read_rows, 32))
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))
        found[part] = [batches[i] for i in order]
    return found


@torch.no_grad()
def score(model: hpr.extras.ManyHeads, task: str, batches: list[Batch]) -> float:
    """Accuracy, or the rank correlation of scores."""
    with eval_mode(model):
        logits = torch.cat([model(**to_device_of(batch, model))["logits"].cpu() for batch in model.batches(task, batches)])
    labels = torch.cat([batch["labels"] for batch in batches])
    if logits.shape[-1] == 1:
        return float(spearmanr(logits.squeeze(-1), labels).statistic)
    return float((logits.argmax(-1) == labels).double().mean())


def main() -> None:
    """Train three models apart, then one for all, and say what each scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("body", type=Path, help="a folder with the shared body")
    parser.add_argument("--original", help="folder of the original; the packaged all-MiniLM-L6-v2 if left out")
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/, mrpc/ and sts-b/")
    parser.add_argument("--steps", type=int, nargs=3, default=[500, 350, 550], help="for each task")
    parser.add_argument("--rate", type=float, default=1e-3, help="relative to the scale of each parameter")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dense, shared = open_model(options.original), open_model(options.body)
    steps = dict(zip(OUTPUTS, options.steps, strict=True))
    data = {task: read(options.data, task, dense.tokenizer, most=40 * steps[task]) for task in OUTPUTS}
    labels_alone = Weights(outputs=0.0, labels=1.0)

    def trained(body: torch.nn.Module, tasks: list[str]) -> dict:
        torch.manual_seed(options.seed)
        outputs = {task: OUTPUTS[task] for task in tasks}
        model, original = (hpr.extras.ManyHeads(copy.deepcopy(one), outputs) for one in (body, dense.model))
        own = {task: model.batches(task, data[task]["train"]) for task in tasks}
        count = sum(steps[task] for task in tasks)
        recipe = hpr.Recipe(count, learning_rate=options.rate, dropout=True, seed=options.seed, weights=labels_alone)
        found = hpr.heal(model, original, Mixture(files=own, shares={task: steps[task] for task in tasks}), recipe)
        scores = {task: score(model, task, data[task]["test"]) for task in tasks}
        return {**scores, "parameters": parameters(model), "best_step": found.best_step, "seconds": found.seconds}

    for task in OUTPUTS:
        print(json.dumps({"model": f"dense, {task} alone", **trained(dense.model, [task])}), flush=True)
    for name, body in (("shared body, all three", shared.model), ("dense body, all three", dense.model)):
        print(json.dumps({"model": name, **trained(body, list(OUTPUTS))}), flush=True)
    width = dense.model.config.hidden_size
    print(json.dumps({"a further task costs": {task: width * count + count for task, count in OUTPUTS.items()}}))


if __name__ == "__main__":
    main()
