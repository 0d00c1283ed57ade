"""The record of a run: the values of metrics.json, and the output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.model import Anatomy
from hpr.checkpoints import save
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import Splits
from hpr.errors import BudgetError, CheckpointError
from hpr.evaluation.divergence import Comparison
from hpr.operators.registry import plannable
from hpr.planning.draft import Draft
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP
from hpr.profiling.profile import Profile
from hpr.reporting.card import render_card
from hpr.reporting.report import render_report
from hpr.runtime import files
from hpr.runtime.environment import versions
from hpr.runtime.files import parse_json, write_text


def write(student: nn.Module, output: str | Path, plan: Plan, metrics: dict[str, Any], loaded: LoadedModel) -> Path:
    """Write a folder at once: model, tokenizer, plan.json, metrics.json, report.html, README.md."""
    as_dict = plan.to_dict()

    def texts(folder: Path) -> dict[str, str]:
        metrics["hashes"] = {files.WEIGHTS: save.sha256(folder / files.WEIGHTS)}
        return {
            "plan.json": json.dumps(as_dict, indent=1) + "\n",
            "metrics.json": json.dumps(metrics, indent=1) + "\n",
            "report.html": render_report(as_dict, metrics),
            "README.md": render_card(as_dict, metrics),
        }

    return save.save(student, output, loaded.tokenizer, texts, loaded.folder)


def heading(loaded: LoadedModel, plan: Plan) -> dict[str, Any]:
    """The part of metrics.json that names the model, its plan and the versions of libraries."""
    return {
        "format": 1,
        "model": {"name": loaded.label, "class": plan.model_class, "fingerprint": plan.fingerprint},
        "versions": versions(),
        "budget": {"text": plan.budget.text, "parameters": plan.budget.parameters},
        "solver": plan.diagnostics.get("solver"),
    }


def record(loaded: LoadedModel, plan: Plan, profile: Profile, texts: Splits, figures: dict[str, Any]) -> dict[str, Any]:
    """The part of metrics.json that says how a compression was measured: figures, layers and calibration data."""
    return {
        **heading(loaded, plan),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **figures,
        "layers": {
            "names": {name: len(features.block_influence) for name, features in profile.layers.items()},
            **{
                key: {name: getattr(features, key) for name, features in profile.layers.items()}
                for key in ("similarity", "block_influence", "context_dependence")
            },
        },
        "calibration": {
            "source": texts.source,
            "examples": profile.about["examples"],
            "tokens": profile.about["tokens"],
            "objective": profile.about["objective"],
        },
    }


def plan_rows(plans: Sequence[Plan], scores: Sequence[Comparison], best: int, anatomy: Anatomy) -> list[dict[str, Any]]:
    """One row for each plan that was run end to end, with the budget it was made for; plan number ``best`` was chosen."""
    return [
        {
            "label": plan.diagnostics.get("label") or "plan",
            "budget": plan.budget.text,
            "parameters": plan.parameters(anatomy),
            "predicted": plan.damage,
            "measured": score.divergence.mean,
            "quality": score.likeness[1],
            "chosen": number == best,
            "aligned": bool(plan.alignment),
        }
        for number, (plan, score) in enumerate(zip(plans, scores, strict=True))
    ]


def operator_gains(draft: Draft, plan: Plan) -> list[dict[str, Any]]:
    """For each operator that the plan uses, and for alignment: the predicted damage of the best plan without it."""
    used = {entry.operator for entry in plan.entries.values()} & set(plannable()) - {KEEP}
    try:
        best = draft.best(plan.budget).damage
    except BudgetError:
        return []  # no plan is as fast as asked unless it drops layers
    gains = []
    for operator in sorted(used):
        try:
            without = draft.without(operator, plan.budget).damage
        except BudgetError:
            continue  # without it the budget cannot be met at all
        gains.append({"operator": operator, "damage_without": without, "damage_with": best})
    if plan.alignment:
        gains.append({"operator": "alignment", "damage_without": draft.plain.best(plan.budget).damage, "damage_with": best})
    return gains


def check_original(folder: Path, original: LoadedModel) -> None:
    """Raise ``CheckpointError`` if the plan in a folder was made for another model than this one."""
    if not (folder / "plan.json").is_file():
        return
    plan, found = Plan.load(folder / "plan.json"), describe(original.model)
    _metrics(folder)  # raises now, not after minutes of training
    if plan.fingerprint != found.fingerprint:
        raise CheckpointError(
            f"{folder} was made from a {plan.model_class} with fingerprint {plan.fingerprint}, {original.label} has "
            f"{found.fingerprint}: name the original with --teacher"
        )


def note_metrics(folder: Path, original: LoadedModel, figures: Mapping[str, Any]) -> None:
    """Add figures to the metrics.json beside a plan.json (see ``with_figures``)."""
    if (folder / "plan.json").is_file():
        write_text(folder / "metrics.json", json.dumps(with_figures(folder, original, figures), indent=1) + "\n")


def with_figures(folder: Path, original: LoadedModel, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a folder with new figures. A measurement on the same data replaces the older one."""
    plan = Plan.load(folder / "plan.json")
    metrics = _metrics(folder) or heading(original, plan)
    measured = {(row["name"], row["data"]) for row in figures["quality"]}
    older = [row for row in metrics.get("quality", []) if (row.get("name"), row.get("data")) not in measured]
    return metrics | {**figures, "quality": [*older, *figures["quality"]]}


def _metrics(folder: Path) -> dict[str, Any]:
    """What metrics.json holds, nothing if there is none. Raises ``CheckpointError`` if no figures can be added to it."""
    path = folder / "metrics.json"
    metrics = _read(path) if path.is_file() else {}
    rows = metrics.get("quality", [])
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise CheckpointError(f"quality in {path} is {rows!r:.80}, not a list of objects: undo the edit, or remove the file")
    return metrics


def write_report(folder: Path) -> Path:
    """Render report.html from plan.json and metrics.json alone."""
    plan, metrics = _read(folder / "plan.json"), _read(folder / "metrics.json")
    write_text(folder / "report.html", render_report(plan, metrics))
    return folder / "report.html"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        mend = "`hpr compress` writes one" if path.name == "plan.json" else "`hpr eval` writes one"
        raise CheckpointError(f"no {path.name} in {path.parent}: {mend}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): undo the edit") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object: undo the edit")
    return found
