"""Captions: one sentence that says what a figure shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpr.plans.json_values import dig, number
from hpr.plans.table import Cell
from hpr.reporting.formatting import count, exact, figure, present, records, seconds
from hpr.reporting.svg import spearman

_KINDS = (
    ("shared", "shares factors", "share factors"),
    ("private", "is compressed on its own", "are compressed on their own"),
    ("keep", "is kept as it was", "are kept as they were"),
    ("coded", "is rounded and coded", "are rounded and coded"),
    ("gone", "stores no weights", "store no weights"),
)


def hover(cell: Cell) -> str:
    """One site with its operator, rank, partners and predicted damage."""
    rank = "" if cell.kind == "keep" else f", {cell.word} a number" if cell.kind == "coded" else f", rank {cell.rank}"
    shares = f"; shares with {', '.join(cell.partners)}" if cell.partners else ""
    damage = f"; predicted damage {figure(cell.damage, 'nats')}" if cell.damage is not None else ""
    return f"{cell.site}: {cell.operator}{rank}{shares}{damage}"


def plan_reading(cells: Sequence[Any], place: str) -> str:
    """How many matrices share, stand alone, or stay, in one sentence."""
    kinds = [cell.kind for cell in cells]
    groups = {group for cell in cells for group in cell.groups}
    phrases = [] if groups else ["none share factors"]
    rounded = ("private", "is a product of two rounded factors", "are products of two rounded factors")
    for kind, singular, plural in (rounded if "coded" in kinds and one[0] == "private" else one for one in _KINDS):
        if sites := kinds.count(kind):
            inside = f" in {len(groups)} group{'s' if len(groups) != 1 else ''}" if kind == "shared" else ""
            phrases.append(f"{sites} {singular if sites == 1 else plural}{inside}")
    return f"Of {len(kinds)} weight matrices {place}, {', '.join(phrases)}."


def similarity_reading(matrix: Sequence[Sequence[float | None]]) -> str:
    """Which layers are the most and the least alike."""
    pairs = [(value, i, j) for i, row in enumerate(matrix) for j, value in enumerate(row) if i < j and value is not None]
    if not pairs:
        return "There is only one layer."
    (most, i, j), (least, k, m) = max(pairs), min(pairs)
    return (
        f"Layers {i} and {j} are the most similar ({most:.2f}), {k} and {m} the least ({least:.2f}). "
        f"1 means equal outputs up to a rotation and a scale."
    )


def bar_reading(values: Sequence[float | None], meaning: str) -> str:
    """Which layer has the most and which the least of a feature."""
    measured = [(value, layer) for layer, value in enumerate(values) if value is not None]
    if not measured:
        return f"Not recorded ({meaning})."
    (most, top), (least, bottom) = max(measured), min(measured)
    return (
        f"{meaning[0].upper()}{meaning[1:]}: most in layer {top} ({figure(most)}), least in layer {bottom} ({figure(least)})."
    )


def damage_reading(pairs: Sequence[tuple[float, float]], total: int) -> str:
    """How well predictions fit: the median ratio and the rank correlation."""
    ratios = sorted(y / x for x, y in pairs)
    middle = ratios[len(ratios) // 2]
    rho = spearman(pairs)
    order = (
        "too few different plans for a rank correlation" if rho is None else f"Spearman ρ = {rho:.2f} over {len(pairs)} plans"
    )
    left_out = f"; {total - len(pairs)} plans without two positive values are left out" if total > len(pairs) else ""
    return f"Measured damage is {middle:.2g} times the prediction in the median; {order}{left_out}."


def healing_reading(healing: Mapping[str, Any]) -> str:
    """Steps, time, and divergence before and after healing."""
    steps = exact(dig(healing, "recipe", "steps"))
    took = f"{steps} steps in {seconds(number(healing.get('seconds')))}"
    if not number(healing.get("best_step")):
        return f"{took}: no check was better than the start, so the weights were not changed."
    before, after = figure(healing.get("before"), "nats"), figure(healing.get("after"), "nats")
    kept = f"the weights of step {exact(healing.get('best_step'))} were kept"
    return f"{took} changed the divergence from the original on the validation set from {before} to {after}; {kept}."


def curve_reading(points: Sequence[tuple[float, float]]) -> str:
    """The first and the last value of a curve."""
    (_, first), (_, last) = points[0], points[-1]
    return f"From {figure(first)} to {figure(last)}."


def routes_reading(single: float | None, mean: float | None) -> str:
    """The entropy of routes, for single examples and for their mean."""
    if single is None or mean is None:
        return "The entropy of the routes was not recorded."
    return (
        f"The route of a single example has {100 * single:.0f}\u00a0% of the greatest possible entropy, the mean route "
        f"{100 * mean:.0f}\u00a0%. The larger the difference, the more the route depends on the input."
    )


def quality_axis(scored: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> tuple[str, float | None]:
    """The name of the quality row that has the value of the chosen plan, and the value of the original."""
    chosen = next((number(row["quality"]) for row in scored if row.get("chosen")), None)
    for row in records(metrics, "quality"):
        after = number(row.get("after"))
        if chosen is not None and after is not None and math.isclose(chosen, after, rel_tol=1e-6):
            unit = str(row.get("unit") or "")
            return f"{present(row.get('name'))}{f' ({unit})' if unit else ''}", number(row.get("before"))
    return str(metrics.get("plan_quality") or "quality score of the run"), None


def quality_reading(scored: Sequence[Mapping[str, Any]], name: str) -> str:
    """Size and quality of the chosen plan, and how many plans are smaller."""
    chosen = next((row for row in scored if row.get("chosen")), None)
    if chosen is None:
        return f"{len(scored)} plans were measured; none is marked as chosen."
    smaller = sum(row["parameters"] < chosen["parameters"] for row in scored)
    size, score = count(chosen["parameters"]), figure(chosen["quality"])
    return f"The chosen plan has {size} parameters and scores {score}; {smaller} of {len(scored)} plans are smaller."
