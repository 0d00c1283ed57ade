"""all-MiniLM-L6-v2, halved, learns on from a stream that changes its kind of text half-way, and from a corrupted one.

Docstrings come first, then film reviews; the validation set is docstrings. Divergence from the original and cosine on held-out
text of both kinds, before, at the change and at the end; then the same stream with every tenth batch spoilt (answers of other
texts, not finite, wrong shape); then updates per second against plain training steps of the dense model in the same run.
Compresses first, into --folder, unless that was done. Prints one JSON object a line:
python benchmarks/online_minilm.py --folder FOLDER [options, see --help]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hpr
from common.tables import say
from common.texts import unlabelled
from hpr.checkpoints.open import open_model
from hpr.data.batches import text_batches
from hpr.data.splits import open_data
from hpr.evaluation.divergence import compare
from hpr.healing.online.options import OnlineOptions
from hpr.profiling.objectives import OBJECTIVES
from hpr.runtime.hooks import run, to_device_of

GOAL = OBJECTIVES["embedding"]
FIRST, SECOND = "docstrings", "reviews"


def spoilt(batch: dict[str, Any], place: int) -> dict[str, Any]:
    """A batch as it should not be: tokens that do not exist, no position at all, or one token over and over."""
    broken = dict(batch)
    if place % 3 == 0:
        broken["input_ids"] = broken["input_ids"] + 10**6
    elif place % 3 == 1:
        broken = {name: value[:, :0] for name, value in broken.items()}
    else:
        broken["input_ids"] = torch.full_like(broken["input_ids"], 2003)
    return broken


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the compressed model is, or goes")
    parser.add_argument("--batches", type=int, default=120, help="of 16 texts, half of either kind")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--tolerance", type=float, default=0.01)
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher = open_model(None)
    if not (options.folder / "plan.json").is_file():
        hpr.compress(budget="50%", output=options.folder)
    kinds = unlabelled()
    half = options.batches // 2
    streams = [text_batches(kinds[kind][: 16 * half], teacher.tokenizer, 16, 128, ratio=1e9) for kind in (FIRST, SECOND)]
    stream = [*streams[0], *streams[1]]
    held = {FIRST: open_data(None, teacher, "heldout", 1024)[0]}
    held[SECOND] = text_batches(kinds[SECOND][-1024:], teacher.tokenizer, 64, 128)
    validation = text_batches(kinds[FIRST][-256:], teacher.tokenizer, 64, 128)

    def measure(label: str, model: nn.Module, **more: object) -> None:
        found = {}
        for kind, batches in held.items():
            one = compare(model, teacher.model, batches, GOAL)
            found[kind] = {"divergence": one.divergence.mean, "cosine": one.cosine}
        say(at=label, **found, **more)

    def learner() -> hpr.extras.OnlineHealer:
        student = open_model(options.folder).model
        settings = OnlineOptions(learning_rate=options.rate, tolerance=options.tolerance, objective="embedding")
        return hpr.extras.OnlineHealer(student, validation, teacher.model, settings)

    for name in ("clean", "corrupted"):
        healer = learner()
        measure(f"{name}, start", healer.student, validation=healer.start)
        start, updates = time.perf_counter(), []
        for place, batch in enumerate(stream):
            updates.append(healer.update(spoilt(batch, place // 10) if name == "corrupted" and place % 10 == 5 else batch))
            if place + 1 == half:
                measure(f"{name}, change", healer.student, validation=healer.measure())
        value, seconds = healer.settle(), time.perf_counter() - start
        counts = {
            "refused": sum(update.refused is not None for update in updates),
            "rolled_back": sum(update.rolled_back for update in updates),
            "drift": [update.step for update in updates if update.drift],
        }
        measure(f"{name}, end", healer.student, validation=value, seconds=seconds, **counts)
    speed(copy.deepcopy(teacher.model), learner(), stream)


def speed(model: nn.Module, healer: hpr.extras.OnlineHealer, stream: list[Any], count: int = 24) -> None:
    """Updates per second, checks included, and plain training steps of the dense model on the same batches, in turns."""
    solver = torch.optim.AdamW(model.parameters(), lr=1e-6)
    seconds = {"update": 0.0, "dense step": 0.0}
    for batch in stream[:count]:
        start = time.perf_counter()
        healer.update(batch)
        middle = time.perf_counter()
        run(model, to_device_of(batch, model)).last_hidden_state.square().mean().backward()
        solver.step()
        solver.zero_grad()
        seconds["update"] += middle - start
        seconds["dense step"] += time.perf_counter() - middle
    say(per_second={name: count / value for name, value in seconds.items()}, ratio=seconds["update"] / seconds["dense step"])


if __name__ == "__main__":
    sys.exit(main())
