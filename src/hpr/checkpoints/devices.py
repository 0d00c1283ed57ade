"""Models that accelerate divides over devices, or keeps on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from hpr.errors import CheckpointError


def check_devices(places: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` where accelerate computes on several devices: it moves inputs, but not what layers share."""
    computing = {str(place) for place in places.values()} - {"cpu", "disk", "meta"}
    if len(computing) > 1:
        raise CheckpointError(
            f"layers on {', '.join(sorted(computing))} cannot share factors: load the model on one of these devices "
            f'(device_map={{"": 0}}), with the rest on cpu or disk, or load what hpr.unshare(model) saves'
        )


def tie_on_disk(model: PreTrainedModel) -> None:
    """Let tied weights on disk read what was decoded: transformers points them to the file before it decodes it."""
    for module in model.modules():
        places = getattr(getattr(getattr(module, "_hf_hook", None), "weights_map", None), "dataset", None)
        index = getattr(places, "index", None)
        if isinstance(index, dict):  # all hooks have the same one
            ties = getattr(model, "all_tied_weights_keys", None) or {}
            index.update({key: index[source] for key, source in ties.items() if source in index})
            return
