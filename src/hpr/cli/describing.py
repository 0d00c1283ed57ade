"""A model's anatomy as JSON values, for `hpr inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hpr.anatomy.describe import describe
from hpr.anatomy.swappable import not_swappable
from hpr.anatomy.uncovered import uncovered
from hpr.data.loaded_model import LoadedModel
from hpr.layer_reuse.install import droppable, reusable
from hpr.profiling.curvature import memory_needed

OTHER = "biases, norms and other"


def anatomy_of(loaded: LoadedModel) -> dict[str, Any]:
    """Stacks, parts with their parameters, ties, what cannot be shared, and the memory that a profile needs.

    ``attention_reuse`` and ``drop`` of a stack: layer → why it cannot reuse attention or be dropped, None if it can.
    """
    anatomy = describe(loaded.model)
    reuse, drop = reusable(loaded.model, anatomy), droppable(loaded.model, anatomy)
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
        "model": loaded.label,
        "class": anatomy.model_class,
        "objective": loaded.objective,
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
        "not_swappable": not_swappable(loaded.model, anatomy),
        "uncovered": [asdict(row) for row in uncovered(loaded.model, anatomy)],
        "profile_bytes": memory_needed(anatomy),
    }
