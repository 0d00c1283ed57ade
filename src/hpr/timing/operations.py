"""Operations of one call, multiply-adds × 2, as ``evaluation.cost.forward_flops`` counts them; nothing is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from hpr.anatomy.lookup import has_module, module_at
from hpr.anatomy.model import Anatomy, Site
from hpr.evaluation.cost import forward_flops
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import run_noting
from hpr.timing.costs import Costs, Reading, SiteCost


def counted_costs(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Costs:
    """The operations of one call with ``batch`` (on the model's device), in total and by site."""
    readers = _readers(model, anatomy)
    rows = _rows(model, readers, batch)
    sites = {}
    for site, several in readers.items():
        out, inner = site.out_features, site.in_features
        ranks = np.arange(min(out, inner) + 1, dtype=np.float64)
        readings = []
        for module in several:
            table = isinstance(module, nn.Embedding)
            each = inner if table else out + inner
            dense = 0.0 if table else 2.0 * rows[module] * out * inner
            readings.append(Reading(dense, 2.0 * rows[module] * each * ranks, table, falls_back=False))
        sites[site.name] = SiteCost(out, inner, tuple(readings))
    linear = [count for module, count in rows.items() if not isinstance(module, nn.Embedding) and count]
    positions = max(set(linear), key=linear.count) if linear else 1
    whole = forward_flops(model, batch)

    def outside(changed: nn.Module) -> float:
        left = _readers(changed, anatomy)
        seen = _rows(changed, left, batch)
        return forward_flops(changed, batch) - sum(
            2.0 * seen[module] * site.out_features * site.in_features
            for site, several in left.items()
            for module in several
            if not isinstance(module, nn.Embedding)
        )

    return Costs(
        *("FLOP", outside(model), sites, positions, batch, outside), lambda changed: forward_flops(changed, batch) / whole
    )


def _readers(model: nn.Module, anatomy: Anatomy) -> dict[Site, list[nn.Module]]:
    """The modules that read the weight of each site; experts, which are computed together, are left out."""
    return {
        site: list(dict.fromkeys(module_at(model, path) for path in (site.name, *site.aliases) if has_module(model, path)))
        for site in anatomy.sites
        if site.expert is None
    }


def _rows(model: nn.Module, readers: Mapping[Site, Sequence[nn.Module]], batch: Batch) -> Counter[nn.Module]:
    """How many vectors, or ids of a table's rows, each module sees in a call."""
    rows: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows[module] += x.numel() if isinstance(module, nn.Embedding) else x.numel() // x.shape[-1]

    run_noting(model, batch, dict.fromkeys(module for several in readers.values() for module in several), note)
    return rows
