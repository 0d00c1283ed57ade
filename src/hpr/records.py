"""What is written down of a run: metrics.json as JSON values, and the folder that holds everything."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from hpr import hub
from hpr.anatomy import Anatomy
from hpr.drafts import Draft
from hpr.errors import HprError
from hpr.evaluation.metrics import Comparison
from hpr.models import OpenModel
from hpr.operators import OPERATORS, segments
from hpr.planning.plan import Plan
from hpr.planning.terms import KEEP
from hpr.profiling.profile import Profile
from hpr.reporting import render_card, render_report
from hpr.splits import Splits


def write(student: nn.Module, output: str | Path, plan: Plan, metrics: dict[str, Any], opened: OpenModel) -> Path:
    """Write a folder at once: model, tokenizer, plan.json, metrics.json, report.html, README.md."""
    as_dict = plan.to_dict()

    def texts(folder: Path) -> dict[str, str]:
        metrics["hashes"] = {hub.WEIGHTS: hub.sha256(folder / hub.WEIGHTS)}
        return {
            "plan.json": json.dumps(as_dict, indent=1) + "\n",
            "metrics.json": json.dumps(metrics, indent=1) + "\n",
            "report.html": render_report(as_dict, metrics),
            "README.md": render_card(as_dict, metrics),
        }

    return hub.save(student, output, opened.tokenizer, texts, opened.folder)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("hpr", "torch", "transformers")}}


def heading(opened: OpenModel, plan: Plan) -> dict[str, Any]:
    """What metrics.json says of a model and its plan, however it came about."""
    return {
        "format": 1,
        "model": {"name": opened.label, "class": plan.model_class, "fingerprint": plan.fingerprint},
        "versions": versions(),
        "budget": {"text": plan.budget.text, "parameters": plan.budget.parameters},
        "boundaries": plan.diagnostics.get("boundaries", {}),
        "solver": plan.diagnostics.get("solver"),
    }


def record(
    opened: OpenModel, plan: Plan, found: Profile, texts: Splits, figures: dict[str, Any], timing: dict[str, float], seed: int
) -> dict[str, Any]:
    """What metrics.json keeps of a compression, the plans tried and what came after apart."""
    return {
        **heading(opened, plan),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        **figures,
        "layers": {
            "names": {name: len(features.block_influence) for name, features in found.layers.items()},
            **{
                key: {name: getattr(features, key) for name, features in found.layers.items()}
                for key in ("similarity", "block_influence", "context_dependence")
            },
        },
        "timing": timing,
        "calibration": {
            "source": texts.source,
            "examples": found.about["examples"],
            "tokens": found.about["tokens"],
            "objective": found.about["objective"],
        },
    }


def plan_rows(
    tried: Sequence[tuple[str, Plan]], scores: Sequence[Comparison], best: int, anatomy: Anatomy
) -> list[dict[str, Any]]:
    """One row for each plan that was measured, with the budget it was made for; the ``best``-th was chosen."""
    return [
        {
            "label": one.diagnostics.get("label") or "plan",
            "budget": text,
            "parameters": one.parameters(anatomy),
            "predicted": one.damage,
            "measured": score.divergence.mean,
            "quality": score.agreement if score.cosine is None else score.cosine,
            "chosen": index == best,
            "aligned": bool(one.alignment),
        }
        for index, ((text, one), score) in enumerate(zip(tried, scores, strict=True))
    ]


def operator_gains(sketch: Draft, plan: Plan) -> list[dict[str, Any]]:
    """What the best plan without each operator, and without alignment, would cost, for those that the plan uses."""
    used = {entry.operator for entry in plan.entries.values()} & {*OPERATORS, segments.NAME} - {KEEP}
    best = sketch.best(plan.budget).damage
    gains = []
    for operator in sorted(used):
        try:
            without = sketch.without(operator, plan.budget).damage
        except HprError:
            continue  # without it the budget cannot be met at all
        gains.append({"operator": operator, "damage_without": without, "damage_with": best})
    if plan.alignment:
        gains.append({"operator": "alignment", "damage_without": sketch.plain.best(plan.budget).damage, "damage_with": best})
    return gains
