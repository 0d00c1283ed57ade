"""Quality at a number of bytes, no training: coded rounding beside round-to-nearest and one-sided rounding.

Peers at the same bytes: "nearest" rounds in groups of 64 numbers with a 16-bit scale and a 16-bit offset each, at a fixed
width; "one side" is coded rounding with the input moments alone (GPTQ with entropy coding, as
WaterSIC, arXiv 2603.04956, has it). All keep norms and biases in 16 bits,
and all but "nearest" correct biases. "ours" chooses its damping on calibration data that was not profiled.

Run: python benchmarks/bytes.py minilm    (or kwt1)
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import hpr
from common import kwt1
from common.paths import shared
from common.tables import markdown, say
from common.tasks import embedder, sts_correlation, sts_pairs
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import weight_at
from hpr.data.splits import prepare
from hpr.evaluation.cost import disk_bytes
from hpr.evaluation.divergence import accuracy, compare, divergence
from hpr.profiling.objectives import OBJECTIVES, Objective
from hpr.profiling.profile import Profile
from hpr.rounding.plan import plan_bytes
from kwt1_closed_form import clips

GROUP = 64


@dataclass(frozen=True)
class Ground:
    """What all methods stand on: the model, data that chooses, the profile, and how a student is scored."""

    model: nn.Module
    choosing: Sequence[Any]
    goal: Objective
    profile: Profile
    score: Callable[[nn.Module], dict[str, float]]
    megabytes: Sequence[float]
    widths: Sequence[int]


def minilm() -> Ground:
    """all-MiniLM-L6-v2 on docstrings, and its STS-B test correlation."""
    loaded = hpr.open_model(None)
    texts = prepare(None, loaded, 4096)
    goal = OBJECTIVES["embedding"]
    pairs = sts_pairs(shared() / "data" / "sts-b" / "stsb-en-test.csv")

    def score(student: nn.Module) -> dict[str, float]:
        return {
            "divergence": divergence(student, loaded.model, texts.heldout, goal).mean,
            "STS-B": sts_correlation(embedder(student, loaded.tokenizer), pairs),
        }

    profile = hpr.profile(loaded, None)
    return Ground(loaded.model, texts.rescoring, goal, profile, score, (12.0, 7.7, 5.6, 4.2, 2.9), (8, 4, 3, 2))


def speech() -> Ground:
    """KWT-1 on calibration clips, and its accuracy on evaluation clips."""
    model, goal = kwt1.load(shared() / "models" / "kwt1"), OBJECTIVES["classification"]
    calibration, _ = clips("calibration")
    evaluation, labels = clips("evaluation")
    evaluated = list(evaluation.split(205))

    def score(student: nn.Module) -> dict[str, float]:
        found = compare(student, model, evaluated, goal)
        return {"divergence": found.divergence.mean, "accuracy": 100 * accuracy(found.student, labels)}

    profile = hpr.profile(model, list(calibration[:500].split(50)), "classification")
    choosing = list(calibration[500:].split(50))
    return Ground(model, choosing, goal, profile, score, (0.150, 0.125, 0.112, 0.095, 0.080), (4, 3, 2))


def nearest(model: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """Every weight rounded to the nearest of 2^bits values between the smallest and largest of its group, and the bytes."""
    student = copy.deepcopy(model)
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        for site in describe(model).sites:
            weight = weight_at(student, site)
            width = weight.shape[1]
            for start in range(0, width, GROUP):
                part = weight[:, start : start + GROUP]
                low, high = part.amin(1, keepdim=True).half().float(), part.amax(1, keepdim=True).half().float()
                step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
                part.copy_(((part - low) / step).round().clamp(0, 2**bits - 1) * step + low)
            size += int(site.parameters * bits / 8 - 2 * site.parameters + 4 * site.out_features * -(-width // GROUP))
    return student, size


def one_sided(profile: Profile) -> Profile:
    """The profile with the output moments of linear sites replaced by their mean diagonal."""
    sites = {
        name: replace(site, left=torch.full((len(site.left),), float(site.left.diagonal().mean())).double())
        if site.left.dim() == 2
        else site
        for name, site in profile.sites.items()
    }
    return replace(profile, sites=sites)


def saved_bytes(student: nn.Module) -> int:
    """The bytes of the file of weights that ``hpr.save`` writes."""
    with TemporaryDirectory() as folder:
        hpr.save(student, Path(folder) / "model")
        return os.path.getsize(Path(folder) / "model" / "model.safetensors")


def main() -> None:
    """Print one JSON line per row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("minilm", "kwt1"))
    parser.add_argument("--megabytes", type=float, nargs="+", help="instead of the sizes of the table")
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    on = {"minilm": minilm, "kwt1": speech}[given.model]()
    rows = [say(method="original", megabytes=disk_bytes(on.model) / 1e6, **on.score(on.model))]

    def measure(student: nn.Module) -> float:
        return divergence(student, on.model, on.choosing, on.goal).mean

    for bits in on.widths:
        student, size = nearest(on.model, bits)
        rows.append(say(method=f"nearest, {bits} bits", megabytes=size / 1e6, **on.score(student)))
    for name, profile in (("one side", one_sided(on.profile)), ("ours", on.profile)):
        for megabytes in given.megabytes or on.megabytes:
            made = plan_bytes(on.model, profile, f"{megabytes}MB", int(megabytes * 1e6), measure)
            assert made.plan.rounding is not None
            facts = {"predicted": made.plan.damage, "damping": made.plan.rounding.input_damping}
            size = saved_bytes(made.student)
            rows.append(say(method=name, megabytes=size / 1e6, planned=made.bytes / 1e6, **on.score(made.student), **facts))
    columns = {"method": "", "megabytes": ".3f", "divergence": ".4f", "predicted": ".4f", "STS-B": ".4f", "accuracy": ".1f"}
    print(markdown(rows, {key: form for key, form in columns.items() if any(key in row for row in rows)}))


if __name__ == "__main__":
    main()
