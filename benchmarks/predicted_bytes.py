"""Predicted against measured damage of coded plans: rank correlation and ratio for each model, and what one factor mends.

Each model is rounded to eight sizes with equal dampings. The damage that the profile predicts is set against the divergence on
calibration data that was not profiled. "Corrected" multiplies all predictions of a model by one factor: the ratio that was
measured at one plan in the middle, which is left out of the corrected figures.

Run: python benchmarks/predicted_bytes.py [minilm kwt1 babyllama-tok105 stories260k g2p-bart-us] [--examples 1024]
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

import hpr
from bytes_writers import writer
from common import kwt1
from common.paths import shared
from common.tables import markdown, say
from hpr.data.splits import prepare
from hpr.evaluation.cost import disk_bytes
from hpr.evaluation.divergence import divergence
from hpr.profiling.objectives import OBJECTIVES, Objective
from hpr.rounding.plan import plan_bytes
from kwt1_closed_form import clips

SHARES = (20.0, 16.0, 13.0, 11.0, 9.5, 8.0, 7.0, 6.0)  # percent of the bytes in float32


@dataclass(frozen=True)
class Case:
    """A model, batches to profile and batches to measure on."""

    model: nn.Module
    profiled: Sequence[Any]
    measured: Sequence[Any]
    goal: Objective


def minilm(examples: int) -> Case:
    """all-MiniLM-L6-v2 on docstrings."""
    loaded = hpr.open_model(None)
    data = prepare(None, loaded, examples)
    return Case(loaded.model, data.calibration, data.rescoring, loaded.goal)


def speech(examples: int) -> Case:
    """KWT-1 on calibration clips, of which there are 600."""
    calibration, _ = clips("calibration")
    batches = list(calibration.split(50))
    return Case(kwt1.load(shared() / "models" / "kwt1"), batches[:-2], batches[-2:], OBJECTIVES["classification"])


def writing(name: str) -> Callable[[int], Case]:
    """A writer of ``bytes_writers.py``."""

    def make(examples: int) -> Case:
        on = writer(name, examples, 1)
        return Case(on.loaded.model, on.data.calibration, on.data.rescoring[:3], on.loaded.goal)

    return make


CASES: dict[str, Callable[[int], Case]] = {"minilm": minilm, "kwt1": speech} | {
    name: writing(name) for name in ("babyllama-tok105", "stories260k", "g2p-bart-us")
}


def measured(name: str, examples: int) -> list[dict[str, Any]]:
    """One row for each size: nats that were predicted and measured."""
    on = CASES[name](examples)
    profile = hpr.profile(on.model, on.profiled, on.goal.name, structure=False)
    rows = []
    for share in SHARES:
        made = plan_bytes(on.model, profile, f"{share}%bytes", int(share / 100 * disk_bytes(on.model)))
        found = divergence(made.student, on.model, on.measured, on.goal)
        about = {"model": name, "temperature": profile.about.get("temperature"), "share": share, "bytes": made.bytes}
        rows.append(say(**about, predicted=made.plan.damage, measured=found.mean, error=found.error))
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation; median of measured over predicted; the farthest ratios before and after one factor."""
    ratios = [row["measured"] / row["predicted"] for row in rows]
    middle = len(rows) // 2
    corrected = [ratio / ratios[middle] for place, ratio in enumerate(ratios) if place != middle]
    rank = spearmanr([row["predicted"] for row in rows], [row["measured"] for row in rows]).statistic
    return {
        "model": rows[0]["model"],
        "temperature": rows[0]["temperature"],
        "plans": len(rows),
        "rank correlation": float(rank),
        "median ratio": median(ratios),
        "farthest": max(ratios, key=_distance),
        "corrected median": median(corrected),
        "corrected farthest": max(corrected, key=_distance),
    }


def _distance(ratio: float) -> float:
    return abs(math.log(ratio))


def main() -> None:
    """Print one JSON line per plan and a table of the models at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="model", help=", ".join(CASES))
    parser.add_argument("--examples", type=int, default=1024, help="examples to profile, at most")
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    table = [say(**summary(measured(name, given.examples))) for name in given.names or CASES]
    print(markdown(table, {key: ".2f" if isinstance(value, float) else "" for key, value in table[0].items()}))


if __name__ == "__main__":
    main()
