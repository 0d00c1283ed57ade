"""KWT-1 at 30 % of its encoder learns on from labelled clips that become noisy half-way, and from the same with spoilt batches.

Half of the calibration clips come as they are, then the other half with noise; an eighth, clean, are the validation set, which
may not end worse than it starts. Loss and accuracy on the 1,845 evaluation clips, clean and noisy, at the start, at the change
and at the end. Of the spoilt stream every tenth batch has its labels shuffled, is not finite, or has the wrong shape. Then
the start once more, its factors fitted to moments of the noisy half, without labels. Prints one JSON object a line:
python benchmarks/online_kwt1.py [options, see --help]
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpr
from common import kwt1
from common.paths import shared
from common.tables import say
from hpr.evaluation.divergence import accuracy
from hpr.healing.online.moments import Moments
from hpr.healing.online.options import OnlineOptions
from hpr.pipeline.rescore import rescore
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from hpr.profiling.objectives import OBJECTIVES
from kwt1_closed_form import ONLY, clips

BATCH = 15


def noised(mfcc: Tensor, amount: float, seed: int) -> Tensor:
    """Clips (n, 98, 40) with noise of so many standard deviations."""
    return mfcc + amount * mfcc.std() * torch.randn(mfcc.shape, generator=torch.Generator().manual_seed(seed))


def spoilt(batch: dict[str, Tensor], turn: int) -> dict[str, Tensor]:
    """A batch as it should not be: the labels of other clips, not finite, or of another shape."""
    if turn % 3 == 0:
        return {**batch, "labels": batch["labels"].roll(1)}
    return {**batch, "mfcc": batch["mfcc"] / 0 if turn % 3 == 1 else batch["mfcc"][:, :, :17]}


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="30%")
    parser.add_argument("--noise", type=float, default=0.15, help="standard deviations")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--every", type=int, default=4, help="batches between checks on the validation set")
    parser.add_argument("--forget", type=float, default=0.02, help="share that a batch takes of the moments")
    parser.add_argument("--passes", type=int, default=2, help="over the clips of each half")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = kwt1.load(shared() / "models" / "kwt1")
    data, known = clips("calibration")
    guarded = torch.arange(len(data)) % 8 == 0
    known = torch.from_numpy(known)
    learnt, labels = data[~guarded], known[~guarded]
    profile = hpr.profile(model, list(learnt.split(75)), "classification")
    draft = planner.draft(model, profile, PlanOptions(only=ONLY))
    plans = draft.alternatives(draft.budget(options.budget), 4)
    scores = rescore(model, profile, plans, [data[guarded]], OBJECTIVES["classification"])
    plan = min(zip(scores, plans, strict=True), key=lambda pair: pair[0].divergence.mean)[1]
    student = hpr.share(model, plan, profile)
    validation = [{"mfcc": data[guarded], "labels": known[guarded]}]
    half, stream = len(learnt) // 2, []
    for number in range(2 * options.passes):
        rows = torch.randperm(half, generator=torch.Generator().manual_seed(number))
        noisy = number >= options.passes
        rows = rows + half if noisy else rows
        given = noised(learnt[rows], options.noise, number) if noisy else learnt[rows]
        pairs = zip(given.split(BATCH), labels[rows].split(BATCH), strict=True)
        stream += [{"mfcc": part, "labels": own} for part, own in pairs]
    evaluation, truth = clips("evaluation")
    truth = torch.from_numpy(truth)
    kinds = {"clean": evaluation, "noisy": noised(evaluation, options.noise, 1000)}

    def measure(label: str, one: nn.Module, **more: Any) -> None:
        found = {}
        with torch.no_grad():
            for kind, rows in kinds.items():
                logits = torch.cat([one(part) for part in rows.split(205)])
                found[kind] = {"loss": float(F.cross_entropy(logits, truth)), "accuracy": accuracy(logits, truth)}
        say(at=label, **found, **more)

    measure("original", model)
    for name in ("as it is", "spoilt"):
        settings = OnlineOptions(learning_rate=options.rate, every=options.every, tolerance=0.0, objective="classification")
        healer = hpr.extras.OnlineHealer(copy.deepcopy(student), validation, options=settings)
        measure(f"{name}, start", healer.student, validation=healer.start)
        updates = []
        for place, batch in enumerate(stream):
            broken = name == "spoilt" and place % 10 == 5
            updates.append(healer.update(spoilt(batch, place // 10) if broken else batch))
            if place + 1 == len(stream) // 2:
                measure(f"{name}, change", healer.student, validation=healer.measure())
        counts = {
            "batches": len(updates),
            "refused": sum(update.refused is not None for update in updates),
            "rolled_back": sum(update.rolled_back for update in updates),
            "drift": [update.step for update in updates if update.drift],
        }
        measure(f"{name}, end", healer.student, validation=healer.settle(), **counts)
    moments = Moments(model, plan, profile, forget=options.forget)
    moments.add([batch["mfcc"] for batch in stream[len(stream) // 2 :]])
    measure("fitted anew to the moments of the noisy half", moments.fitted())


if __name__ == "__main__":
    sys.exit(main())
