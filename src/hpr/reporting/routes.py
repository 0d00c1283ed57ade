"""The report's section on routes: which inputs take which, how decided routers became, and what stands for each route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpr.plans.json_values import dig, number
from hpr.reporting import captions
from hpr.reporting import svg as figures
from hpr.reporting.formatting import numbers, present, records, table

Section = dict[str, Any]


def routes(metrics: Mapping[str, Any]) -> Section | None:
    """Shares by router and kind of input, entropy by step, nearest examples; None where weights do not depend on the input."""
    found = table(metrics, "routes")
    shares = table(found, "shares")
    if not shares:
        return None
    kinds = list(dict.fromkeys(str(kind) for own in shares.values() for kind in own))
    rows = []
    for router, own in shares.items():
        cells = []
        for kind in kinds:
            parts = [max(0.0, value or 0.0) for value in numbers(own.get(kind))]
            cells.append(
                [{"expert": place, "grow": f"{part:.4f}", "text": f"{100 * part:.0f}"} for place, part in enumerate(parts)]
            )
        rows.append({"name": str(router).removesuffix(".router"), "cells": cells})
    nearest = [
        {"name": str(router).removesuffix(".router"), "experts": [[present(text) for text in texts] for texts in lists]}
        for router, lists in table(found, "nearest").items()
    ]
    section: Section = {"kinds": kinds, "rows": rows, "nearest": nearest, "entropy": None}
    section["reading"] = captions.routes_reading(number(dig(found, "entropy", "single")), number(dig(found, "entropy", "mean")))
    pairs = [(number(row.get("step")), number(row.get("entropy"))) for row in records(table(metrics, "healing"), "history")]
    points = [(step, value) for step, value in pairs if step is not None and value is not None]
    if len(points) > 1:
        reading = captions.curve_reading(points)
        svg = figures.curve(points, "share of even routes", None, f"Entropy of routes by step. {reading}", (0.0, 1.0))
        section["entropy"] = {"svg": svg, "reading": reading}
    return section
