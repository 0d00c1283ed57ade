"""What the verbs say about models and folders, as JSON values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpr.anatomy import describe
from hpr.errors import HprError
from hpr.folders import write_text
from hpr.leftovers import leftovers
from hpr.models import OpenModel
from hpr.planning.plan import Plan
from hpr.profiling.curvature import memory_needed
from hpr.records import heading
from hpr.replaceable import unshareable
from hpr.reporting import render_report
from hpr.reuse import droppable, reusable

OTHER = "biases, norms and other"


def anatomy_of(opened: OpenModel) -> dict[str, Any]:
    """Stacks, parts with their parameters, ties, what cannot be shared, and the memory that a profile needs.

    ``attention_reuse`` and ``drop`` of a stack: layer → why it cannot reuse attention or be dropped, None where it can.
    """
    anatomy = describe(opened.model)
    reuse, drop = reusable(opened.model, anatomy), droppable(opened.model, anatomy)
    parts: list[dict[str, Any]] = []
    for (stack, slot), sites in anatomy.slots().items():
        parts.append(
            {
                "name": f"{stack} · {slot}" if stack else slot,
                "sites": len(sites),
                "shape": [sites[0].out_features, sites[0].in_features],
                "parameters": sum(site.parameters for site in sites),
            }
        )
    parts.append({"name": OTHER, "sites": 0, "shape": None, "parameters": anatomy.other_parameters})
    return {
        "model": opened.label,
        "class": anatomy.model_class,
        "objective": opened.objective,
        "fingerprint": anatomy.fingerprint,
        "parameters": anatomy.total_parameters,
        "stacks": [
            {
                "name": stack.name,
                "path": stack.path,
                "layers": stack.layers,
                "attention_reuse": {str(layer): reuse[f"{stack.name}.{layer}"] for layer in range(stack.layers)},
                "drop": {str(layer): drop[f"{stack.name}.{layer}"] for layer in range(stack.layers)},
            }
            for stack in anatomy.stacks
        ],
        "parts": parts,
        "ties": [{"site": site.name, "aliases": list(site.aliases)} for site in anatomy.sites if site.aliases],
        "unshareable": unshareable(opened.model, anatomy),
        "leftovers": [asdict(row) for row in leftovers(opened.model, anatomy)],
        "profile_bytes": memory_needed(anatomy),
    }


def check_original(folder: Path, original: OpenModel) -> None:
    """Raise where the plan in a folder was made for another model than this one."""
    if not (folder / "plan.json").is_file():
        return
    plan, found = Plan.load(folder / "plan.json"), describe(original.model)
    if plan.fingerprint != found.fingerprint:
        raise HprError(
            f"{folder} was made from a {plan.model_class} with fingerprint {plan.fingerprint}, {original.label} has "
            f"{found.fingerprint}: name the original with --teacher"
        )


def note_metrics(folder: Path, original: OpenModel, figures: Mapping[str, Any]) -> None:
    """Put new figures into the metrics.json beside a plan.json (see ``with_figures``)."""
    if (folder / "plan.json").is_file():
        write_text(folder / "metrics.json", json.dumps(with_figures(folder, original, figures), indent=1) + "\n")


def with_figures(folder: Path, original: OpenModel, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a folder with new figures: a measure on other data is added, on the same replaced."""
    plan = Plan.load(folder / "plan.json")
    metrics = _read(folder / "metrics.json") if (folder / "metrics.json").is_file() else heading(original, plan)
    measured = {(row["name"], row["data"]) for row in figures["quality"]}
    older = [row for row in metrics.get("quality", []) if (row.get("name"), row.get("data")) not in measured]
    return metrics | {**figures, "quality": [*older, *figures["quality"]]}


def write_report(folder: Path) -> Path:
    """Render report.html from plan.json and metrics.json alone."""
    plan, metrics = _read(folder / "plan.json"), _read(folder / "metrics.json")
    write_text(folder / "report.html", render_report(plan, metrics))
    return folder / "report.html"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        mend = "`hpr compress` writes one" if path.name == "plan.json" else "`hpr eval` writes one"
        raise HprError(f"no {path.name} in {path.parent}: {mend}") from error
    except ValueError as error:
        raise HprError(f"{path} is not JSON ({error}): undo the edit") from error
    if not isinstance(found, dict):
        raise HprError(f"{path} holds a {type(found).__name__}, not an object: undo the edit")
    return found
