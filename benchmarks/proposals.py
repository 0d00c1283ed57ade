"""What the proposals of layer features are worth: KWT-1, 12 layers, encoder weights, calibration clips without labels.

Similarity proposes which distant layers to measure as pairs: the least predicted damage with its proposals, with none, with
random ones and with every pair measured. Block influence and context dependence could propose which layers to drop and which
to let reuse attention: how they rank the layers against interventions. Run: python benchmarks/proposals.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from unittest.mock import patch

import torch
from scipy.stats import spearmanr

import hpr
from common import kwt1
from common.paths import shared
from common.tables import markdown, say
from hpr.layer_reuse.ablation import intervene
from hpr.planning import groupings, planner
from hpr.planning.options import PlanOptions
from hpr.plans.layer_states import DROPPED, WEIGHTS
from hpr.profiling.objectives import OBJECTIVES
from hpr.profiling.profile import Profile
from kwt1_closed_form import ONLY, clips

BUDGETS = ("60%", "50%", "40%", "30%")


def rated(profile: Profile, similarity: torch.Tensor) -> Profile:
    """The profile with another similarity of its one stack's layers."""
    ((path, features),) = profile.layers.items()
    return replace(profile, layers={path: replace(features, similarity=similarity.tolist())})


@contextmanager
def all_pairs() -> Iterator[None]:
    """The planner measures every pair of layers before it matches them."""
    matching = groupings.matching

    def after_all(groups: groupings.Groups, start: int, stop: int) -> tuple[int, ...]:
        for pair in combinations(range(start, stop), 2):
            groups.shared(pair)
        return matching(groups, start, stop)

    with patch.object(groupings, "matching", after_all):
        yield


def main() -> None:
    """Print both ablations."""
    torch.manual_seed(0)
    model = kwt1.load(shared() / "models" / "kwt1")
    calibration, _ = clips("calibration")
    profile = hpr.profile(model, list(calibration[:450].split(50)), "classification")
    (features,) = profile.layers.values()
    layers = len(features.similarity)
    draw = torch.Generator().manual_seed(0)
    variants = {
        "none": replace(profile, layers={}),
        "random pairs": rated(profile, torch.rand(layers, layers, generator=draw)),
        "the most alike": profile,
        "the least alike": rated(profile, -torch.tensor(features.similarity)),
    }
    found = []
    for name, variant in variants.items():
        draft = planner.draft(model, variant, PlanOptions(only=ONLY))
        found.append(say(measured=name, **{text: draft.best(draft.budget(text)).damage for text in BUDGETS}))
    with all_pairs():
        draft = planner.draft(model, profile, PlanOptions(only=ONLY))
        found.append(say(measured="all pairs", **{text: draft.best(draft.budget(text)).damage for text in BUDGETS}))
    print(f"\n{markdown(found, {'measured': '', **dict.fromkeys(BUDGETS, '.4e')})}\n")
    interventions = intervene(model, list(calibration[450:].split(50)), OBJECTIVES["classification"])
    found = []
    for state in (DROPPED, WEIGHTS):
        known = {int(layer.rsplit(".", 1)[1]): damages[state] for layer, damages in interventions.items() if state in damages}
        order = sorted(known, key=known.__getitem__)
        for feature in ("block_influence", "context_dependence"):
            values = getattr(features, feature)
            proposed = min(known, key=values.__getitem__)
            row = say(
                state=state,
                feature=feature,
                spearman=float(spearmanr([values[layer] for layer in known], list(known.values())).statistic),
                proposes=proposed,
                nats=known[proposed],
                rank=order.index(proposed) + 1,
                best=order[0],
                least=known[order[0]],
            )
            found.append(row)
    columns = {
        "state": "",
        "feature": "",
        "spearman": ".2f",
        "proposes": "",
        "nats": ".3f",
        "rank": "",
        "best": "",
        "least": ".3f",
    }
    print(f"\n{markdown(found, columns)}")


if __name__ == "__main__":
    sys.exit(main())
