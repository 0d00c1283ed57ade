"""Names of shared factors."""

from __future__ import annotations

from collections.abc import Sequence

from hpr.anatomy.model import Site


def group_name(sites: Sequence[Site]) -> str:
    """The name of a group of sites, from which the names of its shared factors are made.

    One slot in neighbouring layers: ``encoder.0-2.mlp.up``. One slot in other layers: ``encoder.0-1+4.mlp.up``. Several slots:
    ``encoder.0-1.fc1+decoder.2-2.fc1``. Experts of one layer: ``decoder.0.mlp.experts.down_proj.0-7``. The names of all other
    sites are joined with ``+``.
    """
    first = sites[0]
    alike = all((site.stack, site.slot) == (first.stack, first.slot) for site in sites)
    if alike and first.expert is not None and len({site.layer for site in sites}) == 1:
        return f"{first.name.rpartition('.')[0]}.{_runs([site.expert for site in sites if site.expert is not None])}"
    layers = [site.layer for site in sites if site.layer is not None]
    experts = {site.expert for site in sites}
    if len(layers) < len(sites) or len(experts) > 1:
        return "+".join(site.name for site in sites)
    if not alike:
        parts = dict.fromkeys((site.stack, site.slot) for site in sites)
        return "+".join(group_name([site for site in sites if (site.stack, site.slot) == part]) for part in parts)
    slot = first.slot if first.expert is None else f"{first.slot}.{first.expert}"
    return f"{first.stack}.{_runs(layers)}.{slot}"


def _runs(numbers: Sequence[int]) -> str:
    """Write sorted numbers as runs, such as ``0-2+5``. A single number 3 becomes ``3-3``, which no site name contains."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    alone = len(runs) == 1
    return "+".join(f"{run[0]}-{run[-1]}" if alone or len(run) > 1 else str(run[0]) for run in runs)
