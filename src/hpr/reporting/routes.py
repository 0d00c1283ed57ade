"""The section on routes: weight of each expert by kind of input, entropy by step, closest examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpr.plans.json_values import dig, number
from hpr.reporting import captions
from hpr.reporting import svg as figures
from hpr.reporting.formatting import numbers, present, records, table

Section = dict[str, Any]


def routes(metrics: Mapping[str, Any]) -> Section | None:
    """Weight of each expert by router and kind of input; None if the weights do not depend on the input."""
    recorded = table(metrics, "routes")
    shares = table(recorded, "shares")
    if not shares:
        return None
    kinds = list(dict.fromkeys(str(kind) for by_kind in shares.values() for kind in by_kind))
    rows = []
    for router, by_kind in shares.items():
        cells = []
        for kind in kinds:
            parts = [max(0.0, value or 0.0) for value in numbers(by_kind.get(kind))]
            cells.append(
                [{"expert": place, "grow": f"{part:.4f}", "text": f"{100 * part:.0f}"} for place, part in enumerate(parts)]
            )
        rows.append({"name": str(router).removesuffix(".router"), "cells": cells})
    nearest = [
        {"name": str(router).removesuffix(".router"), "experts": [[present(text) for text in texts] for texts in lists]}
        for router, lists in table(recorded, "nearest").items()
    ]
    section: Section = {"kinds": kinds, "rows": rows, "nearest": nearest, "entropy": None}
    section["reading"] = captions.routes_reading(
        number(dig(recorded, "entropy", "single")), number(dig(recorded, "entropy", "mean"))
    )
    pairs = [(number(row.get("step")), number(row.get("entropy"))) for row in records(table(metrics, "healing"), "history")]
    points = [(step, value) for step, value in pairs if step is not None and value is not None]
    if len(points) > 1:
        reading = captions.curve_reading(points)
        svg = figures.curve(points, "share of even routes", None, f"Entropy of routes by step. {reading}", (0.0, 1.0))
        section["entropy"] = {"svg": svg, "reading": reading}
    return section
