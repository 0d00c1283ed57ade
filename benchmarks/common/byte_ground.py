"""What every method at a number of bytes stands on: the model, its profile, data that chooses, and how students are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hpr
from common import kwt1
from common.paths import shared
from common.tasks import embedder, sts_correlation, sts_pairs
from common.texts import divided
from hpr.data.batches import text_batches
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import Splits, prepare
from hpr.evaluation.divergence import accuracy, compare, divergence, embeddings
from hpr.profiling.objectives import OBJECTIVES, Objective
from hpr.profiling.profile import Profile
from kwt1_closed_form import clips

DIVERGENCES = ("divergence", "six kinds")  # the scores in nats: lower is better


@dataclass(frozen=True)
class Ground:
    """What all methods stand on. ``score`` gives the figures of a student by name; those of ``DIVERGENCES`` are in nats.

    ``choosing``: batches that the profile has not seen and no score uses. ``loaded``: the model with its tokenizer, for text.
    ``calibration``: the batches of the profile.
    """

    model: nn.Module
    choosing: Sequence[Any]
    goal: Objective
    profile: Profile
    score: Callable[[nn.Module], dict[str, float]]
    megabytes: Sequence[float]
    widths: Sequence[int]
    loaded: LoadedModel | None = None
    calibration: Sequence[Any] = ()

    def measure(self, student: nn.Module) -> float:
        """The divergence in nats on the data that chooses."""
        return divergence(student, self.model, self.choosing, self.goal).mean


def minilm(text: str = "docstrings", profile: Path | None = None, task: bool = True) -> Ground:
    """all-MiniLM-L6-v2, calibrated on docstrings or on sentences of six kinds, and scored on both and on STS-B's test set.

    ``profile``: a file that holds the profile; it is measured and written there if there is none. ``task``: whether to
    score on STS-B.
    """
    loaded, goal = hpr.open_model(None), OBJECTIVES["embedding"]
    calibration, kept = divided()
    splits = prepare(None if text == "docstrings" else calibration, loaded, 4096)
    held = {
        "divergence": prepare(None, loaded, 4096).heldout,
        "six kinds": text_batches([one for kind in kept.values() for one in kind], loaded.tokenizer, 64, 256),
    }
    expected = {name: embeddings(loaded.model, batches, goal) for name, batches in held.items()}
    pairs = sts_pairs(shared() / "data" / "sts-b" / "stsb-en-test.csv")

    def score(student: nn.Module) -> dict[str, float]:
        found = {name: _apart(embeddings(student, batches, goal), expected[name]) for name, batches in held.items()}
        return found | ({"STS-B": sts_correlation(embedder(student, loaded.tokenizer), pairs)} if task else {})

    known = _profile(loaded, splits, profile)
    sizes = (24.0, 16.0, 12.0, 8.0, 6.0, 5.6, 4.0, 3.0)
    return Ground(loaded.model, splits.rescoring, goal, known, score, sizes, (8, 4, 3, 2), loaded, splits.calibration)


def speech() -> Ground:
    """KWT-1 on calibration clips, and its accuracy on evaluation clips."""
    model, goal = kwt1.load(shared() / "models" / "kwt1"), OBJECTIVES["classification"]
    calibration, _ = clips("calibration")
    evaluation, labels = clips("evaluation")
    evaluated = list(evaluation.split(205))

    def score(student: nn.Module) -> dict[str, float]:
        found = compare(student, model, evaluated, goal)
        assert found.student is not None
        return {"divergence": found.divergence.mean, "accuracy": 100 * accuracy(found.student, labels)}

    profiled = list(calibration[:500].split(50))
    profile = hpr.profile(model, profiled, "classification")
    choosing = list(calibration[500:].split(50))
    sizes = (0.150, 0.125, 0.112, 0.095, 0.080)
    return Ground(model, choosing, goal, profile, score, sizes, (8, 4, 3, 2), calibration=profiled)


def marked(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; each of ours that is lost says in ``lost`` on which score, and to which peer.

    A row is lost if a peer that takes no more bytes has less divergence.
    """
    rows = list(rows)
    peers = [row for row in rows if row["method"] not in ("original", "ours")]
    for row in (row for row in rows if row["method"] == "ours"):
        found = []
        for score in (score for score in DIVERGENCES if score in row):
            better = [peer for peer in peers if peer["megabytes"] <= row["megabytes"] and peer[score] < row[score]]
            if better:
                best = min(better, key=lambda peer: float(peer[score]))
                found.append(f"{score}: lost to {best['method']} ({best['megabytes']:.2f} MB, {best[score]:.5f})")
        if found:
            row["lost"] = ", ".join(found)
    return rows


def _apart(student: Tensor, teacher: Tensor) -> float:
    """Half of the mean squared distance between the embeddings (n, d) of two models: the divergence in nats per example."""
    return float((student.double() - teacher.double()).square().sum(1).mean() / 2)


def _profile(loaded: LoadedModel, splits: Splits, path: Path | None) -> Profile:
    if path is not None and path.exists():
        return Profile.load(path)
    torch.manual_seed(0)
    profile = hpr.profile(loaded.model, splits.calibration, "embedding")
    if path is not None:
        profile.save(path)
    return profile
